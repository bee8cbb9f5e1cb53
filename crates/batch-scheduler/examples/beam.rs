//! Beam search on top of the scheduler: after each step the caller keeps the best continuations of
//! all beams, drops beams without any (`finish`), branches those with several (`fork`, which shares
//! the blocks) and sets the last token of the others (`rewrite`).
//!
//! The model is a table of how likely one token follows another.
//!
//! `cargo run --example beam`

use std::collections::BTreeMap;

use batch_scheduler::{
    Event, FinishReason, Request, RequestId, Sampled, Scheduler, SchedulerConfig, StepOutput,
    StopCriteria,
};
use paged_kv::{BlockManager, BlockSize, Config, TokenId};

const ID: RequestId = RequestId(0);
const WIDTH: usize = 3;
const LENGTH: usize = 8;
const WORDS: [&str; 6] = ["the", "cat", "sat", "on", "a", "mat"];

/// Log-probability that `next` follows `last`.
fn logprob(last: TokenId, next: TokenId) -> f64 {
    let odds = |n: TokenId| f64::from((last * 7 + n * 5 + last * n * 3) % 11 + 1);
    (odds(next) / (0..WORDS.len() as TokenId).map(odds).sum::<f64>()).ln()
}

/// One beam: its score and its text.
type Beams = BTreeMap<u32, (f64, Vec<TokenId>)>;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let kv = BlockManager::new(Config::new(64, BlockSize::new(4)?))?;
    let mut scheduler = Scheduler::new(SchedulerConfig::default(), kv)?;
    let prompt = vec![0, 1, 2];
    let mut beams: Beams = BTreeMap::from([(0, (0.0, prompt.clone()))]);
    let mut request = Request::new(
        ID.0,
        prompt,
        StopCriteria::max_tokens(LENGTH as u32 + 1),
        (),
    );
    // No step is planned for a beam before its last token is chosen.
    request.lockstep = true;
    scheduler.add(request)?;

    let mut events: Vec<Event<()>> = Vec::new();
    for _ in 0..LENGTH {
        let plan = scheduler.schedule().ok_or("the beams fit")?;
        // Whatever is sampled is replaced below; a real model would report its best candidates.
        let sampled = |_: &_| Sampled {
            tokens: [0].into_iter().collect(),
            extras: Vec::new(),
            error: None,
        };
        let samples = plan.samples.iter().map(sampled).collect();
        let step = plan.step;
        let copies = plan.copies.len();
        scheduler.recycle(plan);
        scheduler.apply(
            StepOutput {
                step,
                samples,
                prompt_extras: Vec::new(),
            },
            &mut events,
        )?;
        events.clear();
        beams = advance(&mut scheduler, beams)?;
        let used = scheduler.stats().kv_used_blocks;
        println!(
            "step {step}: {} beams in {used} blocks, {copies} copied",
            beams.len()
        );
    }
    for (score, text) in beams.values() {
        let words: Vec<&str> = text.iter().map(|&t| WORDS[t as usize]).collect();
        println!("{score:7.3}  {}", words.join(" "));
    }
    scheduler.abort(ID, &mut events);
    println!("blocks leaked: {}", scheduler.stats().kv_used_blocks);
    Ok(())
}

/// Chooses the best continuations and tells the scheduler of them.
fn advance(
    scheduler: &mut Scheduler<BlockManager, ()>,
    old: Beams,
) -> Result<Beams, Box<dyn std::error::Error>> {
    let mut candidates = Vec::new();
    for (&index, (score, text)) in &old {
        let last = text[text.len() - 1];
        for next in 0..WORDS.len() as TokenId {
            candidates.push((score + logprob(last, next), index, next));
        }
    }
    candidates.sort_by(|a, b| b.0.total_cmp(&a.0));
    candidates.truncate(WIDTH);

    let mut events: Vec<Event<()>> = Vec::new();
    for &index in old.keys() {
        if candidates.iter().all(|c| c.1 != index) {
            scheduler.finish(ID, index, FinishReason::Aborted, &mut events);
        }
    }
    let mut beams = Beams::new();
    let mut rewrites: Vec<(u32, usize, TokenId)> = Vec::new();
    for &(score, from, next) in &candidates {
        let mut text = old[&from].1.clone();
        let keep = text.len();
        text.push(next);
        // The first continuation of a beam stays in its place, the others branch off.
        let is_first = !rewrites.iter().any(|&(index, ..)| index == from);
        let index = match is_first {
            true => from,
            false => {
                let live = |i: &u32| candidates.iter().any(|c| c.1 == *i);
                let free = (0..).find(|i| !beams.contains_key(i) && !live(i));
                let index = free.ok_or("numbers do not end")?;
                scheduler.fork(ID, from, index, keep, &[next], ())?;
                index
            }
        };
        if is_first {
            rewrites.push((from, keep, next));
        }
        beams.insert(index, (score, text));
    }
    for (index, keep, next) in rewrites {
        scheduler.rewrite(ID, index, keep, &[next])?;
    }
    Ok(beams)
}
