//! Bringing the device up to a plan: slots, block tables, copies.

use std::sync::Arc;

use batch_scheduler::{AdmittedSeq, SlotId, StepPlan};
use sampler::sequence_seed;

use super::CudaRunner;
use crate::runner::SeqParams;
use crate::runner::tell::refusal;

impl CudaRunner {
    /// Brings slots, block tables, sampler and cache up to the plan. Sequences in `refused` cannot be
    /// sampled: rank 0 has looked.
    pub(super) fn apply(
        &mut self,
        plan: &mut StepPlan<Arc<SeqParams>>,
        refused: &[SlotId],
    ) -> Result<(), String> {
        for &slot in &plan.released {
            self.batch.release(slot)?;
            if let Some(sampler) = &mut self.sampler {
                sampler.release(slot.0);
            }
        }
        for seq in plan.admitted.drain(..) {
            self.admit(seq, refused)?;
        }
        let copies: Vec<(u32, u32)> = plan
            .copies
            .iter()
            .map(|copy| (copy.src.get(), copy.dst.get()))
            .collect();
        self.copy_blocks(&copies)?;
        for row in &plan.rows {
            self.batch.extend(row, &plan.new_blocks)?;
            let (at, count) = (row.table_at, row.new_blocks.len());
            if count > 0 {
                let blocks = &self.batch.get(row.slot)?.blocks()[at as usize..];
                self.ints.change_table(row.slot.0, at, blocks);
                self.flush_tables(false)?;
            }
        }
        self.flush_tables(true)
    }

    fn admit(
        &mut self,
        seq: AdmittedSeq<Arc<SeqParams>>,
        refused: &[SlotId],
    ) -> Result<(), String> {
        let (slot, params) = (seq.slot, seq.params.clone());
        let refused = match &mut self.sampler {
            _ if refused.contains(&slot) => Some("rank 0 refused it".to_owned()),
            Some(sampler) => {
                let admitted = sampler.admit(
                    slot.0,
                    params.sampling.clone(),
                    sequence_seed(params.seed, seq.index),
                    &seq.tokens,
                    seq.num_prompt as usize,
                    &params.eos_token_ids,
                );
                admitted.err().map(|e| e.to_string())
            }
            // Rank 0 looks, wherever it is sampled.
            None if self.followers.is_some() => refusal(&seq, self.model.config().vocab_size),
            None => None,
        };
        self.batch.admit(seq, refused)?;
        let blocks = self.batch.get(slot)?.blocks();
        self.ints.change_table(slot.0, 0, blocks);
        self.flush_tables(false)
    }

    /// Sends collected changes of block tables, if they are many or `now`.
    fn flush_tables(&mut self, now: bool) -> Result<(), String> {
        let width = self.limits.width;
        let room = self.uploads.blocks.device.size()[0] as usize;
        let full = self.ints.blocks.len() + width > room
            || self.ints.segments.len() >= 4 * self.config.max_num_seqs;
        if self.ints.segments.is_empty() || !(now || full) {
            return Ok(());
        }
        let text = |e: torch_ext::cuda::CudaError| e.to_string();
        self.uploads
            .segments
            .send(&self.ints.segments)
            .map_err(text)?;
        self.uploads.blocks.send(&self.ints.blocks).map_err(text)?;
        let applied = self.kernels.apply_tables(
            &self.ints.segments,
            &self.uploads.segments.device,
            &self.uploads.blocks.device,
            &self.tables,
        );
        self.ints.segments.clear();
        self.ints.blocks.clear();
        applied.map_err(|e| e.to_string())
    }
}
