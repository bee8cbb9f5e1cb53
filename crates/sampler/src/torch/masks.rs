//! Masks of allowed tokens on tensors.

use tch::{Kind, TchError, Tensor};

/// Rows that are unpacked at a time: a bit becomes a byte then.
const ROWS: i64 = 64;

/// A copy of `logits` in which some rows have only some tokens left.
///
/// * `logits`: any float type, `[rows, vocab_size]`.
/// * `rows`: int32 or int64 `[masks]`: which rows, each at most once.
/// * `words`: int32 `[masks, vocab_size.div_ceil(32)]`: token `t` stays if bit `t % 32` of word
///   `t / 32` is set. All on the device of `logits`.
///
/// What is no usable logit (NaN, infinity) stays in any case, so that it is found.
pub fn masked_logits(logits: &Tensor, rows: &Tensor, words: &Tensor) -> Result<Tensor, TchError> {
    let device = logits.device();
    let vocab_size = logits.size()[1];
    let mut out = logits.f_empty_like()?;
    out.f_copy_(logits)?;
    let shifts = Tensor::f_arange(8, (Kind::Uint8, device))?;
    let banned = Tensor::f_full([], f64::NEG_INFINITY, (logits.kind(), device))?;
    let count = rows.size()[0];
    for first in (0..count).step_by(ROWS as usize) {
        let len = ROWS.min(count - first);
        let rows = rows.f_narrow(0, first, len)?.f_to_kind(Kind::Int64)?;
        // Bytes of a little-endian word stand in the order of its bits.
        let bytes = words
            .f_narrow(0, first, len)?
            .f_contiguous()?
            .f_view_dtype(Kind::Uint8)?;
        let bits = bytes
            .f_unsqueeze(-1)?
            .f_bitwise_right_shift(&shifts)?
            .f_bitwise_and(1)?;
        let allowed = bits
            .f_view([len, -1])?
            .f_narrow(1, 0, vocab_size)?
            .f_to_kind(Kind::Bool)?;
        let raw = logits.f_index_select(0, &rows)?;
        let stays = raw.f_isfinite()?.f_logical_not()?.f_logical_or(&allowed)?;
        let kept = raw.f_where_self(&stays, &banned)?;
        let _ = out.f_index_copy_(0, &rows, &kept)?;
    }
    Ok(out)
}
