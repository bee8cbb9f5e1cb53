//! Log-probabilities of the tokens of prompts.

use std::ops::Range;
use std::sync::Arc;

use batch_scheduler::{SlotId, StepPlan};
use paged_kv::TokenId;
use sampler::{TokenLogprobs, prompt_logprobs};
use tch::Tensor;

use super::{HostRunner, to_host};
use crate::runner::SeqParams;

/// Rows of logits that exist at a time: a whole prompt's would take gigabytes.
const ROWS_AT_A_TIME: usize = 64;

/// The part of one row whose next tokens belong to the prompt.
pub(super) struct PromptRows {
    /// Flat indices of the tokens whose logits are wanted.
    pub(super) rows: Range<usize>,
    slot: SlotId,
    /// Position of the first predicted token.
    position: u32,
    /// The predicted tokens.
    next: Vec<TokenId>,
    count: i32,
}

impl HostRunner {
    /// Which logits sequences want for their prompts: for every token of a row that is followed
    /// by a token of the prompt.
    pub(super) fn prompt_rows(
        &self,
        plan: &StepPlan<Arc<SeqParams>>,
    ) -> Result<Vec<PromptRows>, String> {
        let mut wanted = Vec::new();
        let mut flat = 0;
        for row in &plan.rows {
            let slot = self.batch.get(row.slot)?;
            let (start, len) = (row.start as usize, row.len as usize);
            let end = (start + len).min(slot.num_prompt.saturating_sub(1));
            if let Some(count) = slot.params.sampling.prompt_logprobs
                && start < end
                && slot.refused.is_none()
            {
                wanted.push(PromptRows {
                    rows: flat..flat + (end - start),
                    slot: row.slot,
                    position: row.start + 1,
                    next: slot.tokens[start + 1..end + 1].to_vec(),
                    count,
                });
            }
            flat += len;
        }
        Ok(wanted)
    }

    /// Log-probabilities from hidden states, of which those of the first wanted row stand at
    /// `first` and the others follow.
    pub(super) fn prompt_extras(
        &mut self,
        wanted: &[PromptRows],
        hidden: &Tensor,
        mut first: i64,
    ) -> Vec<(SlotId, u32, Vec<TokenLogprobs>)> {
        let vocab = self.model.config().vocab_size;
        let mut extras = Vec::with_capacity(wanted.len());
        for want in wanted {
            let mut entries = Vec::with_capacity(want.next.len());
            let chunks = want.next.chunks(ROWS_AT_A_TIME);
            for (next, at) in chunks.zip((first..).step_by(ROWS_AT_A_TIME)) {
                let logits = self.model.logits(&hidden.narrow(0, at, next.len() as i64));
                to_host(&logits, &mut self.logits);
                match prompt_logprobs(&self.logits, next, vocab, want.count) {
                    Ok(some) => entries.extend(some),
                    // Logits that are not finite fail the sequence once it is sampled, which no
                    // entry can say; none is missing before this one.
                    Err(_) => break,
                }
            }
            first += want.next.len() as i64;
            extras.push((want.slot, want.position, entries));
        }
        extras
    }
}
