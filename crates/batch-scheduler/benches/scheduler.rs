//! What a step of the scheduler costs, without a model behind it: time, heap allocations, and how
//! both grow with sequences and with blocks.
//!
//! `cargo bench -p batch-scheduler`

#![allow(
    missing_docs,
    reason = "criterion_group makes an undocumented function"
)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use batch_scheduler::{
    Event, Request, Sampled, Scheduler, SchedulerConfig, StepOutput, StepPlan, StopCriteria,
};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use paged_kv::{BlockManager, BlockSize, Config};
use smallvec::smallvec;

type Sched = Scheduler<BlockManager, ()>;

const PROMPT: usize = 64;
const MAX_LEN: usize = 4096;

fn scheduler(seqs: usize, tokens: usize, max_batched: usize) -> Sched {
    with_blocks(seqs, seqs * tokens.div_ceil(16) + 1, max_batched)
}

fn with_blocks(seqs: usize, blocks: usize, max_batched: usize) -> Sched {
    let kv = BlockManager::new(Config::new(blocks, BlockSize::default())).expect("pool");
    let config = SchedulerConfig {
        max_num_seqs: seqs,
        max_num_batched_tokens: max_batched,
        max_model_len: MAX_LEN,
        max_steps_in_flight: 1,
        ..SchedulerConfig::default()
    };
    Scheduler::new(config, kv).expect("config")
}

fn add_all(s: &mut Sched, seqs: usize, prompt: usize) {
    for id in 0..seqs as u64 {
        let tokens = (0..prompt as u64).map(|i| (id * 7919 + i * 31) as u32 % 50_000);
        let stop = StopCriteria {
            eos_token_ids: vec![2, 3],
            ..StopCriteria::max_tokens(u32::MAX / 8)
        };
        let request = Request::new(id, tokens.collect(), stop, ());
        s.add(request).expect("fits");
    }
}

fn output(plan: &StepPlan<()>) -> StepOutput<()> {
    let sampled = |_: &_| Sampled {
        tokens: smallvec![11],
        extras: Vec::new(),
        error: None,
    };
    StepOutput {
        step: plan.step,
        samples: plan.samples.iter().map(sampled).collect(),
        prompt_extras: Vec::new(),
    }
}

/// One step, the runner's part left out of the clock.
fn timed_step(s: &mut Sched, events: &mut Vec<Event<()>>) -> Duration {
    let start = Instant::now();
    let plan = s.schedule().expect("work");
    let scheduled = start.elapsed();
    let out = output(&plan);
    events.clear();
    let start = Instant::now();
    s.recycle(plan);
    s.apply(out, events).expect("in step");
    black_box(&events);
    scheduled + start.elapsed()
}

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
