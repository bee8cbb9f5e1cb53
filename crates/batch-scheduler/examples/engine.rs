//! A whole engine around the scheduler, with one step in flight while the next is planned. The
//! model is a toy: what it remembers of a token is that token, written to paged memory, and what
//! it says next is a function of all it reads back through the block table.
//!
//! `cargo run --example engine`

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;

use batch_scheduler::{
    Event, ModelRunner, Request, RequestId, Sampled, Scheduler, SchedulerConfig, StepOutput,
    StepPlan, StopCriteria,
};
use paged_kv::{BlockId, BlockManager, BlockSize, Config, TokenId};
use smallvec::smallvec;

const BLOCK: usize = 4;
const BLOCKS: usize = 16;

#[derive(Clone, Default)]
struct Slot {
    tokens: Vec<TokenId>,
    blocks: Vec<BlockId>,
}

/// The runner: one slot a sequence, and the KV memory that they share.
struct Toy {
    slots: Vec<Slot>,
    memory: Vec<TokenId>,
    finished: VecDeque<StepOutput<()>>,
}

impl ModelRunner for Toy {
    type Params = ();
    type Extra = ();
    type Ticket = u64;
    type Error = Infallible;

    fn launch(&mut self, plan: StepPlan<()>) -> Result<u64, Infallible> {
        for seq in plan.admitted {
            let slot = &mut self.slots[seq.slot.0 as usize];
            slot.tokens = seq.tokens;
            slot.blocks = seq.blocks;
        }
        for copy in plan.copies {
            let src = copy.src.index() * BLOCK;
            let dst = copy.dst.index() * BLOCK;
            self.memory.copy_within(src..src + BLOCK, dst);
        }
        let mut logits = Vec::new();
        for row in &plan.rows {
            let slot = &mut self.slots[row.slot.0 as usize];
            let new = row.new_blocks.start as usize..row.new_blocks.end as usize;
            slot.blocks.truncate(row.table_at as usize);
            slot.blocks.extend_from_slice(&plan.new_blocks[new]);
            let at = |p: usize| slot.blocks[p / BLOCK].index() * BLOCK + p % BLOCK;
            let end = (row.start + row.len) as usize;
            for p in row.start as usize..end {
                self.memory[at(p)] = slot.tokens[p];
            }
            logits.push((0..end).fold(0, |sum, p| (sum * 3 + self.memory[at(p)]) % 26));
        }
        let mut samples = Vec::new();
        for sample in &plan.samples {
            let token = logits[sample.row as usize];
            self.slots[sample.slot.0 as usize].tokens.push(token);
            samples.push(Sampled {
                tokens: smallvec![token],
                extras: Vec::new(),
                error: None,
            });
        }
        self.finished.push_back(StepOutput {
            step: plan.step,
            samples,
            prompt_extras: Vec::new(),
        });
        Ok(plan.step)
    }

    fn collect(&mut self, _step: u64) -> Result<StepOutput<()>, Infallible> {
        Ok(self.finished.pop_front().expect("a step was launched"))
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let config = SchedulerConfig {
        max_num_seqs: 3,
        max_num_batched_tokens: 8,
        max_model_len: 40,
        ..SchedulerConfig::default()
    };
    let mut toy = Toy {
        slots: vec![Slot::default(); config.max_num_seqs],
        memory: vec![0; BLOCKS * BLOCK],
        finished: VecDeque::new(),
    };
    let kv = BlockManager::new(Config::new(BLOCKS, BlockSize::new(BLOCK as u32)?))?;
    let mut scheduler = Scheduler::new(config, kv)?;
    for (id, text) in ["the quick", "the quick fox", "jumps", "over"]
        .iter()
        .enumerate()
    {
        let prompt = text.bytes().map(|b| u32::from(b % 26)).collect();
        scheduler.add(Request::new(
            id as u64,
            prompt,
            StopCriteria::max_tokens(12),
            (),
        ))?;
    }

    let mut said: BTreeMap<RequestId, String> = BTreeMap::new();
    let (mut tickets, mut events) = (VecDeque::new(), Vec::new());
    while scheduler.has_work() {
        // Plan ahead as far as the scheduler lets us, then wait for the oldest step.
        while let Some(plan) = scheduler.schedule() {
            for s in scheduler.snapshot() {
                let share = plan.rows.iter().find(|r| Some(r.slot.0) == s.slot);
                let tokens = share.map_or(0, |r| r.len);
                println!(
                    "step {:2}  {:?} {:9?} computes {tokens}",
                    plan.step, s.id, s.state
                );
            }
            tickets.push_back(toy.launch(plan)?);
        }
        let Some(ticket) = tickets.pop_front() else {
            return Err("nothing can run and nothing is in flight".into());
        };
        scheduler.apply(toy.collect(ticket)?, &mut events)?;
        for event in events.drain(..) {
            if let Event::Tokens { id, tokens, .. } = event {
                let letters = tokens.iter().map(|&t| char::from(b'a' + t as u8));
                said.entry(id).or_default().extend(letters);
            }
        }
    }
    println!("{said:#?}");
    println!("blocks leaked: {}", scheduler.stats().kv_used_blocks);
    Ok(())
}
