//! [`crate::filter`] and [`crate::race`] for many rows.

use tch::{Kind, TchError, Tensor};

use super::edits::upload;
use super::noise::Noise;
use crate::noise::{GROUP, split};
use crate::state::SeqState;

/// Elements of the float64 intermediates (64 MiB each): larger batches go in several tiles.
const TILE_ELEMENTS: usize = 8 << 20;

/// Draws a token for each row of `logits` (float32 `[rows, vocab_size]`) by the rules of `states`:
/// int64 `[rows]`. The rows' largest logits are `max`, `[rows]`.
pub(super) fn draw(
    logits: &Tensor,
    max: &Tensor,
    states: &[&SeqState],
) -> Result<Tensor, TchError> {
    let vocab_size = logits.size()[1] as usize;
    let rows_a_tile = (TILE_ELEMENTS / vocab_size).max(1);
    let mut tokens = Vec::new();
    for (tile, states) in states.chunks(rows_a_tile).enumerate() {
        let (start, len) = ((tile * rows_a_tile) as i64, states.len() as i64);
        let tile = Tile {
            logits: logits.f_narrow(0, start, len)?,
            max: max
                .f_narrow(0, start, len)?
                .f_to_kind(Kind::Double)?
                .f_unsqueeze(1)?,
            temperature: column(
                states,
                |s| s.params().effective_temperature().into(),
                logits,
            )?,
            states,
        };
        tokens.push(tile.draw()?);
    }
    Tensor::f_cat(&tokens, 0)
}

/// One number a row as a float64 `[rows, 1]` tensor on `like`'s device.
fn column(
    states: &[&SeqState],
    value: impl Fn(&SeqState) -> f64,
    like: &Tensor,
) -> Result<Tensor, TchError> {
    let values: Vec<f64> = states.iter().map(|state| value(state)).collect();
    upload(&values, like.device())?.f_unsqueeze(1)
}

/// Rows that are worked on together.
struct Tile<'a> {
    logits: Tensor,
    max: Tensor,
    temperature: Tensor,
    states: &'a [&'a SeqState],
}

impl Tile<'_> {
    fn draw(&self) -> Result<Tensor, TchError> {
        let vocab_size = self.logits.size()[1];
        let integers = |value: &dyn Fn(&SeqState) -> u32| {
            let values: Vec<i64> = self
                .states
                .iter()
                .map(|state| value(state).into())
                .collect();
            upload(&values, self.logits.device())?.f_unsqueeze(1)
        };
        let keys = [
            integers(&|s| split(s.seed())[0])?,
            integers(&|s| split(s.seed())[1])?,
        ];
        let positions = integers(&|s| s.num_tokens() as u32)?;
        let noise = Noise { keys, positions };
        let mut exponents = self.scaled(&self.logits)?;
        if let Some(bound) = self.bound(&exponents)? {
            let dropped = exponents.f_lt_tensor(&bound)?;
            exponents = exponents.f_masked_fill(&dropped, f64::NEG_INFINITY)?;
        }
        let (rows, group) = (exponents.size()[0], GROUP as i64);
        let groups = (vocab_size + group - 1) / group;
        let rest = [0, groups * group - vocab_size];
        let exponents = exponents
            .f_pad(rest, "constant", f64::NEG_INFINITY)?
            .f_view([rows, groups, group])?;
        // One group's exponents, and the noise of its tokens, are all that is left to look at.
        let scores = exponents.f_logsumexp([2].as_slice(), false)?;
        let scores = scores.f_add(&noise.of_groups(groups)?)?;
        let winner = scores.f_argmax(1, true)?;
        let index = winner.f_unsqueeze(2)?.f_expand([rows, 1, group], false)?;
        let exponents = exponents.f_gather(1, &index, false)?.f_squeeze_dim(1)?;
        let first = winner.f_mul_scalar(group)?;
        let scores = exponents.f_add(&noise.of_tokens(&first, group)?)?;
        first.f_squeeze_dim(1)?.f_add(&scores.f_argmax(1, false)?)
    }

    /// `(logit - max) / temperature` in float64: the operations of `filter::scaled`.
    fn scaled(&self, logits: &Tensor) -> Result<Tensor, TchError> {
        logits
            .f_to_kind(Kind::Double)?
            .f_sub(&self.max)?
            .f_div(&self.temperature)
    }

    /// The smallest exponent that min-p, top-k and top-p keep, `[rows, 1]`; `None` if no row
    /// filters.
    fn bound(&self, exponents: &Tensor) -> Result<Option<Tensor>, TchError> {
        let vocab_size = self.logits.size()[1];
        let top_k = |s: &SeqState| match i64::from(s.params().top_k) {
            k if k < 1 || k >= vocab_size => None,
            k => Some(k),
        };
        let top_p = |s: &SeqState| s.params().top_p < 1.0;
        let any_k = self.states.iter().any(|s| top_k(s).is_some());
        let any_p = self.states.iter().any(|s| top_p(s));
        if !any_k && !any_p && self.states.iter().all(|s| s.params().min_p == 0.0) {
            return Ok(None);
        }
        // ln(0) is -inf: no bound.
        let mut bound = column(
            self.states,
            |s| f64::from(s.params().min_p).ln(),
            &self.logits,
        )?;
        if !any_k && !any_p {
            return Ok(Some(bound));
        }
        // Only the largest logits matter, unless a row has top-p without top-k.
        let all = self.states.iter().any(|s| top_p(s) && top_k(s).is_none());
        let count = self
            .states
            .iter()
            .filter_map(|s| top_k(s))
            .max()
            .unwrap_or(vocab_size);
        let largest = if all {
            self.logits.f_sort(1, true)?.0
        } else {
            self.logits.f_topk(count, 1, true, true)?.0
        };
        let largest = self.scaled(&largest)?;
        if any_k {
            let last: Vec<i64> = self
                .states
                .iter()
                .map(|s| top_k(s).unwrap_or(1) - 1)
                .collect();
            let last = upload(&last, self.logits.device())?.f_unsqueeze(1)?;
            let none = |s: &SeqState| {
                if top_k(s).is_some() {
                    f64::INFINITY
                } else {
                    f64::NEG_INFINITY
                }
            };
            let kth = largest.f_gather(1, &last, false)?;
            let kth = kth.f_minimum(&column(self.states, none, &self.logits)?)?;
            bound = bound.f_maximum(&kth)?;
        }
        if any_p {
            bound = bound.f_maximum(&self.nucleus(exponents, &largest, &bound)?)?;
        }
        Ok(Some(bound))
    }

    /// The smallest exponent in each row's nucleus. `largest` are the largest exponents in order,
    /// at least all that top-k keeps but for ties with the last.
    fn nucleus(
        &self,
        exponents: &Tensor,
        largest: &Tensor,
        bound: &Tensor,
    ) -> Result<Tensor, TchError> {
        let weights = |exponents: &Tensor| {
            exponents
                .f_exp()?
                .f_masked_fill(&exponents.f_lt_tensor(bound)?, 0.0)
        };
        let total = weights(exponents)?.f_sum_dim_intlist(1, true, Kind::Double)?;
        let top_p = column(self.states, |s| s.params().top_p.into(), &self.logits)?;
        let sums = weights(largest)?.f_cumsum(1, Kind::Double)?;
        // The sum of what comes before each.
        let zero = sums.f_narrow(1, 0, 1)?.f_zeros_like()?;
        let before = Tensor::f_cat(&[zero, sums.f_narrow(1, 0, sums.size()[1] - 1)?], 1)?;
        let unneeded = before.f_ge_tensor(&total.f_mul(&top_p)?)?;
        let dropped = unneeded.f_logical_or(&largest.f_lt_tensor(bound)?)?;
        let last = largest
            .f_masked_fill(&dropped, f64::INFINITY)?
            .f_amin([1].as_slice(), true)?;
        // Rows without top-p: sums that round below the total must not cut their tail.
        let none = |s: &SeqState| {
            if s.params().top_p < 1.0 {
                f64::INFINITY
            } else {
                f64::NEG_INFINITY
            }
        };
        last.f_minimum(&column(self.states, none, &self.logits)?)
    }
}
