//! What ranks tell each other of a step.

use std::time::Duration;

use batch_scheduler::{SlotId, StepOutput};
use sampler::TokenLogprobs;

use super::HostRunner;
use crate::distributed::{StepMessage, encode_output};
use crate::error::RunnerError;
use crate::runner::guarded_together;
use crate::runner::tell::next_output;

impl HostRunner {
    /// Takes part in a step that rank 0 tells of: this rank's share of the model. Returns the
    /// step's output, encoded, if this rank samples it.
    pub(crate) fn follow(&mut self, message: &[u8]) -> Result<Option<Vec<u8>>, RunnerError> {
        let _no_grad = tch::no_grad_guard();
        let unreadable = |what| RunnerError::Plan { step: 0, what };
        let message = StepMessage::decode(message).map_err(unreadable)?;
        let mut plan = message.plan;
        let step = plan.step;
        let contradiction = |what| RunnerError::Plan { step, what };
        for (slot, token) in message.sampled {
            let slot = self.batch.get_mut(slot).map_err(contradiction)?;
            slot.tokens.push(token);
        }
        if self.model.has_logits() {
            self.apply(&mut plan, &message.refused)
        } else {
            self.apply_tables(&mut plan, |_, seq| {
                let refused = message.refused.contains(&seq.slot);
                refused.then(|| "rank 0 refused it".to_owned())
            })
        }
        .map_err(contradiction)?;
        self.gather(&plan).map_err(contradiction)?;
        guarded_together(step, || {
            let Some(run) = self.run(&plan)? else {
                return Ok(None);
            };
            if run.hidden.is_none() {
                return Ok(None);
            }
            let output = self.output(&plan, &run);
            let output = output.map_err(|source| RunnerError::Comm { step, source })?;
            Ok(self.model.has_logits().then(|| encode_output(&output)))
        })
    }

    /// Waits for the output of a step that another rank samples.
    pub(super) fn receive(
        &mut self,
        step: u64,
        slots: &[SlotId],
    ) -> Result<StepOutput<TokenLogprobs>, RunnerError> {
        let output = next_output(self.followers.as_ref(), step, slots.len(), Duration::ZERO)?;
        self.learn(slots.iter().copied(), &output);
        Ok(output)
    }
}
