//! [`crate::logprobs`] for many rows.

use tch::{Device, Kind, TchError, Tensor};

use crate::logprobs::TokenLogprobs;

/// Log-probabilities of some rows, still on the device.
pub(super) struct DeviceLogprobs {
    /// float64 `[rows]`
    chosen: Tensor,
    /// int64 `[rows]`
    ranks: Tensor,
    /// int64 and float64 `[rows, most]`
    top: Option<(Tensor, Tensor)>,
}

impl DeviceLogprobs {
    /// For `tokens` (int64 `[rows]`) and the `most` most likely, from raw logits (float32).
    pub fn new(raw: &Tensor, tokens: &Tensor, most: usize) -> Result<Self, TchError> {
        let tokens = tokens.f_unsqueeze(1)?;
        let exact = raw.f_to_kind(Kind::Double)?;
        let total = exact.f_logsumexp([1].as_slice(), true)?;
        let logit = raw.f_gather(1, &tokens, false)?;
        let ranks = raw
            .f_ge_tensor(&logit)?
            .f_sum_dim_intlist(1, false, Kind::Int64)?;
        let chosen = exact
            .f_gather(1, &tokens, false)?
            .f_sub(&total)?
            .f_squeeze_dim(1)?;
        let top = if most == 0 {
            None
        } else {
            let ids = most_likely(raw, most)?;
            let logprobs = exact.f_gather(1, &ids, false)?.f_sub(&total)?;
            Some((ids, logprobs))
        };
        Ok(Self { chosen, ranks, top })
    }

    /// Brings them to the host. `rows` are each row's token and how many entries it asked for.
    pub fn collect(&self, rows: &[(u32, usize)]) -> Result<Vec<TokenLogprobs>, TchError> {
        let chosen = Vec::<f64>::try_from(self.chosen.f_to_device(Device::Cpu)?)?;
        let ranks = Vec::<i64>::try_from(self.ranks.f_to_device(Device::Cpu)?)?;
        let (ids, logprobs) = match &self.top {
            Some((ids, logprobs)) => (
                Vec::<i64>::try_from(ids.f_to_device(Device::Cpu)?.f_view([-1])?)?,
                Vec::<f64>::try_from(logprobs.f_to_device(Device::Cpu)?.f_view([-1])?)?,
            ),
            None => (Vec::new(), Vec::new()),
        };
        let most = ids.len() / rows.len().max(1);
        let entry = |at: usize| (ids[at] as u32, logprobs[at] as f32);
        let row = |(i, &(token, count)): (usize, &(u32, usize))| TokenLogprobs {
            token,
            logprob: chosen[i] as f32,
            rank: ranks[i] as u32,
            top: (i * most..i * most + count).map(entry).collect(),
        };
        Ok(rows.iter().enumerate().map(row).collect())
    }
}

/// The most likely tokens in order, of equal ones the lowest id first, int64 `[rows, count]`.
///
/// `topk` promises no order of equal values, so it gets unique ones: the float's bits, made to
/// order as integers do, above the complement of the token id.
fn most_likely(raw: &Tensor, count: usize) -> Result<Tensor, TchError> {
    const LOW: i64 = 0xFFFF_FFFF;
    let bits = raw.f_view_dtype(Kind::Int)?.f_to_kind(Kind::Int64)?;
    let flipped = bits.f_bitwise_xor(0x7FFF_FFFF_i64)?;
    let ordered = flipped.f_where_self(&bits.f_lt(0)?, &bits)?;
    let id = Tensor::f_arange(raw.size()[1], (Kind::Int64, raw.device()))?;
    let keys = ordered
        .f_mul_scalar(LOW + 1)?
        .f_sub(&id)?
        .f_add_scalar(LOW)?;
    let (keys, _) = keys.f_topk(count as i64, 1, true, true)?;
    keys.f_bitwise_and(LOW)?.f_neg()?.f_add_scalar(LOW)
}
