//! Batches of all kinds of rows: tokens, errors and log-probabilities are the CPU's.

use rand::Rng;
use rand::seq::{IndexedRandom, SliceRandom};
use sampler::SamplingParams;
use tch::{Kind, Tensor};

use crate::common::{self, assert_same};
use crate::pair::{DEVICE, Pair, host, ints, kernels};

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
            temperature: 0.6,
            top_k: 20,
            top_p: 0.95,
            ..d()
        },
        SamplingParams {
            temperature: 0.3,
            top_p: 0.9,
            ..d()
        },
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
