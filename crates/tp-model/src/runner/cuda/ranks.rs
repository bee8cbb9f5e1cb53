//! Several GPUs: rank 0 tells the others of each step, and, with one stage, its GPU gives theirs what
//! it sampled. No host waits for that: it is a broadcast on the stream, behind the step.
//!
//! With several stages activations go from GPU to GPU on the streams, too, around the captured steps.
//! The last stage's first rank samples; its host looks from time to time whether a step is done, and
//! gives the output to rank 0, which tells the tokens in the next plan (`micro_batches` in the
//! scheduler's configuration: nobody is asked for a token that depends on one that is on its way).

use std::time::Duration;

use batch_scheduler::StepOutput;
use sampler::TokenLogprobs;
use tch::{Kind, Tensor};
use torch_ext::cuda::{ROW_INTS, Readback};

use super::{CudaRunner, CudaTicket};
use crate::distributed::{Followers, StepMessage, encode_output};
use crate::error::RunnerError;
use crate::runner::guarded;
use crate::runner::tell::next_output;

/// How long rank 0 asks for a step's output without rest.
const BUSY: Duration = Duration::from_millis(20);

impl CudaRunner {
    /// Makes this the runner of rank 0, which `followers` do as.
    pub(crate) fn lead(&mut self, followers: Followers) {
        self.followers = Some(followers);
    }

    /// The ranks that follow this one, if any do.
    pub(crate) fn followers(&self) -> Option<&Followers> {
        self.followers.as_ref()
    }

    /// Whether this is the only rank.
    pub(super) fn is_alone(&self) -> bool {
        self.model.groups().tp.world_size() == 1 && self.is_whole()
    }

    /// Whether there is one stage.
    fn is_whole(&self) -> bool {
        self.model.stage().count() == 1
    }

    /// A first exchange between stages: NCCL connects in it, which takes time and memory.
    pub(super) fn meet_stages(&self) -> Result<(), String> {
        let _waits = self.model.groups().enter();
        let received = self.receive(1)?;
        if !self.model.stage().is_last() {
            let first = received.unwrap_or_else(|| self.model.activations(1).zero_());
            self.hand_on(Some(&first))?;
        }
        let tch::Device::Cuda(index) = self.model.device() else {
            return Err("the model left the GPU".to_owned());
        };
        torch_ext::cuda::synchronize(index).map_err(|e| e.to_string())
    }

    /// What the stage before gives for `tokens` tokens; `None` on the first.
    pub(super) fn receive(&self, tokens: i64) -> Result<Option<Tensor>, String> {
        self.model.receive(tokens).map_err(|e| e.to_string())
    }

    /// Gives this stage's output to the next one.
    pub(super) fn hand_on(&self, output: Option<&Tensor>) -> Result<(), String> {
        let output = output.ok_or("a stage has no output")?;
        self.model.hand_on(output).map_err(|e| e.to_string())
    }

    /// Fails if the first of several stages is to embed a token that it was not told. The GPU would
    /// take any.
    pub(super) fn check_tokens(&self) -> Result<(), String> {
        if self.is_whole() || !self.model.stage().is_first() {
            return Ok(());
        }
        let rows = self.ints.rows.as_chunks::<ROW_INTS>().0;
        match rows
            .iter()
            .find(|[slot, _, _, source, _]| *slot >= 0 && *source < 0)
        {
            None => Ok(()),
            Some([slot, start, ..]) => Err(format!(
                "slot {slot} computes token {start}, which was not sampled yet"
            )),
        }
    }

    /// Whether outputs of launched steps are yet to be given to rank 0.
    pub(crate) fn owes(&self) -> bool {
        !self.owed.is_empty()
    }

    /// The output of the oldest of them, encoded, if it is there. Does not wait.
    pub(crate) fn finished(&mut self) -> Result<Option<Vec<u8>>, RunnerError> {
        let Some(ticket) = self.owed.front() else {
            return Ok(None);
        };
        let step = ticket.step;
        let device = |what| RunnerError::Device { step, what };
        if let Some(readback) = &ticket.tokens
            && !readback.is_done().map_err(|e| device(e.to_string()))?
        {
            return Ok(None);
        }
        let Some(ticket) = self.owed.pop_front() else {
            return Ok(None);
        };
        let groups = self.model.groups();
        let sound = groups.tp.check().and_then(|()| groups.pp.check());
        sound.map_err(|source| RunnerError::Comm { step, source })?;
        let output = guarded(step, || self.finish(ticket).map_err(device))?;
        Ok(Some(encode_output(&output)))
    }

    /// On rank 0: waits for the output of a step that another rank samples.
    pub(super) fn hear(
        &mut self,
        ticket: &CudaTicket,
    ) -> Result<StepOutput<TokenLogprobs>, RunnerError> {
        let (followers, samples) = (self.followers.as_ref(), ticket.samples.len());
        let output = next_output(followers, ticket.step, samples, BUSY)?;
        for (sample, sampled) in ticket.samples.iter().zip(&output.samples) {
            // A slot that holds nothing was reported with its sample.
            if let Ok(sequence) = self.batch.get_mut(sample.slot) {
                sequence.tokens.extend(&sampled.tokens);
                let told = sampled.tokens.iter().map(|token| (sample.slot, *token));
                self.untold.extend(told);
            }
        }
        Ok(output)
    }

    /// Takes part in a step that rank 0 tells of. Returns when it is launched.
    pub(crate) fn follow(&mut self, message: &[u8]) -> Result<(), RunnerError> {
        let unreadable = |what| RunnerError::Plan { step: 0, what };
        let message = StepMessage::decode(message).map_err(unreadable)?;
        let step = message.plan.step;
        let _no_grad = tch::no_grad_guard();
        guarded(step, || {
            self.stream
                .make_current()
                .map_err(|e| RunnerError::Device {
                    step,
                    what: e.to_string(),
                })?;
            for (slot, token) in message.sampled {
                let slot = self.batch.get_mut(slot);
                let slot = slot.map_err(|what| RunnerError::Plan { step, what })?;
                slot.tokens.push(token);
            }
            let computes = !message.plan.rows.is_empty();
            let ticket = self.step(message.plan, &message.refused)?;
            if computes && self.model.has_logits() {
                self.owed.push_back(ticket);
            }
            Ok(())
        })
    }

    /// Gives the other ranks the tokens that this one sampled.
    pub(super) fn share_tokens(&self, tokens: &Tensor) -> Result<(), String> {
        // With several stages they go by the hosts.
        if self.is_alone() || !self.is_whole() {
            return Ok(());
        }
        let told = self.model.groups().tp.broadcast(tokens.shallow_clone(), 0);
        told.map(|_| ()).map_err(|e| e.to_string())
    }

    /// Takes the tokens that rank 0 sampled for rows of these slots (int32 `[rows]` on the device).
    pub(super) fn learn_tokens(&self, slots: &Tensor) -> Result<(), String> {
        if !self.is_whole() {
            return Ok(());
        }
        let like = Tensor::empty(slots.size(), (Kind::Int, self.model.device()));
        let tokens = self.model.groups().tp.broadcast(like, 0);
        let tokens = tokens.map_err(|e| e.to_string())?;
        self.kernels
            .keep_tokens(&tokens, slots, &self.last_token, &self.tensors)
            .map_err(|e| e.to_string())
    }

    /// Waits for a step's tokens; with other ranks no longer than the group's timeout, since the
    /// GPU waits for theirs.
    pub(super) fn wait_for(&self, readback: &Readback) -> Result<Tensor, String> {
        let text = |e: torch_ext::cuda::CudaError| e.to_string();
        let Some(followers) = &self.followers else {
            return readback.wait().map_err(text);
        };
        let waited = followers.wait_for_gpus(|| readback.is_done().map_err(text));
        waited.map_err(|e| e.what)?;
        self.model.groups().tp.check().map_err(|e| e.to_string())?;
        readback.wait().map_err(text)
    }
}
