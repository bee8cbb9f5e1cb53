//! From logits to tokens: on the device, and later on the host.

use batch_scheduler::{Sampled, StepOutput};
use sampler::TokenLogprobs;
use tch::{Kind, Tensor};
use torch_ext::cuda::{Readback, SampleMode};

use super::{CudaRunner, CudaTicket};
use crate::runner::outcome;

impl CudaRunner {
    /// A place on the host for a step's tokens, if this rank samples.
    pub(super) fn readback(&mut self) -> Result<Option<Readback>, String> {
        let (Some(_), tch::Device::Cuda(index)) = (&self.sampler, self.model.device()) else {
            return Ok(None);
        };
        let new = || Readback::new(self.config.max_num_seqs, Kind::Int, index);
        let place = self.readbacks.pop().map_or_else(new, Ok);
        place.map(Some).map_err(|e| e.to_string())
    }

    /// Whether [`CudaRunner::draw`] is all that the samples of a step need.
    pub(super) fn needs_no_more(&mut self, ticket: &CudaTicket) -> Result<bool, String> {
        let Some(sampler) = &mut self.sampler else {
            return Ok(false);
        };
        let needs = sampler.prepare(&host_slots(ticket));
        let needs = needs.map_err(|e| e.to_string())?;
        Ok(ticket.masks.is_empty() && needs.mode <= SampleMode::Race && needs.logprobs.is_none())
    }

    /// The end of a captured step of `rows` rows, where this rank is alone: draws of greedy rows and at a
    /// temperature, handed on. For all else that requests may ask for every step would need a graph of its
    /// own: then the captured draw gets no slots, does nothing, and [`CudaRunner::sample`] follows it.
    pub(super) fn draw(
        &self,
        rows: usize,
        logits: Option<&Tensor>,
    ) -> Result<Option<Tensor>, String> {
        let (Some(sampler), Some(logits), true) = (&self.sampler, logits, self.is_alone()) else {
            return Ok(None);
        };
        let t = &self.tensors;
        let [slots, positions] =
            [&t.sample_slots, &t.row_ends].map(|all| all.narrow(0, 0, rows as i64));
        let tokens = sampler.launch(logits, &slots, &positions, SampleMode::Race);
        let tokens = tokens.map_err(|e| e.to_string())?;
        self.kernels
            .keep_tokens(&tokens, &slots, &self.last_token, t)
            .map_err(|e| e.to_string())?;
        Ok(Some(tokens))
    }

    /// A step whose tokens [`CudaRunner::draw`] has handed on is on its way.
    pub(super) fn drawn(&self, tokens: Tensor, ticket: &mut CudaTicket) -> Result<(), String> {
        let (Some(sampler), Some(readback)) = (&self.sampler, &mut ticket.tokens) else {
            return Err("nothing samples here".to_owned());
        };
        let count = ticket.samples.len();
        readback.written(count).map_err(|e| e.to_string())?;
        let sampling = sampler.finish(tokens, None, &host_slots(ticket));
        ticket.sampling = Some(sampling.map_err(|e| e.to_string())?);
        Ok(())
    }

    /// Samples from `logits`, whose first rows are `ticket`'s; without them takes the tokens that the
    /// first rank of this stage samples.
    pub(super) fn sample(
        &mut self,
        logits: Option<&Tensor>,
        slots: &Tensor,
        positions: &Tensor,
        ticket: &mut CudaTicket,
    ) -> Result<(), String> {
        let Some(logits) = logits else {
            return self.learn_tokens(slots);
        };
        let masked = self.masked(logits, &ticket.masks)?;
        let Some(sampler) = &mut self.sampler else {
            return self.learn_tokens(slots);
        };
        let sampling = sampler
            .sample_masked(
                logits,
                masked.as_ref(),
                slots,
                positions,
                &host_slots(ticket),
            )
            .map_err(|e| e.to_string())?;
        self.share_tokens(sampling.tokens())?;
        self.kernels
            .keep_tokens(sampling.tokens(), slots, &self.last_token, &self.tensors)
            .map_err(|e| e.to_string())?;
        if let Some(readback) = &mut ticket.tokens {
            let count = ticket.samples.len();
            readback.written(count).map_err(|e| e.to_string())?;
        }
        ticket.sampling = Some(sampling);
        Ok(())
    }

    pub(super) fn finish(
        &mut self,
        ticket: CudaTicket,
    ) -> Result<StepOutput<TokenLogprobs>, String> {
        let mut samples: Vec<Sampled<TokenLogprobs>> = Vec::with_capacity(ticket.samples.len());
        if let (Some(readback), Some(sampling), Some(sampler)) =
            (ticket.tokens, ticket.sampling, &self.sampler)
        {
            let host = self.wait_for(&readback)?;
            let mut tokens = vec![0i32; ticket.samples.len()];
            let count = tokens.len();
            host.copy_data(&mut tokens, count);
            self.readbacks.push(readback);
            let results = sampler
                .results(&sampling, &tokens)
                .map_err(|e| e.to_string())?;
            for (result, refused) in results.into_iter().zip(ticket.refused) {
                samples.push(outcome(result, refused.as_deref()));
            }
        }
        Ok(StepOutput {
            step: ticket.step,
            samples,
            prompt_extras: ticket.prompt_extras,
        })
    }
}

fn host_slots(ticket: &CudaTicket) -> Vec<u32> {
    ticket.samples.iter().map(|sample| sample.slot.0).collect()
}
