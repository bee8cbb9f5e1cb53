//! A whole engine around the scheduler, with one step in flight while the next is planned. The model is
//! a toy: what it remembers of a token is that token, written to paged memory, and what it says next is
//! a function of all it reads back through the block table. `cargo run --example engine`

use std::collections::VecDeque;

use batch_scheduler::{Event, ModelRunner, Request, Sampled, Scheduler};
use batch_scheduler::{SchedulerConfig, StepOutput, StepPlan, StopCriteria};
use paged_kv::{BlockId, BlockManager, BlockSize, Config, TokenId};

const BLOCK: usize = 4;

/// The runner: one slot a sequence (its tokens and its block table), and the KV memory that they share.
struct Toy {
    slots: Vec<(Vec<TokenId>, Vec<BlockId>)>,
    memory: Vec<TokenId>,
    finished: VecDeque<StepOutput<()>>,
}

impl ModelRunner for Toy {
    type Params = ();
    type Extra = ();
    type Ticket = u64;
    type Error = std::convert::Infallible;

    fn launch(&mut self, plan: StepPlan<()>) -> Result<u64, Self::Error> {
        for seq in plan.admitted {
            self.slots[seq.slot.0 as usize] = (seq.tokens, seq.blocks);
        }
        for copy in plan.copies {
            let from = copy.src.index() * BLOCK;
            let to = copy.dst.index() * BLOCK;
            self.memory.copy_within(from..from + BLOCK, to);
        }
        let mut logits = Vec::new();
        for row in &plan.rows {
            let (tokens, blocks) = &mut self.slots[row.slot.0 as usize];
            let new = row.new_blocks.start as usize..row.new_blocks.end as usize;
            blocks.truncate(row.table_at as usize);
            blocks.extend_from_slice(&plan.new_blocks[new]);
            let at = |p: usize| blocks[p / BLOCK].index() * BLOCK + p % BLOCK;
            let (start, end) = (row.start as usize, (row.start + row.len) as usize);
            for (p, &token) in tokens.iter().enumerate().take(end).skip(start) {
                self.memory[at(p)] = token;
            }
            logits.push((0..end).fold(0, |sum, p| (sum * 3 + self.memory[at(p)]) % 26));
        }
        let samples = plan.samples.iter().map(|sample| {
            let token = logits[sample.row as usize];
            self.slots[sample.slot.0 as usize].0.push(token);
            Sampled::from(token)
        });
        self.finished.push_back(StepOutput {
            step: plan.step,
            samples: samples.collect(),
            prompt_extras: Vec::new(),
        });
        Ok(plan.step)
    }

    fn collect(&mut self, _step: u64) -> Result<StepOutput<()>, Self::Error> {
        Ok(self.finished.pop_front().expect("a step was launched"))
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut config = SchedulerConfig::default();
    (config.max_num_seqs, config.max_num_batched_tokens) = (3, 8);
    let mut toy = Toy {
        slots: vec![Default::default(); config.max_num_seqs],
        memory: vec![0; 16 * BLOCK],
        finished: VecDeque::new(),
    };
    let kv = BlockManager::new(Config::new(16, BlockSize::new(BLOCK as u32)?))?;
    let mut scheduler = Scheduler::new(config, kv)?;
    let mut said = ["the quick", "the quick fox", "jumps", "over"].map(String::from);
    for (id, text) in (0..).zip(&said) {
        let prompt = text.bytes().map(|b| u32::from(b % 26)).collect();
        scheduler.add(Request::new(id, prompt, StopCriteria::max_tokens(12), ()))?;
    }
    let (mut tickets, mut events) = (VecDeque::new(), Vec::new());
    while scheduler.has_work() {
        // Plan ahead as far as the scheduler lets us, then wait for the oldest step.
        while let Some(plan) = scheduler.schedule() {
            println!("step {:2}: {} sequences", plan.step, plan.rows.len());
            tickets.push_back(toy.launch(plan)?);
        }
        let ticket = tickets.pop_front().ok_or("nothing can run")?;
        scheduler.apply(toy.collect(ticket)?, &mut events)?;
        for event in events.drain(..) {
            if let Event::Tokens { id, tokens, .. } = event {
                said[id.0 as usize].extend(tokens.iter().map(|&t| char::from(b'a' + t as u8)));
            }
        }
    }
    let leaked = scheduler.stats().kv_used_blocks;
    println!("{said:#?}, {leaked} blocks leaked");
    Ok(())
}
