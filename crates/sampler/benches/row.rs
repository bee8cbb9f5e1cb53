//! Time a row at the vocabulary size of Qwen3: `cargo bench -p sampler`.
#![allow(
    missing_docs,
    reason = "criterion_group! makes an undocumented function"
)]

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, criterion_group, criterion_main};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sampler::{BatchSampler, RowSampler, SamplingParams, SeqState};

const VOCAB_SIZE: usize = 151_936;

/// Normal logits. A deviation of 3 is about what a trained model gives without its peak, which
/// makes this harder than real rows: more tokens stay in the race and in the nucleus.
fn row(deviation: f32) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(1);
    let mut normal = || (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0;
    (0..VOCAB_SIZE).map(|_| normal() * deviation).collect()
}

fn rows(c: &mut Criterion) {
    let base = SamplingParams {
        max_tokens: None,
        ..Default::default()
    };
    let penalties = SamplingParams {
        temperature: 0.0,
        repetition_penalty: 1.1,
        frequency_penalty: 0.1,
        ..base.clone()
    };
    let cases = [
        ("greedy", SamplingParams::greedy()),
        ("greedy, penalties", penalties),
        (
            "greedy, 5 logprobs",
            SamplingParams {
                logprobs: Some(5),
                ..SamplingParams::greedy()
            },
        ),
        ("temperature", base.clone()),
        (
            "top-k 50",
            SamplingParams {
                top_k: 50,
                ..base.clone()
            },
        ),
        (
            "top-k 20000",
            SamplingParams {
                top_k: 20_000,
                ..base.clone()
            },
        ),
        (
            "top-p 0.9",
            SamplingParams {
                top_p: 0.9,
                ..base.clone()
            },
        ),
        (
            "min-p 0.05",
            SamplingParams {
                min_p: 0.05,
                ..base.clone()
            },
        ),
        (
            "temperature 0.6, top-k 20, top-p 0.95",
            SamplingParams {
                temperature: 0.6,
                top_k: 20,
                top_p: 0.95,
                ..base
            },
        ),
    ];
    let prompt: Vec<u32> = (0..2000).map(|i| i * 7).collect();
    for (shape, deviation) in [("normal(3)", 3.0), ("normal(0.1)", 0.1)] {
        let logits = row(deviation);
        let mut group = c.benchmark_group(shape);
        for (name, params) in &cases {
            let params = Arc::new(params.clone());
            let mut state = SeqState::new(params, 7, &prompt, 1000, &[], VOCAB_SIZE).unwrap();
            let mut sampler = RowSampler::default();
            group.bench_function(*name, |b| {
                b.iter(|| {
                    // Appending moves the position, so that each iteration has its own noise.
                    state.append(1);
                    sampler.sample(black_box(&logits), &state).unwrap()
                });
            });
        }
        group.finish();
    }
}

fn batches(c: &mut Criterion) {
    let mut group = c.benchmark_group("batch of 8");
    for (name, params) in [
        ("greedy", SamplingParams::greedy()),
        ("temperature", SamplingParams::default()),
    ] {
        let mut sampler = BatchSampler::new(VOCAB_SIZE);
        let params = Arc::new(params);
        let slots: Vec<u32> = (0..8).collect();
        for &slot in &slots {
            sampler
                .admit(slot, params.clone(), slot.into(), &[1], 1, &[])
                .unwrap();
        }
        let logits = row(3.0).repeat(slots.len());
        group.bench_function(name, |b| {
            b.iter(|| sampler.sample(black_box(&logits), &slots))
        });
    }
    group.finish();
}

criterion_group!(benches, rows, batches);
criterion_main!(benches);
