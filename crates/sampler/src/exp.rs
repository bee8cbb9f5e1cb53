//! An exponential that compilers vectorize (the standard library's is a call a number).

use crate::scan::CHUNK;

/// Arguments below this give (about) its exponential, 1e-304: nothing beside 1.
const LOWEST: f64 = -700.0;
/// Adding and subtracting it rounds to the nearest integer.
const ROUNDER: f64 = 6_755_399_441_055_744.0; // 1.5 * 2^52
/// ln(2) in two parts: products of the first with small integers are exact.
const LN2_HIGH: f64 = 0.693_147_180_369_123_8;
const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;

/// `exp(x)` of numbers that are at most 0, to a relative error of 1e-14. -inf gives 0.
///
/// `x = k ln 2 + r` with `|r| <= ln(2) / 2`, and `exp(r)` by its Taylor series to the 11th power.
pub(crate) fn exp_chunk(x: &[f64; CHUNK]) -> [f64; CHUNK] {
    let mut out = [0.0; CHUNK];
    for (out, &x) in out.iter_mut().zip(x) {
        let clamped = if x > LOWEST { x } else { LOWEST };
        let shifted = clamped * std::f64::consts::LOG2_E + ROUNDER;
        let k = shifted - ROUNDER;
        let r = (clamped - k * LN2_HIGH) - k * LN2_LOW;
        let mut sum = 1.0 / 39_916_800.0;
        sum = sum * r + 1.0 / 3_628_800.0;
        sum = sum * r + 1.0 / 362_880.0;
        sum = sum * r + 1.0 / 40_320.0;
        sum = sum * r + 1.0 / 5_040.0;
        sum = sum * r + 1.0 / 720.0;
        sum = sum * r + 1.0 / 120.0;
        sum = sum * r + 1.0 / 24.0;
        sum = sum * r + 1.0 / 6.0;
        sum = sum * r + 0.5;
        sum = sum * r + 1.0;
        sum = sum * r + 1.0;
        // The low bits of `shifted` hold k in two's complement; 2^k has k + 1023 as exponent.
        let power = f64::from_bits(shifted.to_bits().wrapping_add(1023) << 52);
        *out = if x == f64::NEG_INFINITY {
            0.0
        } else {
            sum * power
        };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_standard_library() {
        for start in 0..500 {
            let x: [f64; CHUNK] = std::array::from_fn(|i| -((start * CHUNK + i) as f64) * 0.021_73);
            for (x, y) in x.iter().zip(exp_chunk(&x)) {
                let expected = x.max(LOWEST).exp();
                assert!(
                    (y / expected - 1.0).abs() < 1e-14,
                    "exp({x}) = {expected}, got {y}"
                );
            }
        }
        assert_eq!(exp_chunk(&[f64::NEG_INFINITY; CHUNK]), [0.0; CHUNK]);
        assert_eq!(exp_chunk(&[0.0; CHUNK]), [1.0; CHUNK]);
    }
}
