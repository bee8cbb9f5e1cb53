//! Rank 0's part in telling the others of a step.

use std::sync::Arc;

use batch_scheduler::StepPlan;
use paged_kv::TokenId;

use super::SeqParams;
use crate::comm::CommError;
use crate::distributed::{Followers, StepMessage, unsampled};
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
