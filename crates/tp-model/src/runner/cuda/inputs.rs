//! What the host sends for a step: who computes what, packed for the device.

use std::sync::Arc;

use batch_scheduler::StepPlan;
use torch_ext::cuda::{ROW_INTS, RowLimits, SEGMENT_INTS};

use crate::input_batch::InputBatch;
use crate::runner::{RunnerConfig, SeqParams};

/// The integers of a step, reused from step to step.
#[derive(Debug, Default)]
pub(super) struct StepInts {
    /// Changes of block tables: slot, first entry, offset in `blocks`, length.
    pub(super) segments: Vec<i32>,
    /// Block ids that segments point to.
    pub(super) blocks: Vec<i32>,
    /// [`ROW_INTS`] for each row.
    pub(super) rows: Vec<i32>,
    /// Token ids that rows point to.
    pub(super) tokens: Vec<i32>,
    /// Tokens of each row.
    pub(super) lens: Vec<usize>,
    /// Context of each row after the step.
    pub(super) contexts: Vec<usize>,
    /// Of each of the plan's rows: flat index of its last token.
    pub(super) last: Vec<i32>,
    /// Of each of the plan's rows: position after its last token.
    pub(super) ends: Vec<i32>,
    /// Tokens in all rows.
    pub(super) num_tokens: usize,
}

impl StepInts {
    pub(super) fn clear(&mut self) {
        self.segments.clear();
        self.blocks.clear();
        self.rows.clear();
        self.tokens.clear();
        self.lens.clear();
        self.contexts.clear();
        self.last.clear();
        self.ends.clear();
        self.num_tokens = 0;
    }

    /// A slot's table becomes `blocks` from entry `at` on.
    pub(super) fn change_table(&mut self, slot: u32, at: u32, blocks: &[i32]) {
        if blocks.is_empty() {
            return;
        }
        let offset = self.blocks.len() as i32;
        self.segments
            .extend([slot as i32, at as i32, offset, blocks.len() as i32]);
        self.blocks.extend_from_slice(blocks);
    }

    /// Collects the plan's rows. A row's tokens come from the host if the sequence brought them;
    /// the one after those was sampled on the device, and is there. With `split` every token gets a
    /// row of its own, as if it were decoded.
    pub(super) fn gather(
        &mut self,
        plan: &StepPlan<Arc<SeqParams>>,
        batch: &InputBatch,
        config: &RunnerConfig,
        split: bool,
    ) -> Result<(), String> {
        for row in &plan.rows {
            let slot = batch.get(row.slot)?;
            let (start, len) = (row.start as usize, row.len as usize);
            let end = start + len;
            let (known, blocks) = (slot.tokens.len(), slot.num_blocks());
            if end > config.max_model_len || end > blocks * config.block_size {
                return Err(format!(
                    "slot {} computes tokens {start}..{end}, but has {blocks} blocks of {} and a \
                     sequence has at most {} tokens",
                    row.slot.0, config.block_size, config.max_model_len
                ));
            }
            let source = match () {
                () if len > 0 && end <= known => {
                    let at = self.tokens.len() as i32;
                    self.tokens
                        .extend(slot.tokens[start..end].iter().map(|id| *id as i32));
                    at
                }
                () if len == 1 && start >= known => -1,
                () => {
                    return Err(format!(
                        "slot {} computes tokens {start}..{end}, of which {known} came with it",
                        row.slot.0
                    ));
                }
            };
            let slot = row.slot.0 as i32;
            match split && source >= 0 {
                true => {
                    for i in 0..len {
                        self.push_row(slot, start + i, 1, source + i as i32);
                    }
                }
                false => self.push_row(slot, start, len, source),
            }
            self.last.push(self.num_tokens as i32 - 1);
            self.ends.push(end as i32);
        }
        match self.num_tokens <= config.max_num_batched_tokens {
            true => Ok(()),
            false => Err(format!(
                "{} tokens in a step of at most {}",
                self.num_tokens, config.max_num_batched_tokens
            )),
        }
    }

    pub(super) fn push_row(&mut self, slot: i32, start: usize, len: usize, source: i32) {
        let first = self.num_tokens as i32;
        self.rows
            .extend([slot, start as i32, len as i32, source, first]);
        self.lens.push(len);
        self.contexts.push(if slot < 0 { 0 } else { start + len });
        self.num_tokens += len;
    }

    /// Adds rows that lead nowhere until there are `rows`.
    pub(super) fn pad(&mut self, rows: usize) {
        while self.num_rows() < rows {
            self.push_row(-1, 0, 1, -1);
        }
    }

    pub(super) fn num_rows(&self) -> usize {
        self.rows.len() / ROW_INTS
    }

    pub(super) fn check(&self, limits: &RowLimits) -> Result<(), String> {
        debug_assert_eq!(self.segments.len() % SEGMENT_INTS, 0);
        limits.check(&self.rows)
    }
}
