//! What ranks tell each other of a step.

use std::sync::Arc;

use batch_scheduler::{AdmittedSeq, SlotId, StepOutput};
use sampler::{SeqState, TokenLogprobs, sequence_seed};

use super::HostRunner;
use crate::distributed::{Followers, StepMessage, decode_output, encode_output};
use crate::error::RunnerError;
use crate::runner::SeqParams;

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
        let Some(run) = self.run(&plan)? else {
            return Ok(None);
        };
        if run.hidden.is_none() {
            return Ok(None);
        }
        let output = self.output(&plan, &run);
        let output = output.map_err(|source| RunnerError::Comm { step, source })?;
        Ok(self.model.has_logits().then(|| encode_output(&output)))
    }

    /// Waits for the output of a step that another rank samples.
    pub(super) fn receive(
        &mut self,
        step: u64,
        slots: &[SlotId],
    ) -> Result<StepOutput<TokenLogprobs>, RunnerError> {
        let contradiction = |what| RunnerError::Plan { step, what };
        let outputs = self.followers.as_ref().and_then(Followers::outputs);
        let outputs = outputs.ok_or_else(|| contradiction("no rank samples".to_owned()))?;
        let bytes = outputs.next();
        let bytes = bytes.map_err(|source| RunnerError::Comm { step, source })?;
        let output = decode_output(&bytes).map_err(contradiction)?;
        if (output.step, output.samples.len()) != (step, slots.len()) {
            return Err(contradiction(format!(
                "{} samples of step {} where {} of this one were due",
                output.samples.len(),
                output.step,
                slots.len()
            )));
        }
        self.learn(slots.iter().copied(), &output);
        Ok(output)
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
