//! Log-probabilities of the tokens of prompts.

use std::ops::Range;
use std::sync::Arc;

use batch_scheduler::{SlotId, StepPlan};
use paged_kv::TokenId;
use sampler::{TokenLogprobs, prompt_logprobs};
use tch::Tensor;

use super::{SeqParams, to_host};
use crate::comm::CommError;
use crate::distributed::Followers;
use crate::input_batch::InputBatch;
use crate::model::Model;

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

/// Which logits sequences want for their prompts: for every token of a row that is followed by a
/// token of the prompt.
pub(super) fn prompt_rows(
    plan: &StepPlan<Arc<SeqParams>>,
    batch: &InputBatch,
) -> Result<Vec<PromptRows>, String> {
    let mut wanted = Vec::new();
    let mut flat = 0;
    for row in &plan.rows {
        let slot = batch.get(row.slot)?;
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

impl PromptRows {
    /// Log-probabilities from hidden states, of which this row's begin at `first`. `scratch` holds
    /// logits on the host. Ranks other than 0 call this for their part of the logits, and get no
    /// entries. On rank 0 of several, `followers` say how long a GPU is waited for.
    pub(super) fn logprobs(
        &self,
        model: &Model,
        hidden: &Tensor,
        first: i64,
        followers: Option<&Followers>,
        scratch: &mut Vec<f32>,
    ) -> Result<(SlotId, u32, Vec<TokenLogprobs>), CommError> {
        let vocab = model.config().vocab_size;
        let mut entries = Vec::with_capacity(self.next.len());
        let chunks = self.next.chunks(ROWS_AT_A_TIME);
        let mut finite = true;
        for (next, at) in chunks.zip((first..).step_by(ROWS_AT_A_TIME)) {
            // Every rank takes every turn, whatever rank 0 finds.
            let logits = model.logits(&hidden.narrow(0, at, next.len() as i64))?;
            let Some(logits) = logits.filter(|_| finite) else {
                continue;
            };
            to_host(&logits, followers, scratch)?;
            match prompt_logprobs(scratch, next, vocab, self.count) {
                Ok(some) => entries.extend(some),
                // Logits that are not finite fail the sequence once it is sampled, which no
                // entry can say; none is missing before this one.
                Err(_) => finite = false,
            }
        }
        Ok((self.slot, self.position, entries))
    }
}
