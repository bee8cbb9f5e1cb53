//! The noise of [`crate::Noise`], for every token of many rows at once, from integer tensor ops.

use tch::{Device, Kind, TchError, Tensor};

const LOW: i64 = 0xFFFF_FFFF;
const MUL: [i64; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [i64; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: i64 = 10;

/// Gumbel noise, float64 `[rows, vocab_size]`. `keys` are two and `positions` is one int64 `[rows, 1]`
/// tensor of 32-bit numbers.
///
/// 32-bit words live in int64 tensors: torch has no unsigned multiplication. A product of two of
/// them wraps around, which leaves its bits what they must be.
pub(super) fn gumbel(
    keys: &[Tensor; 2],
    positions: &Tensor,
    vocab_size: i64,
) -> Result<Tensor, TchError> {
    let words = words(keys, positions, vocab_size)?;
    let uniform = words
        .f_to_kind(Kind::Double)?
        .f_add_scalar(0.5)?
        .f_div_scalar(4_294_967_296.0)?;
    uniform.f_neg()?.f_log1p()?.f_neg()?.f_log()?.f_neg()
}

/// The random words, int64 `[rows, vocab_size]`.
fn words(keys: &[Tensor; 2], positions: &Tensor, vocab_size: i64) -> Result<Tensor, TchError> {
    let device: Device = positions.device();
    let counters = (vocab_size + 3) / 4;
    let zero = Tensor::f_zeros([1, 1], (Kind::Int64, device))?;
    let mut x0 = Tensor::f_arange(counters, (Kind::Int64, device))?.f_unsqueeze(0)?;
    let mut x1 = positions.shallow_clone();
    let (mut x2, mut x3) = (zero.shallow_clone(), zero);
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
    let rows = positions.size()[0];
    let words = Tensor::f_stack(&[x0, x1, x2, x3], 2)?;
    words
        .f_reshape([rows, 4 * counters])?
        .f_narrow(1, 0, vocab_size)
}

fn high(product: &Tensor) -> Result<Tensor, TchError> {
    product
        .f_bitwise_right_shift_tensor_scalar(32)?
        .f_bitwise_and(LOW)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::{Noise, split};

    #[test]
    fn words_are_those_of_the_plain_version() {
        let cases = [(0, 0), (u64::MAX, u32::MAX), (0x0123_4567_89ab_cdef, 77)];
        let column = |values: Vec<i64>| Tensor::from_slice(&values).unsqueeze(1);
        let key = |i: usize| column(cases.map(|case| split(case.0)[i].into()).to_vec());
        let positions = column(cases.map(|case| case.1.into()).to_vec());
        let found = words(&[key(0), key(1)], &positions, 1001).unwrap();
        for (row, (seed, position)) in (0..).zip(cases) {
            let noise = Noise::new(seed, position);
            let expected: Vec<i64> = (0..1001).map(|token| noise.word(token).into()).collect();
            assert_eq!(Vec::<i64>::try_from(found.get(row)).unwrap(), expected);
        }
    }
}
