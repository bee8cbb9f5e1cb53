//! An exponential that compilers vectorize (the standard library's is a call a number).

use crate::scan::CHUNK;

/// Arguments below this give (about) its exponential, 1e-304: nothing beside 1.
const LOWEST: f64 = -700.0;
/// Adding and subtracting it rounds to the nearest integer.
const ROUNDER: f64 = 6_755_399_441_055_744.0; // 1.5 * 2^52
/// ln(2) in two parts: products of the first with small integers are exact.
const LN2_HIGH: f64 = 0.693_147_180_369_123_8;
const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;

/// Numbers that are computed side by side: enough to fill the pipelines. Each step below is one
/// small loop over them, because compilers do not vectorize the whole chain by themselves.
const LANES: usize = 4;

/// `exp(x)` of numbers that are at most 0, to a relative error of 1e-14; what is below
/// [`LOWEST`], -inf too, counts as that.
///
/// `x = k ln 2 + r` with `|r| <= ln(2) / 2`, and `exp(r)` by its Taylor series to the 11th power.
pub(crate) fn exp_chunk(x: &[f64; CHUNK]) -> [f64; CHUNK] {
    let mut out = [0.0; CHUNK];
    for (out, x) in out.chunks_exact_mut(LANES).zip(x.chunks_exact(LANES)) {
        let x: [f64; LANES] = std::array::from_fn(|i| if x[i] > LOWEST { x[i] } else { LOWEST });
        let shifted = x.map(|x| x * std::f64::consts::LOG2_E + ROUNDER);
        let rest: [f64; LANES] = std::array::from_fn(|i| {
            let k = shifted[i] - ROUNDER;
            (x[i] - k * LN2_HIGH) - k * LN2_LOW
        });
        let series = rest.map(taylor);
        // The low bits of `shifted` hold k in two's complement; 2^k has k + 1023 as exponent.
        let power = shifted.map(|s| f64::from_bits(s.to_bits().wrapping_add(1023) << 52));
        for i in 0..LANES {
            out[i] = series[i] * power[i];
        }
    }
    out
}

/// The Taylor series of `exp`, by Estrin's scheme: short dependency chains.
#[inline(always)]
fn taylor(r: f64) -> f64 {
    let (r2, r4) = (r * r, (r * r) * (r * r));
    let low = (1.0 + r) + r2 * (0.5 + r * (1.0 / 6.0));
    let middle = (1.0 / 24.0 + r * (1.0 / 120.0)) + r2 * (1.0 / 720.0 + r * (1.0 / 5_040.0));
    let high = (1.0 / 40_320.0 + r * (1.0 / 362_880.0))
        + r2 * (1.0 / 3_628_800.0 + r * (1.0 / 39_916_800.0));
    low + r4 * (middle + r4 * high)
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
        assert!(
            exp_chunk(&[f64::NEG_INFINITY; CHUNK])
                .iter()
                .all(|&y| y < 1e-300)
        );
        assert_eq!(exp_chunk(&[0.0; CHUNK]), [1.0; CHUNK]);
    }
}
