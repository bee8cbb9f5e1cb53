//! The noise of [`crate::Noise`] for many rows at once, from integer tensor ops.

use tch::{Kind, TchError, Tensor};

const LOW: i64 = 0xFFFF_FFFF;
const MUL: [i64; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [i64; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: i64 = 10;

/// The noise of the next token of many rows.
pub(super) struct Noise {
    /// Halves of the seeds: 32-bit numbers, int64 `[rows, 1]`.
    pub keys: [Tensor; 2],
    /// The same of the tokens' positions.
    pub positions: Tensor,
}

impl Noise {
    /// Gumbel noise of all groups, float64 `[rows, groups]`.
    pub fn of_groups(&self, groups: i64) -> Result<Tensor, TchError> {
        let counters = self.counters((groups + 3) / 4)?;
        gumbel(&self.words(&counters, 1)?.f_narrow(1, 0, groups)?)
    }

    /// Gumbel noise of tokens `first..first + count` of each row, float64 `[rows, count]`. `first` is
    /// int64 `[rows, 1]` and has multiples of 4, as `count` is one.
    pub fn of_tokens(&self, first: &Tensor, count: i64) -> Result<Tensor, TchError> {
        let first = first.f_divide_scalar_mode(4, "floor")?;
        let counters = first.f_add(&self.counters(count / 4)?)?;
        gumbel(&self.words(&counters, 0)?)
    }

    /// `0..count`, `[1, count]`.
    fn counters(&self, count: i64) -> Result<Tensor, TchError> {
        Tensor::f_arange(count, (Kind::Int64, self.positions.device()))?.f_unsqueeze(0)
    }

    /// The random words of counters `[counters, position, domain, 0]`, int64 `[rows, 4 counters]`;
    /// `counters` are `[rows or 1, counters]`.
    ///
    /// 32-bit words live in int64 tensors: torch has no unsigned multiplication. A product of two of
    /// them wraps around, which leaves its bits what they must be.
    fn words(&self, counters: &Tensor, domain: i64) -> Result<Tensor, TchError> {
        let keys = &self.keys;
        let mut x0 = counters.shallow_clone();
        let mut x1 = self.positions.shallow_clone();
        let mut x2 = x1.f_full_like(domain)?;
        let mut x3 = x1.f_zeros_like()?;
        for round in 0..ROUNDS {
            let key = |i: usize| keys[i].f_add_scalar(round * WEYL[i])?.f_bitwise_and(LOW);
            let (a, b) = (x0.f_mul_scalar(MUL[0])?, x2.f_mul_scalar(MUL[1])?);
            x0 = high(&b)?
                .f_bitwise_xor_tensor(&x1)?
                .f_bitwise_xor_tensor(&key(0)?)?;
            x2 = high(&a)?
                .f_bitwise_xor_tensor(&x3)?
                .f_bitwise_xor_tensor(&key(1)?)?;
            x1 = b.f_bitwise_and(LOW)?;
            x3 = a.f_bitwise_and(LOW)?;
        }
        let rows = self.positions.size()[0];
        let words = Tensor::f_stack(&[x0, x1, x2, x3], 2)?;
        words.f_reshape([rows, 4 * counters.size()[1]])
    }
}

/// The Gumbel noise that random words stand for.
fn gumbel(words: &Tensor) -> Result<Tensor, TchError> {
    let uniform = words
        .f_to_kind(Kind::Double)?
        .f_add_scalar(0.5)?
        .f_div_scalar(4_294_967_296.0)?;
    uniform.f_neg()?.f_log1p()?.f_neg()?.f_log()?.f_neg()
}

fn high(product: &Tensor) -> Result<Tensor, TchError> {
    product
        .f_bitwise_right_shift_tensor_scalar(32)?
        .f_bitwise_and(LOW)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::split;

    #[test]
    fn words_are_those_of_the_plain_version() {
        let cases = [(0, 0), (u64::MAX, u32::MAX), (0x0123_4567_89ab_cdef, 77)];
        let column = |values: Vec<i64>| Tensor::from_slice(&values).unsqueeze(1);
        let key = |i: usize| column(cases.map(|case| split(case.0)[i].into()).to_vec());
        let noise = Noise {
            keys: [key(0), key(1)],
            positions: column(cases.map(|case| case.1.into()).to_vec()),
        };
        let firsts = [0, 151_872, 64];
        let groups = noise.of_groups(37).unwrap();
        let first = column(firsts.map(i64::from).to_vec());
        let tokens = noise.of_tokens(&first, 64).unwrap();
        for (row, ((seed, position), first)) in (0..).zip(cases.into_iter().zip(firsts)) {
            let noise = crate::Noise::new(seed, position);
            let same = |found: &Tensor, expected: Vec<f64>| {
                let found = Vec::<f64>::try_from(found.get(row)).unwrap();
                let near = |(a, b): (&f64, &f64)| (a - b).abs() < 1e-12;
                assert!(
                    found.iter().zip(&expected).all(near),
                    "{found:?} {expected:?}"
                );
                assert_eq!(found.len(), expected.len());
            };
            same(&groups, (0..37).map(|i| noise.group_gumbel(i)).collect());
            same(
                &tokens,
                (first..first + 64).map(|i| noise.gumbel(i)).collect(),
            );
        }
    }
}
