//! The rows that `benches/peers/vllm_core.py` measures with vLLM's Python core, measured with this
//! crate: one line a row, `name<TAB>median in µs<TAB>least in µs`.
//!
//! ```text
//! cargo run --release -p batch-scheduler --example core_rows [ROUNDS [ROW]]
//! ```

use std::hint::black_box;
use std::time::{Duration, Instant};

use batch_scheduler::*;
use paged_kv::{BlockManager, BlockSize, Config, KvAllocator, Salt};
use smallvec::smallvec;

type Sched = Scheduler<BlockManager, ()>;

/// Tokens of the prompts of sequences that decode, and steps they are decoded for.
const PROMPT: usize = 64;
const STEPS: usize = 400;

fn scheduler(seqs: usize, tokens: usize, max_batched: usize) -> Sched {
    let blocks = seqs * tokens.div_ceil(16) + 1;
    let kv = BlockManager::new(Config::new(blocks, BlockSize::default())).expect("pool");
    let config = SchedulerConfig {
        max_num_seqs: seqs,
        max_num_batched_tokens: max_batched,
        max_model_len: 4096,
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

/// What a model returns that says 11 to everyone.
#[inline(never)] // so that a profile can tell it from the scheduler
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

#[inline(never)]
fn clear(events: &mut Vec<Event<()>>) {
    events.clear();
}

/// One step, the model's part left out of the clock.
#[inline(never)]
fn step(s: &mut Sched, events: &mut Vec<Event<()>>) -> Duration {
    let start = Instant::now();
    let plan = s.schedule().expect("work");
    let scheduled = start.elapsed();
    let out = output(&plan);
    clear(events);
    let start = Instant::now();
    s.recycle(plan);
    s.apply(out, events).expect("in step");
    black_box(&events);
    scheduled + start.elapsed()
}

fn decode(seqs: usize, times: &mut Vec<Duration>) {
    let mut s = scheduler(seqs, PROMPT + STEPS + 16, seqs * PROMPT);
    add_all(&mut s, seqs, PROMPT);
    let mut events = Vec::new();
    step(&mut s, &mut events);
    // All sequences fill a block in the same step, so 16 steps are one measurement.
    times.extend((0..STEPS / 16).map(|_| {
        let steps = (0..16).map(|_| step(&mut s, &mut events));
        steps.sum::<Duration>() / 16
    }));
}

fn admit(seqs: usize, times: &mut Vec<Duration>) {
    // vLLM's budget: 8,192 tokens a step.
    let mut s = scheduler(seqs, 640, 8192);
    let mut events = Vec::new();
    let start = Instant::now();
    add_all(&mut s, seqs, 512);
    let mut total = start.elapsed();
    while s.stats().waiting > 0 {
        total += step(&mut s, &mut events);
    }
    times.push(total);
}

fn match_prompt(tokens: u32, times: &mut Vec<Duration>) {
    let prompt: Vec<u32> = (0..tokens + 1).collect();
    let mut kv = BlockManager::new(Config::new(1 << 12, BlockSize::default())).expect("pool");
    let mut table = kv
        .allocate(&prompt, Salt::NONE, true, prompt.len())
        .expect("it fits")
        .table;
    kv.publish(&mut table, &prompt, prompt.len());
    kv.free(table);
    for _ in 0..50 {
        let start = Instant::now();
        let hit = kv.match_prefix(black_box(&prompt), Salt::NONE);
        times.push(start.elapsed());
        assert_eq!(hit, tokens as usize);
    }
}

fn main() {
    let mut args = std::env::args().skip(1);
    let rounds: usize = args
        .next()
        .map_or(5, |n| n.parse().expect("a number of rounds"));
    let only = args.next();
    type Row = (&'static str, fn(&mut Vec<Duration>));
    let rows: &[Row] = &[
        ("decode 64", |t| decode(64, t)),
        ("decode 256", |t| decode(256, t)),
        ("decode 1024", |t| decode(1024, t)),
        ("decode 2048", |t| decode(2048, t)),
        ("decode 4096", |t| decode(4096, t)),
        ("admit 1024 x 512", |t| admit(1024, t)),
        ("match 4096", |t| match_prompt(4096, t)),
    ];
    for (name, run) in rows {
        if only.as_deref().is_some_and(|only| only != *name) {
            continue;
        }
        let mut times = Vec::new();
        (0..rounds).for_each(|_| run(&mut times));
        times.sort();
        let us = |time: Duration| time.as_secs_f64() * 1e6;
        println!(
            "{name}\t{:.2}\t{:.2}",
            us(times[times.len() / 2]),
            us(times[0])
        );
    }
}
