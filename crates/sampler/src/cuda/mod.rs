//! The batched sampler on an NVIDIA GPU, as kernels of `torch-ext`.
//!
//! Everything that sampling needs of a sequence lives on the device, output tokens included: a step
//! needs no token of the step before on the host, whatever its parameters. Tokens are those of
//! [`BatchSampler`](crate::BatchSampler): processors work in float32 by the same operations, noise
//! and scores that decide in float64. Only the sums of top-p and logarithms may round differently,
//! so only scores or nucleus borders that agree to 11 digits can differ.

use std::sync::Arc;

use tch::{Device, Kind, Tensor};
use torch_ext::Error;
use torch_ext::cuda::{Kernels, Readback, SampleFailure, SampleMode, SampleSlot, SampleState};

use crate::batch::SampleResult;
use crate::error::{AdmitError, SampleError};
use crate::logprobs::TokenLogprobs;
use crate::params::{MAX_LOGIT_BIAS, SamplingParams};
use crate::state::check_sequence;

/// Most log-probabilities beside the sampled token's that a request can have.
pub const MAX_LOGPROBS: u32 = 1024;

/// Samples batches of rows on a GPU. Sequences live in slots; a call names the slot of each row.
///
/// A step is [`CudaSampler::sample`]; or, where the kernels are part of a captured graph,
/// [`CudaSampler::prepare`] before each replay and [`CudaSampler::launch`] inside of it.
#[derive(Debug)]
pub struct CudaSampler {
    kernels: Arc<Kernels>,
    state: SampleState,
    /// What a batch with a slot needs; `None` if it is free.
    needs: Vec<Option<Needs>>,
}

/// What a batch must do for some of its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Needs {
    /// Which kernels.
    pub mode: SampleMode,
    /// Log-probabilities beside the sampled token's; `None` if not even that.
    pub logprobs: Option<u32>,
}

impl Needs {
    /// What the least demanding batch needs.
    pub const LEAST: Self = Self {
        mode: SampleMode::Greedy,
        logprobs: None,
    };

    fn and(self, other: Self) -> Self {
        Self {
            mode: self.mode.max(other.mode),
            logprobs: self.logprobs.max(other.logprobs),
        }
    }
}

/// Sampled rows whose results are still on the device.
#[derive(Debug)]
pub struct Sampling {
    tokens: Tensor,
    rows: Vec<(u32, Option<u32>)>,
    logprobs: Option<(Readback, usize)>,
}

impl Sampling {
    /// int32 `[rows]` on the device: sampled tokens, or negative codes that
    /// [`CudaSampler::results`] understands.
    pub fn tokens(&self) -> &Tensor {
        &self.tokens
    }
}

impl CudaSampler {
    /// Room for `max_slots` sequences, and for batches of as many rows of `vocab_size` logits.
    pub fn new(kernels: Arc<Kernels>, vocab_size: usize, max_slots: usize) -> Result<Self, Error> {
        Ok(Self {
            state: SampleState::new(&kernels, vocab_size, max_slots)?,
            kernels,
            needs: vec![None; max_slots],
        })
    }

    /// Puts a sequence into a free slot; see [`SeqState::new`](crate::SeqState::new) for the
    /// arguments. Reaches the device with the next [`CudaSampler::prepare`] or `sample`.
    ///
    /// # Errors
    /// As on the CPU, and [`AdmitError::Unsupported`] for more than [`MAX_LOGPROBS`]
    /// log-probabilities and for very many stop tokens or bad words.
    pub fn admit(
        &mut self,
        slot: u32,
        params: Arc<SamplingParams>,
        seed: u64,
        tokens: &[u32],
        num_prompt: usize,
        stop_ids_for_min_tokens: &[u32],
    ) -> Result<(), AdmitError> {
        if self.needs(slot).is_some() {
            return Err(AdmitError::SlotTaken { slot });
        }
        let vocab_size = self.state.vocab_size();
        check_sequence(
            &params,
            tokens,
            num_prompt,
            stop_ids_for_min_tokens,
            vocab_size,
        )?;
        let entries = |n| u32::try_from(n).unwrap_or(u32::MAX).min(vocab_size as u32);
        let logprobs = params.logprobs.map(entries);
        if let Some(n) = logprobs.filter(|&n| n > MAX_LOGPROBS) {
            return Err(AdmitError::Unsupported {
                what: format!("logprobs must be at most {MAX_LOGPROBS} on a GPU, got {n}"),
            });
        }
        let clamp =
            |(&token, &bias): (&u32, &f32)| (token, bias.clamp(-MAX_LOGIT_BIAS, MAX_LOGIT_BIAS));
        let bias: Vec<(u32, f32)> = params.logit_bias.iter().map(clamp).collect();
        let stops = [stop_ids_for_min_tokens, &params.stop_token_ids].concat();
        let sequence = SampleSlot {
            seed,
            temperature: params.effective_temperature(),
            top_k: params.top_k,
            top_p: params.top_p,
            min_p: params.min_p,
            repetition_penalty: params.repetition_penalty,
            frequency_penalty: params.frequency_penalty,
            presence_penalty: params.presence_penalty,
            allowed: params.allowed_token_ids.as_deref(),
            bias: &bias,
            banned: &params.bad_token_ids,
            stops: &stops,
            min_tokens: params.min_tokens,
            bad_words: &params.bad_words_token_ids,
            logprobs,
            tokens,
            num_prompt,
        };
        let unsupported = |e: Error| AdmitError::Unsupported {
            what: e.to_string(),
        };
        self.state.admit(slot, &sequence).map_err(unsupported)?;
        let by_k = usize::try_from(params.top_k).is_ok_and(|k| (1..vocab_size).contains(&k));
        let mode = match () {
            () if params.is_greedy() => SampleMode::Greedy,
            () if params.top_p < 1.0 && !by_k => SampleMode::Nucleus,
            () if by_k || params.min_p > 0.0 => SampleMode::Filter,
            () => SampleMode::Race,
        };
        self.needs[slot as usize] = Some(Needs { mode, logprobs });
        Ok(())
    }

    /// Frees a slot. Freeing a free one does nothing; rows in flight stay readable.
    pub fn release(&mut self, slot: u32) {
        if let Some(needs) = self.needs.get_mut(slot as usize)
            && needs.take().is_some()
        {
            self.state.release(slot);
        }
    }

    fn needs(&self, slot: u32) -> Option<Needs> {
        self.needs.get(slot as usize).copied().flatten()
    }

    /// Brings the device up to date (one copy if anything changed), and says what a batch with
    /// these slots needs. To be called before a captured [`CudaSampler::launch`] is replayed.
    pub fn prepare(&mut self, slots: &[u32]) -> Result<Needs, Error> {
        self.state.flush(&self.kernels)?;
        let needs = slots.iter().filter_map(|&slot| self.needs(slot));
        Ok(needs.fold(Needs::LEAST, Needs::and))
    }

    /// The kernels of a step, for a batch that needs no more than `mode`; see
    /// [`Kernels::sample`]. May be captured.
    pub fn launch(
        &self,
        logits: &Tensor,
        slots: &Tensor,
        positions: &Tensor,
        mode: SampleMode,
    ) -> Result<Tensor, Error> {
        self.kernels
            .sample(&self.state, logits, slots, positions, mode)
    }

    /// The kernels for log-probabilities, after [`CudaSampler::launch`] gave `tokens`, for a batch
    /// that needs no more than `needs`; see [`Kernels::sample_logprobs`], whose result
    /// [`CudaSampler::finish`] takes. May be captured.
    pub fn logprobs(
        &self,
        logits: &Tensor,
        slots: &Tensor,
        positions: &Tensor,
        tokens: &Tensor,
        needs: Needs,
    ) -> Result<Option<Tensor>, Error> {
        let Some(width) = needs.logprobs else {
            return Ok(None);
        };
        let width = width as usize;
        let state = &self.state;
        self.kernels
            .sample_logprobs(state, logits, slots, positions, tokens, width)
            .map(Some)
    }

    /// Asks for every kernel that a batch may need, in a rehearsal ([`Kernels::rehearse`]). Arguments
    /// as for [`CudaSampler::sample`].
    pub fn rehearse(
        &self,
        logits: &Tensor,
        slots: &Tensor,
        positions: &Tensor,
    ) -> Result<(), Error> {
        self.state.rehearse(&self.kernels)?;
        for mode in [
            SampleMode::Greedy,
            SampleMode::Race,
            SampleMode::Filter,
            SampleMode::Nucleus,
        ] {
            let tokens = self.launch(logits, slots, positions, mode)?;
            let logprobs = Some(1);
            self.logprobs(logits, slots, positions, &tokens, Needs { mode, logprobs })?;
        }
        Ok(())
    }

    /// Starts the way back to the host of what [`CudaSampler::launch`] and
    /// [`CudaSampler::logprobs`] made. `host_slots` are the slots of the first rows; those after
    /// them are padding.
    pub fn finish(
        &self,
        tokens: Tensor,
        logprobs: Option<Tensor>,
        host_slots: &[u32],
    ) -> Result<Sampling, Error> {
        let wanted = |&slot: &u32| (slot, self.needs(slot).and_then(|needs| needs.logprobs));
        let logprobs = match logprobs {
            None => None,
            Some(packed) => {
                let Device::Cuda(index) = packed.device() else {
                    unreachable!("kernels run on a GPU");
                };
                let width = (packed.size()[1] as usize - 2) / 2;
                let mut readback = Readback::new(packed.numel(), Kind::Int, index)?;
                readback.start(&packed)?;
                Some((readback, width))
            }
        };
        Ok(Sampling {
            tokens,
            rows: host_slots.iter().map(wanted).collect(),
            logprobs,
        })
    }

    /// Samples a token for each row and appends it to the row's sequence, waiting for nothing.
    ///
    /// * `logits`: bf16, fp16 or float32 `[rows, vocab_size]`.
    /// * `slots`: int32 `[rows]` on the device; negative for padding.
    /// * `positions`: int32 `[rows]` on the device: how many tokens each sequence has.
    /// * `host_slots`: the slots of the first rows, as the device will see them; no slot twice.
    pub fn sample(
        &mut self,
        logits: &Tensor,
        slots: &Tensor,
        positions: &Tensor,
        host_slots: &[u32],
    ) -> Result<Sampling, Error> {
        self.sample_masked(logits, None, slots, positions, host_slots)
    }

    /// As [`CudaSampler::sample`], where tokens are drawn from `masked`, if there is such a copy of
    /// `logits` ([`masked_logits`](crate::torch::masked_logits)). Log-probabilities are those of
    /// `logits` all the same.
    pub fn sample_masked(
        &mut self,
        logits: &Tensor,
        masked: Option<&Tensor>,
        slots: &Tensor,
        positions: &Tensor,
        host_slots: &[u32],
    ) -> Result<Sampling, Error> {
        let needs = self.prepare(host_slots)?;
        let drawn_from = masked.unwrap_or(logits);
        let tokens = self.launch(drawn_from, slots, positions, needs.mode)?;
        let logprobs = self.logprobs(logits, slots, positions, &tokens, needs)?;
        self.finish(tokens, logprobs, host_slots)
    }

    /// The results of a sampling, from its tokens on the host. Waits for its log-probabilities.
    pub fn results(&self, sampling: &Sampling, tokens: &[i32]) -> Result<Vec<SampleResult>, Error> {
        let (packed, width) = match &sampling.logprobs {
            None => (Vec::new(), 0),
            Some((readback, width)) => {
                let host = readback.wait()?;
                let mut packed = vec![0i32; host.numel()];
                let len = packed.len();
                host.copy_data(&mut packed, len);
                (packed, *width)
            }
        };
        let stride = 2 + 2 * width;
        let result = |(at, (&code, &(slot, wanted))): (usize, (&i32, &(u32, Option<u32>)))| {
            let token = SampleFailure::of(code).map_err(|failure| match failure {
                SampleFailure::NotFinite(token) => SampleError::NotFinite { token },
                SampleFailure::AllMasked => SampleError::AllMasked,
                SampleFailure::EmptySlot | SampleFailure::Padding => {
                    SampleError::EmptySlot { slot }
                }
            })?;
            let logprobs = wanted
                .filter(|_| stride > 2 || !packed.is_empty())
                .map(|count| {
                    let row = &packed[at * stride..(at + 1) * stride];
                    let float = |bits: i32| f32::from_bits(bits as u32);
                    let entry = |i: usize| (row[2 + i] as u32, float(row[2 + width + i]));
                    TokenLogprobs {
                        token,
                        logprob: float(row[0]),
                        rank: row[1] as u32,
                        top: (0..width.min(count as usize)).map(entry).collect(),
                    }
                });
            Ok((token, logprobs))
        };
        let rows = tokens.iter().zip(&sampling.rows).enumerate();
        Ok(rows.map(|row| result(row).into()).collect())
    }
}
