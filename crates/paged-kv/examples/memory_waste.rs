//! The memory figure of the paged-attention paper: how much of the KV memory that sequences hold
//! is wasted, with one contiguous reservation a sequence and with pages.
//! `cargo run --release -p paged-kv --example memory_waste`
//!
//! Lengths are log-normal with the means that the vLLM paper gives for ShareGPT (prompt 161 tokens,
//! answer 338), long tails, and at most 2,048 tokens in all. Sequences come and go as in continuous
//! batching; each row is the mean over time of 1 - tokens / slots held.

use std::error::Error;

use paged_kv::{BlockManager, BlockSize, BlockTable, Config, KvAllocator, Salt};
use rand::{Rng, SeedableRng, rngs::SmallRng};

const MAX_LEN: usize = 2048;
const SEQUENCES: usize = 64;
const STEPS: usize = 20_000;

struct Seq {
    table: BlockTable,
    len: usize,
    target: usize,
}

/// A log-normal length with the given mean.
fn length(rng: &mut SmallRng, mean: f64, sigma: f64) -> usize {
    // Box-Muller.
    let (u, v): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
    let normal = (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos();
    let length = (mean.ln() - sigma * sigma / 2.0 + sigma * normal).exp();
    (length.round() as usize).clamp(1, MAX_LEN / 2)
}

fn start(kv: &mut BlockManager, rng: &mut SmallRng) -> Option<Seq> {
    let prompt = length(rng, 161.0, 1.1);
    let target = prompt + length(rng, 338.0, 0.9);
    let table = kv.allocate(&[], Salt::NONE, false, prompt)?.table;
    Some(Seq {
        table,
        len: prompt,
        target,
    })
}

/// The shares wasted by: reserving `MAX_LEN`; the power of two that holds the final length, known
/// in advance; the final length itself, known in advance; pages.
fn waste(block_size: u32) -> Result<[f64; 4], Box<dyn Error>> {
    let size = BlockSize::new(block_size)?;
    let blocks = SEQUENCES * size.blocks_for(MAX_LEN) + 1;
    let mut kv = BlockManager::new(Config::new(blocks, size))?;
    let mut rng = SmallRng::seed_from_u64(0);
    let mut running: Vec<Seq> = Vec::new();
    let (mut held, mut tokens) = ([0; 4], 0);
    let mut copies = Vec::new();
    for _ in 0..STEPS {
        while running.len() < SEQUENCES {
            running.push(start(&mut kv, &mut rng).ok_or("the pool holds them all")?);
        }
        for seq in &mut running {
            kv.extend(&mut seq.table, seq.len, seq.len + 1, &mut copies)
                .ok_or("the pool holds them all")?;
            seq.len += 1;
            tokens += seq.len;
            held[0] += MAX_LEN;
            held[1] += seq.target.next_power_of_two();
            held[2] += seq.target;
        }
        held[3] += kv.usage().referenced * size.get();
        let (done, going) = running.into_iter().partition(|seq| seq.len >= seq.target);
        running = going;
        let done: Vec<Seq> = done;
        done.into_iter().for_each(|seq| kv.free(seq.table));
    }
    Ok(held.map(|held| 1.0 - tokens as f64 / held as f64))
}

fn main() -> Result<(), Box<dyn Error>> {
    println!("KV memory wasted, {SEQUENCES} sequences at a time, {STEPS} steps");
    let [max, power, oracle, _] = waste(16)?;
    println!(
        "contiguous, {MAX_LEN} tokens each          {:5.1} %",
        100.0 * max
    );
    println!(
        "contiguous, final length to 2^n     {:5.1} %",
        100.0 * power
    );
    println!(
        "contiguous, final length foreseen   {:5.1} %",
        100.0 * oracle
    );
    for block_size in [1, 8, 16, 32, 64] {
        let [.., pages] = waste(block_size)?;
        println!(
            "pages of {block_size:2} tokens                 {:5.1} %",
            100.0 * pages
        );
    }
    Ok(())
}
