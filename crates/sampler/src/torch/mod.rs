//! The batched sampler on tensors of any device.
//!
//! It gives the tokens of [`BatchSampler`](crate::BatchSampler): logits are processed in float32 by
//! the same operations in the same order, and from temperature on both work in float64 with the
//! same noise. Only sums (top-p) and logarithms may round differently, by parts in 1e15, so only
//! scores or nucleus borders that close can differ.

mod draw;
mod edits;
mod logprobs;
mod masks;
mod noise;

use std::sync::Arc;

use tch::{Device, Kind, TchError, Tensor};

use self::draw::draw;
use self::edits::{Edits, upload};
use self::logprobs::DeviceLogprobs;
pub use self::masks::masked_logits;
use crate::batch::{SampleResult, distinct_prefix};
use crate::error::{AdmitError, SampleError};
use crate::params::SamplingParams;
use crate::slots::Slots;
use crate::state::SeqState;

/// Samples batches of rows on a device. Used like [`BatchSampler`](crate::BatchSampler); and for
/// overlap, [`TorchSampler::launch`] and [`TorchSampler::collect`] are the two halves of
/// [`TorchSampler::sample`].
#[derive(Debug)]
pub struct TorchSampler {
    slots: Slots,
}

/// Sampled rows whose tokens are still on the device.
pub struct Pending {
    /// The sampled tokens, int64 `[rows]`, on the logits' device; of no meaning in rows that turn
    /// out to be errors.
    pub ids: Tensor,
    /// int64 `[2, rows]`: first token that is not usable or -1; whether all are masked.
    status: Tensor,
    rows: Vec<PendingRow>,
    logprobs: Option<DeviceLogprobs>,
}

struct PendingRow {
    slot: u32,
    /// Which admission to the slot this row belongs to.
    admission: u64,
    /// How many log-probabilities were asked for.
    logprobs: Option<usize>,
    error: Option<SampleError>,
}

impl TorchSampler {
    /// A sampler for rows of `vocab_size` logits.
    pub fn new(vocab_size: usize) -> Self {
        Self {
            slots: Slots::new(vocab_size),
        }
    }

    /// Puts a sequence into a free slot; see [`SeqState::new`] for the arguments.
    pub fn admit(
        &mut self,
        slot: u32,
        params: Arc<SamplingParams>,
        seed: u64,
        tokens: &[u32],
        num_prompt: usize,
        stop_ids_for_min_tokens: &[u32],
    ) -> Result<(), AdmitError> {
        self.slots.admit(
            slot,
            params,
            seed,
            tokens,
            num_prompt,
            stop_ids_for_min_tokens,
        )
    }

    /// Frees a slot. Freeing a free one does nothing; rows in flight are forgotten.
    pub fn release(&mut self, slot: u32) {
        self.slots.release(slot);
    }

    /// The state of the sequence in a slot.
    pub fn state(&self, slot: u32) -> Option<&SeqState> {
        self.slots.get(slot)
    }

    /// Samples a token for each row of `logits` (any float type, `[slots.len(), vocab_size]`) and
    /// appends it to the row's sequence. Returns the tokens on the device too, int64 `[rows]`. A
    /// slot that comes several times is sampled as if by several calls.
    ///
    /// # Errors
    /// Only what stops the whole batch: the device failed, or `logits` has another shape.
    pub fn sample(
        &mut self,
        logits: &Tensor,
        slots: &[u32],
    ) -> Result<(Vec<SampleResult>, Tensor), TchError> {
        self.check_shape(logits, slots)?;
        let mut results = Vec::with_capacity(slots.len());
        let mut ids = Vec::new();
        while results.len() < slots.len() {
            let start = results.len();
            let wave = &slots[start..][..distinct_prefix(&slots[start..])];
            let rows = logits.f_narrow(0, start as i64, wave.len() as i64)?;
            let pending = self.launch(&rows, wave)?;
            ids.push(pending.ids.shallow_clone());
            results.extend(self.collect(pending)?);
        }
        let ids = match ids.len() {
            0 => Tensor::f_zeros([0], (Kind::Int64, logits.device()))?,
            1 => ids.remove(0),
            _ => Tensor::f_cat(&ids, 0)?,
        };
        Ok((results, ids))
    }

    /// Whether a slot's next token depends on which tokens are in flight (penalties, bad words):
    /// collect them before launching it again, or its row is an error.
    pub fn must_collect(&self, slot: u32) -> bool {
        self.slots.get(slot).is_some_and(SeqState::awaits_tokens)
    }

    /// Queues the sampling of a batch without waiting for it: [`Pending::ids`] can feed the next
    /// step at once. Collect what was launched in the same order.
    pub fn launch(&mut self, logits: &Tensor, slots: &[u32]) -> Result<Pending, TchError> {
        self.check_shape(logits, slots)?;
        let vocab_size = self.slots.vocab_size();
        let raw = logits.f_to_kind(Kind::Float)?.f_contiguous()?;
        let mut rows = Vec::with_capacity(slots.len());
        let mut edits = Edits::default();
        let mut drawn = (Vec::new(), Vec::new());
        for (row, &slot) in slots.iter().enumerate() {
            let state = self.slots.get(slot);
            let error = match state {
                None => Some(SampleError::EmptySlot { slot }),
                Some(state) if state.awaits_tokens() => Some(SampleError::NotCollected { slot }),
                Some(_) => None,
            };
            let mut logprobs = None;
            if let (Some(state), None) = (state, &error) {
                edits.add(row, state, vocab_size);
                let entries = |n| usize::try_from(n).map_or(vocab_size, |n| n.min(vocab_size));
                logprobs = state.params().logprobs.map(entries);
                if !state.params().is_greedy() {
                    drawn.0.push(row as i64);
                    drawn.1.push(state);
                }
            }
            rows.push(PendingRow {
                slot,
                admission: self.slots.admission(slot),
                logprobs,
                error,
            });
        }
        let processed = edits.apply(&raw)?;
        let status = status(&raw, &processed)?;
        let ids = choose(&processed, &drawn.0, &drawn.1)?;
        let with_logprobs: Vec<i64> = (0..)
            .zip(&rows)
            .filter_map(|(i, row)| row.logprobs.map(|_| i))
            .collect();
        let logprobs = if with_logprobs.is_empty() {
            None
        } else {
            let most = rows
                .iter()
                .filter_map(|row| row.logprobs)
                .max()
                .unwrap_or(0);
            let index = upload(&with_logprobs, raw.device())?;
            let raw = raw.f_index_select(0, &index)?;
            Some(DeviceLogprobs::new(
                &raw,
                &ids.f_index_select(0, &index)?,
                most,
            )?)
        };
        for row in rows.iter().filter(|row| row.error.is_none()) {
            if let Some(state) = self.slots.get_mut(row.slot) {
                state.advance();
            }
        }
        Ok(Pending {
            ids,
            status,
            rows,
            logprobs,
        })
    }

    /// Waits for a batch, appends its tokens to their sequences and returns them.
    pub fn collect(&mut self, pending: Pending) -> Result<Vec<SampleResult>, TchError> {
        let vocab_size = self.slots.vocab_size();
        let ids = Vec::<i64>::try_from(pending.ids.f_to_device(Device::Cpu)?)?;
        let status = pending.status.f_to_device(Device::Cpu)?;
        let unusable = Vec::<i64>::try_from(status.f_get(0)?)?;
        let masked = Vec::<i64>::try_from(status.f_get(1)?)?;
        let wanted: Vec<(u32, usize)> = (ids.iter().zip(&pending.rows))
            .filter_map(|(&id, row)| row.logprobs.map(|count| (id as u32, count.min(vocab_size))))
            .collect();
        let mut logprobs = match &pending.logprobs {
            Some(logprobs) => logprobs.collect(&wanted)?.into_iter(),
            None => Vec::new().into_iter(),
        };
        let mut results = Vec::with_capacity(ids.len());
        for (i, row) in pending.rows.into_iter().enumerate() {
            let launched = row.error.is_none();
            let logprobs = row.logprobs.and_then(|_| logprobs.next());
            let result: SampleResult = match row.error {
                Some(error) => Err(error),
                None if unusable[i] >= 0 => Err(SampleError::NotFinite {
                    token: unusable[i] as u32,
                }),
                None if masked[i] != 0 => Err(SampleError::AllMasked),
                None => Ok((ids[i] as u32, logprobs)),
            }
            .into();
            let same = self.slots.admission(row.slot) == row.admission;
            if let (true, true, Some(state)) = (launched, same, self.slots.get_mut(row.slot)) {
                state.record(result.error.is_none().then_some(result.token));
            }
            results.push(result);
        }
        Ok(results)
    }

    fn check_shape(&self, logits: &Tensor, slots: &[u32]) -> Result<(), TchError> {
        let expected = [slots.len() as i64, self.slots.vocab_size() as i64];
        if logits.size() == expected {
            return Ok(());
        }
        let found = logits.size();
        Err(TchError::Shape(format!(
            "logits must have the shape {expected:?}, got {found:?}"
        )))
    }
}

/// The tokens: largest logit, except in the rows that are `drawn`.
fn choose(logits: &Tensor, drawn: &[i64], states: &[&SeqState]) -> Result<Tensor, TchError> {
    if logits.size()[0] == 0 {
        return Tensor::f_zeros([0], (Kind::Int64, logits.device()));
    }
    let (max, mut ids) = logits.f_max_dim(1, false)?;
    if drawn.len() as i64 == logits.size()[0] {
        return draw(logits, &max, states);
    }
    if !drawn.is_empty() {
        let rows = upload(drawn, logits.device())?;
        let tokens = draw(
            &logits.f_index_select(0, &rows)?,
            &max.f_index_select(0, &rows)?,
            states,
        )?;
        let _ = ids.f_index_put_(&[Some(&rows)], &tokens, false)?;
    }
    Ok(ids)
}

/// int64 `[2, rows]`: the first token that is NaN or +inf (of the raw logits, else of the processed
/// ones) or -1; and whether the largest processed logit is -inf.
fn status(raw: &Tensor, processed: &Tensor) -> Result<Tensor, TchError> {
    let unusable = |logits: &Tensor| {
        let bad = logits
            .f_lt(f64::INFINITY)?
            .f_logical_not()?
            .f_to_kind(Kind::Int8)?;
        let (any, first) = bad.f_max_dim(1, false)?;
        first.f_masked_fill(&any.f_eq(0)?, -1)
    };
    if raw.size()[0] == 0 {
        return Tensor::f_zeros([2, 0], (Kind::Int64, raw.device()));
    }
    let masked = processed
        .f_amax([1].as_slice(), false)?
        .f_eq(f64::NEG_INFINITY)?;
    let mut first = unusable(raw)?;
    if raw.data_ptr() != processed.data_ptr() {
        let after = unusable(processed)?;
        first = first.f_where_self(&first.f_ge(0)?, &after)?;
    }
    Tensor::f_stack(&[first, masked.f_to_kind(Kind::Int64)?], 0)
}
