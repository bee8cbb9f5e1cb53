//! A step under construction, and what is remembered of it while it is in flight.

use paged_kv::{BlockTable, KvAllocator};

use crate::plan::{AdmittedSeq, Row, SampleRow, SlotId, StepPlan};
use crate::scheduler::Scheduler;
use crate::sequence::Seq;
use crate::stats::StepStats;

/// Of prompts that wait, how many filled steps' worth are spread over steps.
const FILLED_STEPS: usize = 12;
/// Of a filled step's tokens, one in how many decodes, at least and less than.
const FEWEST_DECODE: usize = 12;
const MANY_DECODE: usize = 4;

/// What `apply` must know of a plan: the plan itself went to the runner.
#[derive(Default)]
pub(super) struct Record {
    pub(super) step: u64,
    pub(super) rows: Vec<RowRecord>,
    pub(super) samples: Vec<SampleRecord>,
}

#[derive(Clone, Copy)]
pub(super) struct RowRecord {
    pub(super) key: u32,
    /// Tokens computed after this row, drafts left out.
    pub(super) end: u32,
    pub(super) drafts: u32,
    /// Whether the sequence samples from it.
    pub(super) sampled: bool,
}

#[derive(Clone, Copy)]
pub(super) struct SampleRecord {
    pub(super) key: u32,
    pub(super) row: u32,
}

/// Buffers that wait for their next step.
pub(super) struct Spares<P> {
    pub(super) records: Vec<Record>,
    pub(super) plans: Vec<StepPlan<P>>,
}

impl<P> Default for Spares<P> {
    fn default() -> Self {
        Self {
            records: Vec::new(),
            plans: Vec::new(),
        }
    }
}

/// A step under construction.
pub(super) struct Draft<P> {
    pub(super) plan: StepPlan<P>,
    pub(super) record: Record,
    /// Tokens the step may still compute.
    pub(super) budget: usize,
    /// Of these, tokens of prompts.
    pub(super) prompt_budget: usize,
    /// Sequences that may still sample, those aside that fork.
    pub(super) samples_left: usize,
    pub(super) stats: StepStats,
    /// Sequences that fork because a row of this step completes their prompt, and that row.
    pub(super) forking: Vec<(u32, u32)>,
}

impl<P: Clone> Draft<P> {
    /// Adds a row of `len` tokens, `drafts` of them drafts, and its sample if nothing of the
    /// sequence is left to compute. The table is extended already, from entry `table_at` on.
    #[inline(always)]
    pub(super) fn push_row(
        &mut self,
        key: u32,
        seq: &mut Seq<P>,
        table_at: u32,
        len: u32,
        drafts: u32,
    ) {
        if !seq.announced {
            self.announce(seq);
        }
        let plan = &mut self.plan;
        let blocks_from = plan.new_blocks.len() as u32;
        let blocks = seq.table.as_ref().map_or(&[][..], BlockTable::blocks);
        if (table_at as usize) < blocks.len() {
            plan.new_blocks
                .extend_from_slice(&blocks[table_at as usize..]);
        }
        let drafts_from = plan.drafts.len() as u32;
        if let Some(proposed) = &seq.drafts
            && drafts > 0
        {
            plan.drafts
                .extend_from_slice(&proposed.0[..drafts as usize]);
            seq.speculating = true;
        }
        let row = plan.rows.len() as u32;
        plan.rows.push(Row {
            slot: SlotId(seq.slot),
            start: seq.computed,
            len: len + drafts,
            table_at,
            new_blocks: blocks_from..plan.new_blocks.len() as u32,
            drafts: drafts_from..plan.drafts.len() as u32,
        });
        let wanted = seq.wanted();
        let computes = (len + drafts) as usize;
        match seq.decodes() {
            true => self.stats.decode_tokens += computes,
            false => {
                self.stats.prefill_tokens += computes;
                self.prompt_budget = self.prompt_budget.saturating_sub(computes);
            }
        }
        self.budget -= computes;
        seq.computed += len;
        seq.in_flight += 1;
        let sampled = seq.computed == wanted;
        self.record.rows.push(RowRecord {
            key,
            end: seq.computed,
            drafts,
            sampled,
        });
        if sampled {
            if !seq.fork.is_empty() {
                self.forking.push((key, row));
            }
            self.push_sample(key, seq, row);
        }
    }

    /// Tells the runner of a sequence that was given its slot between steps.
    #[cold]
    fn announce(&mut self, seq: &mut Seq<P>) {
        seq.announced = true;
        let blocks = seq.table.as_ref().map_or(&[][..], BlockTable::blocks);
        self.plan.admitted.push(AdmittedSeq {
            slot: SlotId(seq.slot),
            tokens: seq.tokens.first(seq.tokens.len(), 0),
            num_prompt: seq.num_prompt,
            num_computed: seq.computed,
            blocks: blocks.to_vec(),
            index: seq.index,
            params: seq.params.clone(),
        });
    }

    #[inline]
    pub(super) fn push_sample(&mut self, key: u32, seq: &mut Seq<P>, row: u32) {
        seq.sampling += 1;
        self.samples_left = self.samples_left.saturating_sub(1);
        self.plan.samples.push(SampleRow {
            slot: SlotId(seq.slot),
            row,
        });
        self.record.samples.push(SampleRecord { key, row });
    }
}

impl<K: KvAllocator, P: Clone> Scheduler<K, P> {
    /// Plans the next step. `None` if there is nothing to compute, or nothing until a step in
    /// flight is applied (the most steps are in flight, or running sequences wait for its result
    /// or its blocks): [`steps_in_flight`](Self::steps_in_flight) tells the two apart.
    ///
    /// Running sequences come first, in the order of the policy. Then, unless one of them was
    /// preempted or found no room, waiting ones are admitted while slots, blocks and the token
    /// budget last; where the first of them does not fit, nobody passes it.
    pub fn schedule(&mut self) -> Option<StepPlan<P>> {
        if self.in_flight.len() == self.config.max_steps_in_flight
            || (self.running.is_empty() && self.waiting.len() == 0)
        {
            return None;
        }
        let mut draft = self.begin();
        let all_served = self.schedule_running(&mut draft);
        if all_served {
            self.admit_waiting(&mut draft);
        }
        // Last, so that the samples of a row's own sequences stand in the order of the rows.
        self.fork_completed(&mut draft);
        self.seal(draft)
    }

    /// Gives the buffers of a plan back, to be used for a later one. Optional.
    pub fn recycle(&mut self, plan: StepPlan<P>) {
        if self.spares.plans.len() <= self.config.max_steps_in_flight {
            self.spares.plans.push(plan);
        }
    }

    fn begin(&mut self) -> Draft<P> {
        let mut plan = self.spares.plans.pop().unwrap_or_else(|| StepPlan {
            rows: Vec::with_capacity(self.running.len()),
            samples: Vec::with_capacity(self.running.len()),
            ..StepPlan::default()
        });
        plan.step = self.next_step;
        plan.released.clear();
        plan.admitted.clear();
        plan.swap_outs.clear();
        plan.copies.clear();
        plan.swap_ins.clear();
        plan.new_blocks.clear();
        plan.drafts.clear();
        plan.rows.clear();
        plan.samples.clear();
        plan.masks.clear();
        let mut record = self.spares.records.pop().unwrap_or_default();
        record.step = self.next_step;
        record.rows.clear();
        record.samples.clear();
        Draft {
            plan,
            record,
            budget: self.token_budget,
            prompt_budget: self.prompts_beside_decoding(),
            samples_left: self.share_of_samples(),
            stats: StepStats::default(),
            forking: Vec::new(),
        }
    }

    /// How many tokens of prompts the next step may take. While some sequences decode, a step's time goes into reading
    /// the weights: prompts that fill it up cost little, and a long step would cost everyone who decodes. Where very few
    /// decode, hardly anyone is spared by that, and where many do, nothing is left to fill. Of what more prompts wait than
    /// fill the next steps, all is computed at once, or the last of them would wait too long.
    fn prompts_beside_decoding(&self) -> usize {
        let whole = self.config.mixed_step_tokens;
        if whole == 0 || !self.config.enable_chunked_prefill {
            return usize::MAX;
        }
        // Steps that share out the sequences.
        let steps = match self.config.micro_batches {
            true => self.config.max_steps_in_flight,
            false => 1,
        };
        let (mut decoding, mut left) = (0, 0);
        for &key in &self.running {
            let seq = &self.seqs[key];
            match seq.decodes() {
                // Its last token may be in flight.
                true => decoding += usize::from(seq.sampling == 0 || seq.wanted() < seq.limit),
                false => left += seq.wanted().saturating_sub(seq.computed) as usize,
            }
            if MANY_DECODE * decoding >= whole * steps {
                return usize::MAX;
            }
        }
        if decoding < whole.div_ceil(FEWEST_DECODE) * steps {
            return usize::MAX;
        }
        let waiting = self.waiting.len().max(1);
        left += self.waiting.tokens() / waiting * self.entering();
        let room = whole - decoding.div_ceil(steps);
        room.max(left.saturating_sub(FILLED_STEPS * room))
    }

    /// How many sequences a step may sample.
    fn share_of_samples(&self) -> usize {
        if !self.config.micro_batches {
            return usize::MAX;
        }
        let sequences = self.running.len() + self.entering();
        sequences.div_ceil(self.config.max_steps_in_flight).max(1)
    }

    /// How many sequences wait that a step may admit: none where the first of them was turned away.
    fn entering(&self) -> usize {
        match self.turned_away {
            None => self.waiting.len().min(self.free_slots.len()),
            Some(_) => 0,
        }
    }

    fn seal(&mut self, mut draft: Draft<P>) -> Option<StepPlan<P>> {
        self.totals.preemptions += draft.stats.preemptions as u64;
        if draft.plan.rows.is_empty() {
            self.spares.records.push(draft.record);
            self.recycle(draft.plan);
            return None;
        }
        std::mem::swap(&mut draft.plan.released, &mut self.released);
        std::mem::swap(&mut draft.plan.swap_outs, &mut self.swap_outs);
        draft.stats.swapped_out_blocks = draft.plan.swap_outs.len();
        draft.stats.swapped_in_blocks = draft.plan.swap_ins.len();
        draft.stats.step = self.next_step;
        draft.stats.running = self.running.len();
        draft.stats.waiting = self.waiting.len();
        self.totals.add(&draft.stats);
        self.last_step = draft.stats;
        self.next_step += 1;
        self.in_flight.push_back(draft.record);
        Some(draft.plan)
    }
}
