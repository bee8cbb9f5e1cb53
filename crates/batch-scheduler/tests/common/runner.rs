//! Runs plans on simulated KV memory, through the block tables that the plans build up, and
//! checks what a plan may and may not ask for.

use std::collections::{HashSet, VecDeque};

use batch_scheduler::{ModelRunner, Sampled, SlotId, StepOutput, StepPlan};
use paged_kv::{BlockId, TokenId};
use smallvec::SmallVec;

use super::model::{Params, digest, sample, window_start};

struct Slot {
    tokens: Vec<TokenId>,
    blocks: Vec<BlockId>,
    num_prompt: u32,
    params: Params,
}

/// What a launched step still needs: nobody may write there until it is collected.
struct Launched {
    output: StepOutput<u64>,
    slots: HashSet<SlotId>,
    reads: HashSet<(BlockId, usize)>,
}

/// The step's rows take more memory than there is.
#[derive(Debug)]
pub struct OutOfMemory;

impl std::fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("out of memory")
    }
}

impl std::error::Error for OutOfMemory {}

/// A [`ModelRunner`] on simulated memory. A sampled token's extra is the digest it came from.
pub struct PagedRunner {
    block_size: usize,
    window: Option<u32>,
    max_batched: usize,
    memory: Vec<u64>,
    host: Vec<u64>,
    slots: Vec<Option<Slot>>,
    launched: VecDeque<Launched>,
    next_step: u64,
    /// Tokens of the largest step that finds memory.
    pub memory_for: usize,
    pub copies: usize,
    pub swapped: usize,
    pub accepted: usize,
}

impl PagedRunner {
    pub fn new(
        num_blocks: usize,
        host_blocks: usize,
        block_size: usize,
        max_num_seqs: usize,
        max_batched: usize,
        window: Option<u32>,
    ) -> Self {
        Self {
            block_size,
            window,
            max_batched,
            memory: vec![0xdead_beef; num_blocks * block_size],
            host: vec![0xdead_beef; host_blocks * block_size],
            slots: (0..max_num_seqs).map(|_| None).collect(),
            launched: VecDeque::new(),
            next_step: 0,
            memory_for: usize::MAX,
            copies: 0,
            swapped: 0,
            accepted: 0,
        }
    }

    pub fn occupied(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    /// Tokens known in a slot, those of steps in flight included, and how many are the prompt.
    pub fn known(&self, slot: SlotId) -> Option<(u32, u32)> {
        let slot = self.slots[slot.0 as usize].as_ref()?;
        Some((slot.tokens.len() as u32, slot.num_prompt))
    }

    fn take_released(&mut self, plan: &StepPlan<Params>) {
        for &slot in &plan.released {
            self.assert_unread(slot, "released");
            let was = self.slots[slot.0 as usize].take();
            assert!(was.is_some(), "{slot:?} released twice");
        }
    }

    fn take_admitted(&mut self, plan: &StepPlan<Params>) {
        for seq in &plan.admitted {
            self.assert_unread(seq.slot, "admitted");
            let slot = &mut self.slots[seq.slot.0 as usize];
            assert!(slot.is_none(), "{:?} admitted while occupied", seq.slot);
            assert!(
                (seq.num_computed as usize) < seq.tokens.len() || seq.index > 0,
                "nothing left to compute"
            );
            *slot = Some(Slot {
                tokens: seq.tokens.clone(),
                blocks: seq.blocks.clone(),
                num_prompt: seq.num_prompt,
                params: seq.params,
            });
        }
    }

    fn assert_unread(&self, slot: SlotId, what: &str) {
        let busy = self.launched.iter().any(|l| l.slots.contains(&slot));
        assert!(!busy, "{slot:?} {what} while a step in flight uses it");
    }

    fn swap_out(&mut self, plan: &StepPlan<Params>) {
        for moved in &plan.swap_outs {
            let src = moved.src.index() * self.block_size;
            let dst = moved.dst.get() as usize * self.block_size;
            self.host[dst..dst + self.block_size]
                .copy_from_slice(&self.memory[src..src + self.block_size]);
        }
    }

    fn swap_in(&mut self, plan: &StepPlan<Params>) {
        for moved in &plan.swap_ins {
            self.swapped += 1;
            let src = moved.src.get() as usize * self.block_size;
            let dst = moved.dst.index() * self.block_size;
            for i in 0..self.block_size {
                self.assert_writable(moved.dst, i);
                self.memory[dst + i] = self.host[src + i];
            }
        }
    }

    fn copy_blocks(&mut self, plan: &StepPlan<Params>) {
        for copy in &plan.copies {
            self.copies += 1;
            let (src, dst) = (copy.src.index(), copy.dst.index());
            for i in 0..self.block_size {
                self.assert_writable(copy.dst, i);
                self.memory[dst * self.block_size + i] = self.memory[src * self.block_size + i];
            }
        }
    }

    fn assert_writable(&self, block: BlockId, offset: usize) {
        assert!(!block.is_null(), "write to the null block");
        let read = self
            .launched
            .iter()
            .any(|l| l.reads.contains(&(block, offset)));
        assert!(!read, "{block}:{offset} is written while a step reads it");
    }

    /// Computes a row and returns the digest of each of its positions.
    fn compute_row(
        &mut self,
        row: &batch_scheduler::Row,
        plan: &StepPlan<Params>,
        reads: &mut HashSet<(BlockId, usize)>,
    ) -> Vec<u64> {
        let new = &plan.new_blocks[row.new_blocks.start as usize..row.new_blocks.end as usize];
        let drafts = &plan.drafts[row.drafts.start as usize..row.drafts.end as usize];
        let slot = self.slots[row.slot.0 as usize]
            .as_mut()
            .expect("row of an empty slot");
        slot.blocks.truncate(row.table_at as usize);
        assert_eq!(slot.blocks.len(), row.table_at as usize, "gap in the table");
        slot.blocks.extend_from_slice(new);
        let (blocks, mut tokens) = (slot.blocks.clone(), slot.tokens.clone());
        assert!(row.len > 0, "empty row");
        let end = (row.start + row.len) as usize;
        assert!(end - drafts.len() <= tokens.len(), "row past the tokens");
        if !drafts.is_empty() {
            assert_eq!(end - drafts.len(), tokens.len(), "drafts not at the end");
        }
        tokens.extend_from_slice(drafts);
        let mut digests = Vec::new();
        for p in row.start..row.start + row.len {
            let at = |p: u32| {
                (
                    blocks[p as usize / self.block_size],
                    p as usize % self.block_size,
                )
            };
            let seen: Vec<u64> = (window_start(p, self.window)..p)
                .map(|q| {
                    let (block, offset) = at(q);
                    reads.insert((block, offset));
                    self.memory[block.index() * self.block_size + offset]
                })
                .collect();
            let d = digest(tokens[p as usize], p, seen.into_iter());
            let (block, offset) = at(p);
            self.assert_writable(block, offset);
            self.memory[block.index() * self.block_size + offset] = d;
            digests.push(d);
        }
        digests
    }

    fn sample_slot(
        &mut self,
        slot: SlotId,
        row: &batch_scheduler::Row,
        digests: &[u64],
        drafts: &[TokenId],
    ) -> Sampled<u64> {
        let state = self.slots[slot.0 as usize]
            .as_mut()
            .expect("sample of an empty slot");
        let mut sampled = Sampled {
            tokens: SmallVec::new(),
            extras: Vec::new(),
            error: None,
        };
        let first = row.len as usize - 1 - drafts.len();
        for (i, &d) in digests[first..].iter().enumerate() {
            let position = row.start + (first + i) as u32;
            assert_eq!(
                state.tokens.len(),
                position as usize + 1,
                "sample not at the end"
            );
            if state.params.fails_at.is_some_and(|at| position + 1 >= at) {
                sampled.error = Some("not finite".to_owned());
                // A step in flight goes on from whatever came out.
                state.tokens.push(0);
                break;
            }
            let token = sample(d, position, &state.params);
            sampled.tokens.push(token);
            sampled.extras.push(d);
            state.tokens.push(token);
            if drafts.get(i) != Some(&token) {
                break;
            }
            self.accepted += 1;
        }
        sampled
    }
}

impl ModelRunner for PagedRunner {
    type Params = Params;
    type Extra = u64;
    type Ticket = u64;
    type Error = OutOfMemory;

    fn launch(&mut self, plan: StepPlan<Params>) -> Result<u64, OutOfMemory> {
        assert_eq!(plan.step, self.next_step);
        self.next_step += 1;
        let tokens: u32 = plan.rows.iter().map(|r| r.len).sum();
        assert!(tokens > 0 && tokens as usize <= self.max_batched, "budget");
        self.take_released(&plan);
        self.take_admitted(&plan);
        self.swap_out(&plan);
        self.copy_blocks(&plan);
        self.swap_in(&plan);
        if tokens as usize > self.memory_for {
            return Err(OutOfMemory);
        }
        let mut reads = HashSet::new();
        let mut slots = HashSet::new();
        let mut prompt_extras = Vec::new();
        let mut digests = Vec::new();
        for row in &plan.rows {
            assert!(slots.insert(row.slot), "two rows of one slot");
            digests.push(self.compute_row(row, &plan, &mut reads));
            let slot = self.slots[row.slot.0 as usize].as_ref();
            let in_prompt = slot.map_or(0, |s| s.num_prompt.saturating_sub(row.start));
            let len = in_prompt.min(row.len) as usize;
            if len > 0 {
                let last = digests.last().map_or(&[][..], |d| &d[..len]);
                prompt_extras.push((row.slot, row.start, last.to_vec()));
            }
        }
        let mut samples = Vec::new();
        for s in &plan.samples {
            slots.insert(s.slot);
            let row = &plan.rows[s.row as usize];
            let drafts = &plan.drafts[row.drafts.start as usize..row.drafts.end as usize];
            samples.push(self.sample_slot(s.slot, row, &digests[s.row as usize], drafts));
        }
        self.launched.push_back(Launched {
            output: StepOutput {
                step: plan.step,
                samples,
                prompt_extras,
            },
            slots,
            reads,
        });
        Ok(plan.step)
    }

    fn is_out_of_memory(&self, OutOfMemory: &OutOfMemory) -> bool {
        true
    }

    fn collect(&mut self, step: u64) -> Result<StepOutput<u64>, OutOfMemory> {
        let launched = self.launched.pop_front().expect("nothing in flight");
        assert_eq!(launched.output.step, step, "collected out of order");
        Ok(launched.output)
    }
}
