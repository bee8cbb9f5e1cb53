//! The GPU's sampler against the CPU's: the same tokens, errors and log-probabilities.
#![cfg(feature = "cuda")]

mod common;

use std::sync::Arc;

use common::deviation;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};
use sampler::cuda::CudaSampler;
use sampler::oracle::{self, History};
use sampler::{AdmitError, BatchSampler, SampleError, SampleResult, SamplingParams};
use tch::{Device, Kind, Tensor};
use torch_ext::cuda::{self, Graph, GraphPool, Kernels, SampleMode, Stream};

/// Kernels of the first device, on a stream of this test's own.
fn kernels() -> Option<Arc<Kernels>> {
    if !cuda::is_available() {
        println!("skipped: no CUDA device");
        return None;
    }
    Stream::new(0).unwrap().make_current().unwrap();
    Some(Arc::new(Kernels::new(0).unwrap()))
}

const DEVICE: Device = Device::Cuda(0);

fn ints(values: &[i32]) -> Tensor {
    Tensor::from_slice(values).to_device(DEVICE)
}

fn host(tensor: &Tensor) -> Vec<i32> {
    Vec::<i32>::try_from(tensor.to_device(Device::Cpu)).unwrap()
}

fn assert_same(found: &SampleResult, expected: &SampleResult, what: &str) {
    let summary = |r: &SampleResult| (r.token, r.error.clone(), r.logprobs.is_some());
    assert_eq!(summary(found), summary(expected), "{what}");
    let (Some(found), Some(expected)) = (&found.logprobs, &expected.logprobs) else {
        return;
    };
    let close = |a: f32, b: f32| a == b || (a - b).abs() <= 1e-6 * b.abs().max(1.0);
    assert_eq!(found.rank, expected.rank, "{what}");
    assert!(
        close(found.logprob, expected.logprob),
        "{what}: {found:?} {expected:?}"
    );
    assert_eq!(found.top.len(), expected.top.len(), "{what}");
    for (a, b) in found.top.iter().zip(&expected.top) {
        assert!(a.0 == b.0 && close(a.1, b.1), "{what}: {a:?} {b:?}");
    }
}

/// The same sequences in both.
struct Pair {
    plain: BatchSampler,
    cuda: CudaSampler,
    vocab_size: usize,
}

impl Pair {
    fn new(kernels: &Arc<Kernels>, vocab_size: usize, slots: usize) -> Self {
        Self {
            plain: BatchSampler::with_threads(vocab_size, 4),
            cuda: CudaSampler::new(kernels.clone(), vocab_size, slots).unwrap(),
            vocab_size,
        }
    }

    fn admit(&mut self, slot: u32, params: SamplingParams, rng: &mut StdRng) {
        let tokens: Vec<u32> = (0..rng.random_range(1..100))
            .map(|_| rng.random_range(0..self.vocab_size as u32))
            .collect();
        let num_prompt = rng.random_range(0..=tokens.len());
        let (params, seed) = (Arc::new(params), rng.random());
        self.plain
            .admit(slot, params.clone(), seed, &tokens, num_prompt, &[0])
            .unwrap();
        self.cuda
            .admit(slot, params, seed, &tokens, num_prompt, &[0])
            .unwrap();
    }

    fn release(&mut self, slot: u32) {
        self.plain.release(slot);
        self.cuda.release(slot);
    }

    fn positions(&self, slots: &[u32]) -> Vec<i32> {
        let position = |&slot: &u32| self.plain.state(slot).map_or(0, |s| s.num_tokens() as i32);
        slots.iter().map(position).collect()
    }

    /// A step of rows of `slots` and of `padding` more. `gap` is what lies between two rows.
    fn step(&mut self, logits: &Tensor, slots: &[u32], padding: usize, gap: usize, what: &str) {
        let rows = slots.len();
        let width = (self.vocab_size + gap) as i64;
        let all = (rows + padding) as i64;
        let wide = Tensor::full([all, width], f64::NAN, (logits.kind(), DEVICE));
        let view = wide.narrow(1, 0, self.vocab_size as i64);
        view.narrow(0, 0, rows as i64).copy_(logits);
        let mut on_device: Vec<i32> = slots.iter().map(|&slot| slot as i32).collect();
        on_device.resize(rows + padding, -1);
        let mut positions = self.positions(slots);
        positions.resize(rows + padding, 0);
        let sampling = self
            .cuda
            .sample(&view, &ints(&on_device), &ints(&positions), slots)
            .unwrap();
        let tokens = host(sampling.tokens());
        let found = self.cuda.results(&sampling, &tokens[..rows]).unwrap();
        let flat = logits.to_device(Device::Cpu).to_kind(Kind::Float);
        let flat = Vec::<f32>::try_from(flat.reshape([-1])).unwrap();
        let expected = self.plain.sample(&flat, slots);
        assert_eq!(found.len(), expected.len());
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_same(found, expected, &format!("{what}, row {i}"));
        }
        assert!(tokens[rows..].iter().all(|&token| token == -1), "{what}");
    }
}

#[test]
fn random_batches() {
    run_batches(0..400);
}

/// A few, for the sanitizer.
#[test]
fn small_batches() {
    run_batches(1000..1016);
}

fn run_batches(cases: std::ops::Range<u64>) {
    let Some(kernels) = kernels() else { return };
    for case in cases {
        let mut rng = common::rng(case);
        let vocab_size = match case % 8 {
            0 => rng.random_range(8_000..50_000),
            1 => 8192,
            _ => rng.random_range(1..700),
        };
        let slots = rng.random_range(1..12);
        let mut pair = Pair::new(&kernels, vocab_size, slots as usize + 1);
        let kind = *[Kind::Float, Kind::BFloat16, Kind::Half]
            .choose(&mut rng)
            .unwrap();
        let simple = rng.random_bool(0.3);
        for slot in 0..slots {
            let mut params = common::params(&mut rng, vocab_size);
            if simple {
                (params.top_k, params.top_p, params.min_p) = (0, 1.0, 0.0);
            }
            if rng.random_bool(0.3) {
                params.logprobs = Some(rng.random_range(0..7));
            }
            pair.admit(slot, params, &mut rng);
        }
        for step in 0..5 {
            if rng.random_bool(0.2) {
                let slot = rng.random_range(0..slots);
                pair.release(slot);
                if rng.random_bool(0.7) {
                    let params = common::params(&mut rng, vocab_size);
                    pair.admit(slot, params, &mut rng);
                }
            }
            // Some rows in any order, a slot that holds nothing among them.
            let mut rows: Vec<u32> = (0..=slots).collect();
            rows.shuffle(&mut rng);
            rows.truncate(rng.random_range(1..=rows.len()));
            let mut logits: Vec<f32> = rows
                .iter()
                .flat_map(|_| common::logits(&mut rng, vocab_size))
                .collect();
            if rng.random_bool(0.1) {
                let at = rng.random_range(0..logits.len());
                logits[at] = *[f32::NAN, f32::INFINITY].choose(&mut rng).unwrap();
            }
            let logits = Tensor::from_slice(&logits)
                .view([rows.len() as i64, vocab_size as i64])
                .to_device(DEVICE)
                .to_kind(kind);
            // Rows in their slots' memory may not exceed the sampler's rows.
            let padding = rng.random_range(0..=slots as usize + 1 - rows.len());
            let gap = *[0, 3, 8].choose(&mut rng).unwrap();
            let what = format!("case {case}, step {step}, {vocab_size} tokens, {kind:?}");
            pair.step(&logits, &rows, padding, gap, &what);
        }
    }
}

/// Every option at a real vocabulary, in one batch of more rows than the GPU holds at a time: so many
/// that a row is one thread block's, which has more groups than it lists at a time, and fewer.
#[test]
fn large_vocabulary() {
    let Some(kernels) = kernels() else { return };
    let vocab_size = 151_936;
    let d = SamplingParams::default;
    let table = [
        SamplingParams::greedy(),
        d(),
        SamplingParams { top_k: 50, ..d() },
        SamplingParams { top_p: 0.9, ..d() },
        SamplingParams {
            top_k: 50,
            top_p: 0.9,
            temperature: 0.7,
            logprobs: Some(20),
            ..d()
        },
        SamplingParams {
            top_k: 20_000,
            top_p: 0.99,
            ..d()
        },
        SamplingParams { top_k: 1500, ..d() },
        SamplingParams {
            min_p: 0.05,
            repetition_penalty: 1.2,
            ..d()
        },
        SamplingParams {
            min_p: 0.001,
            top_p: 0.7,
            frequency_penalty: 0.4,
            ..d()
        },
        SamplingParams {
            temperature: 2.0,
            top_p: 0.999,
            ..d()
        },
        SamplingParams {
            bad_token_ids: (0..3000).collect(),
            logit_bias: [(5, 50.0)].into(),
            ..d()
        },
    ];
    let mut rng = common::rng(5);
    let rows = 143;
    let mut pair = Pair::new(&kernels, vocab_size, rows as usize);
    for slot in 0..rows {
        let params = SamplingParams {
            max_tokens: None,
            ..table[slot as usize % table.len()].clone()
        };
        pair.admit(slot, params, &mut rng);
    }
    let slots: Vec<u32> = (0..rows).collect();
    tch::manual_seed(1);
    for (step, (scale, rounded)) in [(3.0, false), (1.0, false), (0.01, false), (2.0, true)]
        .into_iter()
        .enumerate()
    {
        let shape = [i64::from(rows), vocab_size as i64];
        let mut logits = Tensor::randn(shape, (Kind::Float, DEVICE)) * scale;
        if rounded {
            logits = logits.round();
        }
        for (kind, rows) in [(Kind::BFloat16, rows), (Kind::Float, 88)] {
            let what = format!("step {step}, {kind:?}, {rows} rows");
            let logits = logits.narrow(0, 0, i64::from(rows)).to_kind(kind);
            pair.step(&logits, &slots[..rows as usize], 0, 0, &what);
        }
    }
}

#[test]
fn broken_rows_are_errors_of_their_own() {
    let Some(kernels) = kernels() else { return };
    for params in [
        SamplingParams::greedy(),
        SamplingParams::default(),
        SamplingParams {
            top_p: 0.5,
            ..Default::default()
        },
    ] {
        let vocab_size = 20_000;
        let mut cuda = CudaSampler::new(kernels.clone(), vocab_size, 5).unwrap();
        for slot in 0..4 {
            cuda.admit(slot, Arc::new(params.clone()), 0, &[1], 1, &[])
                .unwrap();
        }
        let only_zero = SamplingParams {
            allowed_token_ids: Some(vec![0]),
            bad_token_ids: vec![0],
            ..params
        };
        cuda.admit(4, Arc::new(only_zero), 0, &[1], 1, &[]).unwrap();
        let mut logits = vec![0.5_f32; 5 * vocab_size];
        logits[vocab_size + 19_001] = f32::NAN;
        logits[vocab_size + 19_999] = f32::NAN;
        logits[2 * vocab_size + 3] = f32::INFINITY;
        logits[3 * vocab_size..4 * vocab_size].fill(f32::NEG_INFINITY);
        let logits = Tensor::from_slice(&logits)
            .view([5, vocab_size as i64])
            .to_device(DEVICE);
        let slots: Vec<u32> = (0..5).collect();
        let sampling = cuda
            .sample(&logits, &ints(&[0, 1, 2, 3, 4]), &ints(&[1; 5]), &slots)
            .unwrap();
        let results = cuda.results(&sampling, &host(sampling.tokens())).unwrap();
        let errors: Vec<_> = results.into_iter().map(|result| result.error).collect();
        let not_finite = |token| Some(SampleError::NotFinite { token });
        let masked = Some(SampleError::AllMasked);
        let expected = [
            None,
            not_finite(19_001),
            not_finite(3),
            masked.clone(),
            masked,
        ];
        assert_eq!(errors, expected);
    }
}

/// A graph that was captured once gives at each replay what that step's logits and positions ask
/// for, also after other sequences took the slots.
#[test]
fn graph_replays() {
    let Some(kernels) = kernels() else { return };
    let vocab_size = 10_007;
    for mode in [
        SampleMode::Greedy,
        SampleMode::Race,
        SampleMode::Filter,
        SampleMode::Nucleus,
    ] {
        let mut rng = common::rng(mode as u64);
        let rows = 6u32;
        let mut pair = Pair::new(&kernels, vocab_size, rows as usize);
        let slots: Vec<u32> = (0..rows).collect();
        let mut on_device = ints(&[-1; 6]);
        let mut positions = ints(&[0; 6]);
        let shape = [i64::from(rows), vocab_size as i64];
        let mut logits = Tensor::randn(shape, (Kind::Float, DEVICE)).to_kind(Kind::BFloat16);
        let launch = || {
            pair.cuda
                .launch(&logits, &on_device, &positions, mode)
                .unwrap()
        };
        drop(launch());
        // A pool lives as long as its graphs.
        let pool = GraphPool::new().unwrap();
        let (mut graph, tokens) = Graph::capture(pool, launch).unwrap();
        on_device.copy_(&ints(&[0, 1, 2, 3, 4, 5]));
        for step in 0..12 {
            if step % 4 == 0 {
                for slot in 0..rows {
                    pair.release(slot);
                    let mut params = common::params(&mut rng, vocab_size);
                    if mode < SampleMode::Filter {
                        (params.top_k, params.top_p, params.min_p) = (0, 1.0, 0.0);
                    }
                    if mode == SampleMode::Filter && params.top_p < 1.0 {
                        params.top_k = rng.random_range(1..3000);
                    }
                    if mode == SampleMode::Greedy {
                        params.temperature = 0.0;
                    }
                    pair.admit(slot, params, &mut rng);
                }
            }
            positions.copy_(&ints(&pair.positions(&slots)));
            logits.copy_(&(Tensor::randn(shape, (Kind::Float, DEVICE)) * 3.0));
            assert!(pair.cuda.prepare(&slots).unwrap().mode <= mode);
            graph.replay().unwrap();
            let tokens = host(&tokens);
            let flat = logits.to_device(Device::Cpu).to_kind(Kind::Float);
            let flat = Vec::<f32>::try_from(flat.reshape([-1])).unwrap();
            let expected = pair.plain.sample(&flat, &slots);
            for (row, (&token, expected)) in tokens.iter().zip(&expected).enumerate() {
                let expected = expected.error.is_none().then_some(expected.token as i32);
                assert_eq!(
                    (token >= 0).then_some(token),
                    expected,
                    "{mode:?} {step} {row}"
                );
            }
        }
    }
}

/// Draws fit the exact distribution, and not one that is slightly wrong.
#[test]
fn draws_fit_the_exact_distribution() {
    let Some(kernels) = kernels() else { return };
    let mut rng = StdRng::seed_from_u64(1);
    let logits: Vec<f32> = (0..83).map(|_| common::normal(&mut rng) * 1.5).collect();
    let d = || SamplingParams {
        max_tokens: None,
        ..Default::default()
    };
    let combined = SamplingParams {
        temperature: 0.8,
        top_k: 20,
        top_p: 0.9,
        min_p: 0.02,
        ..d()
    };
    let table = [
        (
            d(),
            SamplingParams {
                temperature: 1.08,
                ..d()
            },
        ),
        (
            SamplingParams { top_k: 5, ..d() },
            SamplingParams { top_k: 4, ..d() },
        ),
        (
            SamplingParams { top_p: 0.7, ..d() },
            SamplingParams { top_p: 0.6, ..d() },
        ),
        (
            SamplingParams { min_p: 0.1, ..d() },
            SamplingParams { min_p: 0.2, ..d() },
        ),
        (
            combined.clone(),
            SamplingParams {
                top_p: 0.8,
                ..combined
            },
        ),
    ];
    let rows = 1000;
    for (right, wrong) in table {
        let mut cuda = CudaSampler::new(kernels.clone(), logits.len(), rows).unwrap();
        for slot in 0..rows as u32 {
            let seed = u64::from(slot) << 20;
            cuda.admit(slot, Arc::new(right.clone()), seed, &[1], 1, &[])
                .unwrap();
        }
        let batch = Tensor::from_slice(&logits).to_device(DEVICE);
        let batch = batch.unsqueeze(0).repeat([rows as i64, 1]);
        let slots: Vec<u32> = (0..rows as u32).collect();
        let on_device = ints(&slots.iter().map(|&slot| slot as i32).collect::<Vec<_>>());
        let mut counts = vec![0; logits.len()];
        for position in 1..41 {
            let positions = ints(&vec![position; rows]);
            let sampling = cuda.sample(&batch, &on_device, &positions, &slots).unwrap();
            for token in host(sampling.tokens()) {
                counts[token as usize] += 1;
            }
        }
        let exact = |params| {
            let history = History {
                params,
                seed: 0,
                prompt: &[1],
                output: &[],
                stop_ids: &[],
            };
            oracle::distribution(&logits, &history).unwrap()
        };
        let fit = deviation(&counts, &exact(&right));
        assert!(fit < 3.5, "{fit} deviations: {right:?}");
        let control = deviation(&counts, &exact(&wrong));
        assert!(
            control > 6.0,
            "a wrong distribution passes ({control}): {wrong:?}"
        );
    }
}

#[test]
fn what_cannot_be_admitted() {
    let Some(kernels) = kernels() else { return };
    let mut cuda = CudaSampler::new(kernels, 5000, 2).unwrap();
    let mut admit = |slot, params, tokens: &[u32]| {
        cuda.admit(slot, Arc::new(params), 0, tokens, tokens.len(), &[])
    };
    let d = SamplingParams::default;
    admit(0, d(), &[1]).unwrap();
    assert_eq!(admit(0, d(), &[1]), Err(AdmitError::SlotTaken { slot: 0 }));
    assert!(matches!(
        admit(1, d(), &[5000]),
        Err(AdmitError::TokenOutOfRange { .. })
    ));
    let unsupported = [
        SamplingParams {
            logprobs: Some(-1),
            ..d()
        },
        SamplingParams {
            bad_words_token_ids: vec![vec![1; 65]],
            ..d()
        },
        SamplingParams {
            bad_words_token_ids: vec![vec![1; 60]; 20],
            ..d()
        },
    ];
    for params in unsupported {
        let error = admit(1, params, &[1]).unwrap_err();
        assert!(matches!(error, AdmitError::Unsupported { .. }), "{error}");
    }
    let error = admit(2, d(), &[1]).unwrap_err().to_string();
    assert!(error.contains("`slot` is 2, expected below 2"), "{error}");
}

/// Masked rows beside others: the CPU's tokens, and log-probabilities of the raw logits.
#[test]
fn masked_rows() {
    let Some(kernels) = kernels() else { return };
    for case in 0..60 {
        let mut rng = common::rng(5000 + case);
        let vocab_size = [33, 257, 5_000, 151_936][case as usize % 4];
        let count = rng.random_range(1..9);
        let mut pair = Pair::new(&kernels, vocab_size, count);
        for slot in 0..count {
            let mut params = common::params(&mut rng, vocab_size);
            // A list of its own may leave nothing beside the mask.
            params.allowed_token_ids = None;
            params.logprobs = rng.random::<bool>().then_some(3);
            pair.admit(slot as u32, params, &mut rng);
        }
        let slots: Vec<u32> = (0..count as u32).collect();
        for step in 0..3 {
            let flat: Vec<f32> = (0..count)
                .flat_map(|_| common::logits(&mut rng, vocab_size))
                .collect();
            let kind = [Kind::Float, Kind::BFloat16][case as usize % 2];
            let shape = [count as i64, vocab_size as i64];
            let logits = Tensor::from_slice(&flat).view(shape).to_kind(kind);
            let flat = Vec::<f32>::try_from(logits.to_kind(Kind::Float).reshape([-1])).unwrap();
            let which: Vec<usize> = (0..count).filter(|_| rng.random()).collect();
            let width = vocab_size.div_ceil(32);
            let masks: Vec<Vec<u32>> = which
                .iter()
                .map(|_| (0..width).map(|_| rng.random::<u32>()).collect())
                .collect();
            let pairs: Vec<(usize, &[u32])> = which
                .iter()
                .zip(&masks)
                .map(|(row, mask)| (*row, mask.as_slice()))
                .collect();
            let rows: Vec<i32> = which.iter().map(|row| *row as i32).collect();
            let words: Vec<i32> = masks
                .concat()
                .iter()
                .map(|word| word.cast_signed())
                .collect();
            let words = ints(&words).view([rows.len() as i64, width as i64]);
            let logits = logits.to_device(DEVICE);
            let masked = sampler::torch::masked_logits(&logits, &ints(&rows), &words).unwrap();
            let positions = ints(&pair.positions(&slots));
            let on_device = ints(&slots.iter().map(|slot| *slot as i32).collect::<Vec<_>>());
            let sampling = pair
                .cuda
                .sample_masked(&logits, Some(&masked), &on_device, &positions, &slots)
                .unwrap();
            let tokens = host(sampling.tokens());
            let found = pair.cuda.results(&sampling, &tokens).unwrap();
            let expected = pair.plain.sample_masked(&flat, &slots, &pairs);
            for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert_same(
                    found,
                    expected,
                    &format!("case {case}, step {step}, row {i}"),
                );
            }
        }
    }
}
