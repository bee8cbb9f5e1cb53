//! The batched tensor version against the row path, on whatever device there is.
#![cfg(feature = "torch")]

mod common;

use std::sync::Arc;

use rand::Rng;
use rand::rngs::StdRng;
use sampler::torch::{TorchSampler, masked_logits};
use sampler::{BatchSampler, SampleError, SampleResult, SamplingParams};
use tch::{Device, Kind, Tensor};

fn tensor(logits: &[f32], vocab_size: usize) -> Tensor {
    let device = Device::cuda_if_available();
    let rows = (logits.len() / vocab_size) as i64;
    Tensor::from_slice(logits)
        .view([rows, vocab_size as i64])
        .to_device(device)
}

struct Pair {
    plain: BatchSampler,
    torch: TorchSampler,
    vocab_size: usize,
}

impl Pair {
    fn new(vocab_size: usize) -> Self {
        let plain = BatchSampler::with_threads(vocab_size, 1);
        Self {
            plain,
            torch: TorchSampler::new(vocab_size),
            vocab_size,
        }
    }

    fn admit(&mut self, slot: u32, params: SamplingParams, rng: &mut StdRng, vocab_size: usize) {
        let params = Arc::new(params);
        let (seed, prompt) = (rng.random(), [rng.random_range(0..vocab_size as u32), 0]);
        self.plain
            .admit(slot, params.clone(), seed, &prompt, 1, &[0])
            .unwrap();
        self.torch
            .admit(slot, params, seed, &prompt, 1, &[0])
            .unwrap();
    }

    fn step(&mut self, logits: &[f32], slots: &[u32], what: &str) -> Vec<SampleResult> {
        let expected = self.plain.sample(logits, slots);
        let (found, ids) = self
            .torch
            .sample(&tensor(logits, self.vocab_size), slots)
            .unwrap();
        let ids = Vec::<i64>::try_from(ids).unwrap();
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            common::assert_same(found, expected, &format!("{what}, row {i}"));
            assert!(expected.error.is_some() || ids[i] == i64::from(expected.token));
        }
        assert_eq!(found.len(), expected.len());
        expected
    }
}

#[test]
fn random_batches() {
    for case in 0..150 {
        let mut rng = common::rng(case);
        let vocab_size = if case % 10 == 0 {
            9_001
        } else {
            rng.random_range(1..300)
        };
        let rows = rng.random_range(1..9);
        let mut pair = Pair::new(vocab_size);
        for slot in 0..rows {
            let mut params = common::params(&mut rng, vocab_size);
            if rng.random_bool(0.3) {
                params.logprobs = Some(rng.random_range(-1..7));
            }
            pair.admit(slot, params, &mut rng, vocab_size);
        }
        for step in 0..4 {
            // Any rows in any order, slots that hold nothing and a repeated slot among them.
            let slots: Vec<u32> = (0..rng.random_range(0..=rows))
                .map(|_| rng.random_range(0..rows + 1))
                .collect();
            let logits: Vec<f32> = slots
                .iter()
                .flat_map(|_| common::logits(&mut rng, vocab_size))
                .collect();
            pair.step(
                &logits,
                &slots,
                &format!("case {case}, step {step}, {vocab_size} tokens"),
            );
        }
    }
}

/// More rows than a tile holds, and a vocabulary of real size.
#[test]
fn large_batch() {
    let (vocab_size, rows) = (151_936, 70);
    let mut rng = common::rng(5);
    let mut pair = Pair::new(vocab_size);
    let table = [
        SamplingParams::default(),
        SamplingParams {
            top_k: 40,
            top_p: 0.9,
            logprobs: Some(3),
            ..Default::default()
        },
        SamplingParams {
            min_p: 0.05,
            repetition_penalty: 1.2,
            ..Default::default()
        },
    ];
    for slot in 0..rows {
        pair.admit(
            slot,
            table[slot as usize % table.len()].clone(),
            &mut rng,
            vocab_size,
        );
    }
    let row: Vec<f32> = (0..vocab_size)
        .map(|_| common::normal(&mut rng) * 3.0)
        .collect();
    let slots: Vec<u32> = (0..rows).collect();
    let results = pair.step(&row.repeat(slots.len()), &slots, "large batch");
    let distinct: std::collections::HashSet<u32> = results.iter().map(|r| r.token).collect();
    assert!(
        distinct.len() > 10,
        "seeds differ, so tokens must: {distinct:?}"
    );
}

#[test]
fn broken_rows_are_errors_of_their_own() {
    let mut pair = Pair::new(5);
    let mut rng = common::rng(0);
    for slot in 0..4 {
        pair.admit(slot, SamplingParams::default(), &mut rng, 5);
    }
    let only_zero = SamplingParams {
        allowed_token_ids: Some(vec![0]),
        bad_token_ids: vec![0],
        ..Default::default()
    };
    pair.admit(4, only_zero, &mut rng, 5);
    let mut logits = [0.5; 25];
    (logits[5 + 3], logits[10 + 1]) = (f32::NAN, f32::INFINITY);
    logits[15..20].fill(f32::NEG_INFINITY);
    let results = pair.step(&logits, &[0, 1, 2, 3, 4], "broken rows");
    let errors: Vec<_> = results.into_iter().map(|result| result.error).collect();
    let not_finite = |token| Some(SampleError::NotFinite { token });
    let masked = Some(SampleError::AllMasked);
    assert_eq!(
        errors,
        [None, not_finite(3), not_finite(1), masked.clone(), masked]
    );
    let lengths: Vec<_> = (0..5)
        .map(|slot| pair.torch.state(slot).unwrap().num_tokens())
        .collect();
    assert_eq!(
        lengths,
        [3, 2, 2, 2, 2],
        "only what was sampled is appended"
    );
}

/// Launching ahead gives what step after step gives, and needs no collected tokens unless the
/// parameters look at them.
#[test]
fn overlapped_launches() {
    let vocab_size = 97;
    let mut rng = common::rng(3);
    let mut pair = Pair::new(vocab_size);
    pair.admit(
        0,
        SamplingParams {
            top_k: 9,
            ..Default::default()
        },
        &mut rng,
        vocab_size,
    );
    let looking = SamplingParams {
        frequency_penalty: 2.0,
        ..Default::default()
    };
    pair.admit(1, looking, &mut rng, vocab_size);
    let steps: Vec<Vec<f32>> = (0..3)
        .map(|_| {
            (0..2 * vocab_size)
                .map(|_| common::normal(&mut rng))
                .collect()
        })
        .collect();
    let expected: Vec<_> = steps
        .iter()
        .map(|row| pair.plain.sample(row, &[0, 1]))
        .collect();

    let torch = &mut pair.torch;
    let first = torch
        .launch(&tensor(&steps[0], vocab_size), &[0, 1])
        .unwrap();
    assert_eq!(
        (torch.must_collect(0), torch.must_collect(1)),
        (false, true)
    );
    let second = torch
        .launch(&tensor(&steps[1], vocab_size), &[0, 1])
        .unwrap();
    let first = torch.collect(first).unwrap();
    assert_eq!(first, expected[0]);
    let second = torch.collect(second).unwrap();
    assert_eq!(second[0], expected[1][0]);
    assert_eq!(second[1].error, Some(SampleError::NotCollected { slot: 1 }));

    // A row in flight does not reach the sequence that takes its slot.
    let third = torch
        .launch(&tensor(&steps[2], vocab_size), &[0, 1])
        .unwrap();
    torch.release(1);
    torch
        .admit(1, Arc::new(SamplingParams::greedy()), 0, &[1], 1, &[])
        .unwrap();
    assert_eq!(torch.collect(third).unwrap()[0], expected[2][0]);
    assert_eq!(torch.state(1).unwrap().num_tokens(), 1);
}

#[test]
fn other_types_and_shapes() {
    let mut torch = TorchSampler::new(4);
    torch
        .admit(0, Arc::new(SamplingParams::greedy()), 0, &[1], 1, &[])
        .unwrap();
    let logits = tensor(&[0.0, 2.0, 1.0, 2.0], 4);
    for kind in [Kind::BFloat16, Kind::Half, Kind::Double] {
        let (results, _) = torch.sample(&logits.to_kind(kind), &[0]).unwrap();
        assert_eq!(results[0].token, 1, "the first of equal ones");
    }
    let error = torch.sample(&logits, &[0, 0]).unwrap_err().to_string();
    assert!(
        error.contains("[2, 4]") && error.contains("[1, 4]"),
        "{error}"
    );
    assert_eq!(torch.sample(&logits.narrow(0, 0, 0), &[]).unwrap().0, []);
}

#[test]
fn masks_leave_what_they_allow() {
    let mut rng = common::rng(77);
    for case in 0..60 {
        let vocab_size: usize = [1, 31, 32, 65, 1000][case % 5];
        let rows = [1, 3, 130][case % 3];
        let kind = [Kind::Float, Kind::BFloat16, Kind::Half][case / 5 % 3];
        let mut flat: Vec<f32> = Vec::new();
        for _ in 0..rows {
            flat.extend(common::logits(&mut rng, vocab_size));
        }
        flat[0] = f32::NAN;
        let logits = tensor(&flat, vocab_size).to_kind(kind);
        let mut which: Vec<i32> = (0..rows).filter(|_| rng.random()).collect();
        which.reverse();
        let width = vocab_size.div_ceil(32);
        let words: Vec<i32> = (0..which.len() * width).map(|_| rng.random()).collect();
        let device = logits.device();
        let on_device = |values: &[i32]| Tensor::from_slice(values).to_device(device);
        let shape = [which.len() as i64, width as i64];
        let masks = on_device(&words).view(shape);
        let got = masked_logits(&logits, &on_device(&which), &masks).unwrap();
        assert_eq!(got.kind(), kind);
        let host = |tensor: &Tensor| {
            let flat = tensor
                .to_device(Device::Cpu)
                .to_kind(Kind::Float)
                .reshape([-1]);
            Vec::<f32>::try_from(flat).unwrap()
        };
        let (raw, got) = (host(&logits), host(&got));
        for (at, (raw, got)) in raw.iter().zip(&got).enumerate() {
            let (row, token) = (at / vocab_size, at % vocab_size);
            let mask = which.iter().position(|which| *which as usize == row);
            let allowed = mask.is_none_or(|mask| {
                let word = words[mask * width + token / 32];
                word.cast_unsigned() >> (token % 32) & 1 == 1
            });
            let expected = match allowed || !raw.is_finite() {
                true => *raw,
                false => f32::NEG_INFINITY,
            };
            assert_eq!(
                got.to_bits(),
                expected.to_bits(),
                "case {case}, {row}, {token}"
            );
        }
    }
}
