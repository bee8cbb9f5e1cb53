//! [`crate::processors`] for many rows: the few logits that change, as index and value lists.

use tch::{Device, TchError, Tensor};

use crate::state::SeqState;

/// Changes to a batch of logits. Indices count in the flattened `[rows, vocab_size]` batch.
#[derive(Default)]
pub(super) struct Edits {
    restricted_rows: Vec<i64>,
    allowed: Vec<i64>,
    banned: Vec<i64>,
    biased: Vec<i64>,
    biases: Vec<f32>,
    penalized: Vec<i64>,
    repetition: Vec<f32>,
    frequency: Vec<f32>,
    count: Vec<f32>,
    presence: Vec<f32>,
}

impl Edits {
    /// Notes what the sequence of a row changes.
    pub fn add(&mut self, row: usize, state: &SeqState, vocab_size: usize) {
        let params = state.params();
        let at = |token: u32| (row * vocab_size) as i64 + i64::from(token);
        if let Some(allowed) = &params.allowed_token_ids {
            self.restricted_rows.push(row as i64);
            self.allowed.extend(allowed.iter().map(|&token| at(token)));
        }
        self.banned.extend(state.banned().map(at));
        for (token, bias) in state.biases() {
            self.biased.push(at(token));
            self.biases.push(bias);
        }
        for seen in state.seen() {
            let in_output = seen.in_output > 0;
            self.penalized.push(at(seen.token));
            self.repetition.push(params.repetition_penalty);
            self.frequency.push(params.frequency_penalty);
            self.count.push(seen.in_output as f32);
            self.presence.push(if in_output {
                params.presence_penalty
            } else {
                0.0
            });
        }
    }

    /// The processed logits: `raw` itself (float32, contiguous) if nothing changes, else a copy.
    pub fn apply(&self, raw: &Tensor) -> Result<Tensor, TchError> {
        let lists = [
            &self.restricted_rows,
            &self.banned,
            &self.biased,
            &self.penalized,
        ];
        if lists.iter().all(|list| list.is_empty()) {
            return Ok(raw.shallow_clone());
        }
        let device = raw.device();
        let mut out = raw.f_empty_like()?;
        out.f_copy_(raw)?;
        let mut flat = out.f_view([-1])?;
        if !self.restricted_rows.is_empty() {
            let _ = out.f_index_fill_(
                0,
                &upload(&self.restricted_rows, device)?,
                f64::NEG_INFINITY,
            )?;
            let index = upload(&self.allowed, device)?;
            let kept = raw.f_view([-1])?.f_index_select(0, &index)?;
            let _ = flat.f_index_put_(&[Some(&index)], &kept, false)?;
        }
        if !self.banned.is_empty() {
            let _ = flat.f_index_fill_(0, &upload(&self.banned, device)?, f64::NEG_INFINITY)?;
        }
        if !self.biased.is_empty() {
            let index = upload(&self.biased, device)?;
            let biased = flat
                .f_index_select(0, &index)?
                .f_add(&upload(&self.biases, device)?)?;
            let _ = flat.f_index_put_(&[Some(&index)], &biased, false)?;
        }
        if !self.penalized.is_empty() {
            let index = upload(&self.penalized, device)?;
            let logits = flat.f_index_select(0, &index)?;
            let repetition = upload(&self.repetition, device)?;
            let logits = logits
                .f_div(&repetition)?
                .f_where_self(&logits.f_gt(0.0)?, &logits.f_mul(&repetition)?)?;
            let frequency =
                upload(&self.frequency, device)?.f_mul(&upload(&self.count, device)?)?;
            let logits = logits
                .f_sub(&frequency)?
                .f_sub(&upload(&self.presence, device)?)?;
            let _ = flat.f_index_put_(&[Some(&index)], &logits, false)?;
        }
        Ok(out)
    }
}

/// A list as a tensor on a device.
pub(super) fn upload<T: tch::kind::Element>(
    values: &[T],
    device: Device,
) -> Result<Tensor, TchError> {
    Tensor::f_from_slice(values)?.f_to_device(device)
}
