//! The rows that `benches/peers/vllm_core.py` measures with vLLM's Python core, measured with this
//! crate: one line a row, `name<TAB>median in µs<TAB>least in µs`.
//!
//! ```text
//! cargo run --release -p batch-scheduler --example core_rows [ROUNDS [ROW]]
//! ```

#[path = "../benches/workload/mod.rs"]
mod workload;

use std::hint::black_box;
use std::time::{Duration, Instant};

use paged_kv::{BlockManager, BlockSize, Config, KvAllocator, Salt};
use workload::{add_all, scheduler, timed_step};

/// Tokens of the prompts of sequences that decode, and steps they are decoded for.
const PROMPT: usize = 64;
const STEPS: usize = 400;

fn decode(seqs: usize, times: &mut Vec<Duration>) {
    let mut s = scheduler(seqs, PROMPT + STEPS + 16, seqs * PROMPT);
    add_all(&mut s, seqs, PROMPT);
    let mut events = Vec::new();
    timed_step(&mut s, &mut events);
    // All sequences fill a block in the same step, so 16 steps are one measurement.
    times.extend((0..STEPS / 16).map(|_| {
        let steps = (0..16).map(|_| timed_step(&mut s, &mut events));
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
        total += timed_step(&mut s, &mut events);
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
