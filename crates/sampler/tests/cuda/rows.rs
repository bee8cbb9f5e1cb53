//! What happens to a row: its errors, its draws, its slot, and graphs.

use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sampler::cuda::CudaSampler;
use sampler::oracle::{self, History};
use sampler::{AdmitError, SampleError, SamplingParams};
use tch::{Device, Kind, Tensor};
use torch_ext::cuda::{Graph, GraphPool, SampleMode};

use crate::common::{self, deviation};
use crate::pair::{DEVICE, Pair, host, ints, kernels};

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
