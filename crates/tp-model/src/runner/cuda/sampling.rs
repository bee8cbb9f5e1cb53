//! From logits to tokens: on the device, and later on the host.

use batch_scheduler::{Sampled, StepOutput};
use sampler::TokenLogprobs;
use tch::{Kind, Tensor};
use torch_ext::cuda::Readback;

use super::{CudaRunner, CudaTicket};
use crate::runner::outcome;

impl CudaRunner {
    /// Samples from `logits`, of which the first `count` rows are real; without them takes the
    /// tokens that the first rank of this stage samples.
    pub(super) fn sample(
        &mut self,
        logits: Option<&Tensor>,
        slots: &Tensor,
        positions: &Tensor,
        count: usize,
        ticket: &mut CudaTicket,
    ) -> Result<(), String> {
        let Some(logits) = logits else {
            return self.learn_tokens(slots);
        };
        let masked = self.masked(logits, &ticket.masks)?;
        let Some(sampler) = &mut self.sampler else {
            return self.learn_tokens(slots);
        };
        let host_slots: Vec<u32> = ticket.samples.iter().map(|sample| sample.slot.0).collect();
        let sampling = sampler
            .sample_masked(logits, masked.as_ref(), slots, positions, &host_slots)
            .map_err(|e| e.to_string())?;
        self.share_tokens(sampling.tokens())?;
        let text = |e: torch_ext::cuda::CudaError| e.to_string();
        let tch::Device::Cuda(index) = self.model.device() else {
            return Err("the model left the GPU".to_owned());
        };
        let mut readback = match self.readbacks.pop() {
            Some(readback) => readback,
            None => Readback::new(self.config.max_num_seqs, Kind::Int, index).map_err(text)?,
        };
        let host = Some((&mut readback, count));
        self.kernels
            .keep_tokens(sampling.tokens(), slots, &self.last_token, host)
            .map_err(|e| e.to_string())?;
        ticket.tokens = Some(readback);
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
