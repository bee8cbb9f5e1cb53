//! Rank 0's part in telling the others of a step, and in hearing what became of it.

use std::sync::Arc;
use std::time::Duration;

use batch_scheduler::{AdmittedSeq, StepOutput, StepPlan};
use paged_kv::TokenId;
use sampler::{SeqState, TokenLogprobs, sequence_seed};

use super::SeqParams;
use crate::comm::CommError;
use crate::distributed::{Followers, StepMessage, decode_output, unsampled};
use crate::error::RunnerError;
use crate::input_batch::InputBatch;

/// Gives the other ranks their part of a step, after rank 0's `batch` has taken in the plan's
/// sequences. `sampled` are tokens that they do not know yet, `elsewhere` says whether one of them
/// samples.
pub(super) fn tell(
    followers: &Followers,
    batch: &InputBatch,
    plan: StepPlan<Arc<SeqParams>>,
    sampled: Vec<(batch_scheduler::SlotId, TokenId)>,
    elsewhere: bool,
) -> Result<(), CommError> {
    let mut message = StepMessage {
        sampled,
        refused: Vec::new(),
        plan,
    };
    let refused = |slot| batch.get(slot).is_ok_and(|s| s.refused.is_some());
    for seq in &mut message.plan.admitted {
        if refused(seq.slot) {
            message.refused.push(seq.slot);
            // Whatever they say, nobody needs to read it.
            seq.params = unsampled(false);
        }
    }
    followers.send(message.encode(elsewhere))
}

/// On rank 0 of several an error is the group's.
pub(super) fn tell_failure<T>(
    followers: Option<&Followers>,
    step: u64,
    result: Result<T, RunnerError>,
) -> Result<T, RunnerError> {
    result.map_err(|error| match followers {
        Some(followers) => followers.failed(step, error),
        None => error,
    })
}

/// Waits for the output of a step of `samples` samples that another rank samples, without rest for
/// `busy`.
pub(super) fn next_output(
    followers: Option<&Followers>,
    step: u64,
    samples: usize,
    busy: Duration,
) -> Result<StepOutput<TokenLogprobs>, RunnerError> {
    let contradiction = |what| RunnerError::Plan { step, what };
    let outputs = followers.and_then(Followers::outputs);
    let outputs = outputs.ok_or_else(|| contradiction("no rank samples".to_owned()))?;
    let bytes = outputs.next(busy);
    let bytes = bytes.map_err(|source| RunnerError::Comm { step, source })?;
    let output = decode_output(&bytes).map_err(contradiction)?;
    match (output.step, output.samples.len()) == (step, samples) {
        true => Ok(output),
        false => Err(contradiction(format!(
            "{} samples of step {} where {samples} of this one were due",
            output.samples.len(),
            output.step,
        ))),
    }
}

/// Why the rank that samples would refuse a sequence, if it would.
pub(super) fn refusal(seq: &AdmittedSeq<Arc<SeqParams>>, vocab_size: usize) -> Option<String> {
    let params = &seq.params;
    let state = SeqState::new(
        params.sampling.clone(),
        sequence_seed(params.seed, seq.index),
        &seq.tokens,
        seq.num_prompt as usize,
        &params.eos_token_ids,
        vocab_size,
    );
    state.err().map(|e| e.to_string())
}
