//! What a step of the scheduler costs, without a model behind it: time, heap allocations, and how
//! both grow with sequences and with blocks.
//!
//! `cargo bench -p batch-scheduler`

#![allow(
    missing_docs,
    reason = "criterion_group makes an undocumented function"
)]

mod workload;

use std::time::{Duration, Instant};

use batch_scheduler::Event;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use workload::{Sched, add_all, output, scheduler, timed_step, with_blocks};

const PROMPT: usize = 64;

/// Prints heap allocations of a step, those of `schedule`, `recycle` and `apply` alone, over 256
/// steps.
fn allocations(name: &str, (mut s, mut events): (Sched, Vec<Event<()>>), seqs: usize) {
    let mut count = 0;
    for _ in 0..256 {
        let mut plan = None;
        count += allocation_counter::measure(|| plan = s.schedule()).count_total;
        let plan = plan.expect("work");
        let out = output(&plan);
        events.clear();
        count += allocation_counter::measure(|| {
            s.recycle(plan);
            s.apply(out, &mut events).expect("in step");
        })
        .count_total;
    }
    let step = count as f64 / 256.0;
    println!(
        "{name}: {step:.2} heap allocations a step, {:.4} a sequence",
        step / seqs as f64
    );
}

/// `seqs` sequences that decode, on a pool for `tokens` tokens each.
fn decoding(seqs: usize, tokens: usize) -> (Sched, Vec<Event<()>>) {
    decoding_on(seqs, seqs * tokens.div_ceil(16) + 1)
}

/// `seqs` sequences that decode, on `blocks` blocks.
fn decoding_on(seqs: usize, blocks: usize) -> (Sched, Vec<Event<()>>) {
    let mut s = with_blocks(seqs, blocks, seqs * PROMPT);
    add_all(&mut s, seqs, PROMPT);
    let mut events = Vec::new();
    timed_step(&mut s, &mut events);
    (s, events)
}

fn decode(c: &mut Criterion) {
    let mut group = c.benchmark_group("decode_step");
    for seqs in [64, 128, 256, 512, 1024, 2048, 4096] {
        allocations(
            &format!("decode step, {seqs} sequences"),
            decoding(seqs, 1024),
            seqs,
        );
        group.throughput(Throughput::Elements(seqs as u64));
        group.bench_function(BenchmarkId::from_parameter(seqs), |b| {
            b.iter_custom(|iterations| {
                let mut total = Duration::ZERO;
                let mut left = iterations;
                while left > 0 {
                    let (mut s, mut events) = decoding(seqs, 1024);
                    let steps = left.min(900);
                    for _ in 0..steps {
                        total += timed_step(&mut s, &mut events);
                    }
                    left -= steps;
                }
                total
            });
        });
    }
    group.finish();
}

/// 256 sequences, on pools of very different sizes.
fn decode_by_blocks(c: &mut Criterion) {
    let mut group = c.benchmark_group("decode_step_256_by_blocks");
    for blocks in [1 << 14, 1 << 17, 1 << 20] {
        group.bench_function(BenchmarkId::from_parameter(blocks), |b| {
            b.iter_custom(|iterations| {
                let mut total = Duration::ZERO;
                let mut left = iterations;
                while left > 0 {
                    let (mut s, mut events) = decoding_on(256, blocks);
                    let steps = left.min(900);
                    for _ in 0..steps {
                        total += timed_step(&mut s, &mut events);
                    }
                    left -= steps;
                }
                total
            });
        });
    }
    group.finish();
}

fn admit(c: &mut Criterion) {
    let mut group = c.benchmark_group("admit_512_tokens");
    for seqs in [64, 256, 1024] {
        group.throughput(Throughput::Elements(seqs as u64));
        group.bench_function(BenchmarkId::from_parameter(seqs), |b| {
            b.iter_custom(|iterations| {
                let mut total = Duration::ZERO;
                for _ in 0..iterations {
                    // The budget of vLLM's figure: 8,192 tokens a step.
                    let mut s = scheduler(seqs, 640, 8192);
                    let mut events = Vec::new();
                    let start = Instant::now();
                    add_all(&mut s, seqs, 512);
                    total += start.elapsed();
                    while s.stats().waiting > 0 {
                        total += timed_step(&mut s, &mut events);
                    }
                }
                total
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = decode, decode_by_blocks, admit
}
criterion_main!(benches);
