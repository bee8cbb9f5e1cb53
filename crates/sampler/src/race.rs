//! The race: which group of tokens has the largest `ln(sum of exp(x)) + g`, and which of its tokens
//! the largest `x + g`, without computing sum or `g` for most groups.
//!
//! A group's sum is at most 64 times its largest weight. Its random word bounds its noise:
//! `e = -ln(1 - u)` is at least `u`, so `g = -ln(e)` is at most `-ln(u)`; and a float's bits, read as
//! a number, are a piecewise linear logarithm that is never above the true one. Only groups whose
//! bound exceeds the best score so far, some 64 in thousands, are added up, in float64.

use crate::exp::exp_chunk;
use crate::filter::scaled;
use crate::noise::{MAX_GUMBEL, Noise, gumbel};
use crate::scan::{CHUNK, Scan};

/// ln(64), and something for the rounding of sums and bounds.
const LN_CHUNK: f64 = 6.0 * std::f64::consts::LN_2 + 1e-6;

/// The token that is sampled: of those with logits of at least `threshold` the one with the
/// largest `scaled(logit) + gumbel` in the group that has won, and of equal ones the first.
pub(crate) fn race(
    row: &[f32],
    scan: &Scan,
    threshold: f32,
    temperature: f64,
    noise: &Noise,
) -> u32 {
    let exponents = |chunk: &[f32]| {
        let mut out = [f64::NEG_INFINITY; CHUNK];
        for (out, &logit) in out.iter_mut().zip(chunk) {
            if logit >= threshold {
                *out = scaled(logit, scan.max, temperature);
            }
        }
        out
    };
    let tokens_of = |group: usize| &row[group * CHUNK..row.len().min((group + 1) * CHUNK)];
    let weight = |chunk: &[f32]| exp_chunk(&exponents(chunk)).iter().sum::<f64>();

    // The group of the largest logit first: it probably leaves few others to look at.
    let favourite = scan.argmax(row) as usize / CHUNK;
    let mut best = (
        weight(tokens_of(favourite)).ln() + noise.group_gumbel(favourite as u32),
        favourite,
    );
    let mut words = (usize::MAX, [0; 4]);
    for (first, chunk) in scan.chunks_from(row, threshold) {
        let group = first / CHUNK;
        let most = scaled(scan.chunk_max[group], scan.max, temperature) + LN_CHUNK;
        if most + MAX_GUMBEL < best.0 {
            continue;
        }
        if words.0 != group / 4 {
            words = (group / 4, noise.group_words(group as u32));
        }
        let word = words.1[group % 4];
        if most + gumbel_bound(word) < best.0 {
            continue;
        }
        let score = weight(chunk).ln() + gumbel(word);
        if score > best.0 || (score == best.0 && group < best.1) {
            best = (score, group);
        }
    }

    let (_, group) = best;
    let mut best = (f64::NEG_INFINITY, 0);
    for (token, exponent) in (group * CHUNK..).zip(exponents(tokens_of(group))) {
        if exponent + MAX_GUMBEL <= best.0 {
            continue;
        }
        let score = exponent + noise.gumbel(token as u32);
        if score > best.0 {
            best = (score, token);
        }
    }
    best.1 as u32
}

/// At least the Gumbel noise that a word stands for.
fn gumbel_bound(word: u32) -> f64 {
    /// Bits of the float 2^32.
    const BITS_OF_2_32: i32 = 0x4F80_0000;
    /// What one step of a float's bits adds to its (piecewise linear) logarithm.
    const PER_BIT: f64 = std::f64::consts::LN_2 / 8_388_608.0;
    // At most `u`, without rounding: the float has all bits of a word that may win, and a larger
    // word's are cut off.
    let below = (word & !(0xFF * u32::from(word >> 24 != 0))) as f32;
    f64::from(BITS_OF_2_32 - below.to_bits() as i32) * PER_BIT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_bounds() {
        let words =
            (0..1000).chain((0..32).flat_map(|bit| [(1 << bit) - 1, 1 << bit, (1 << bit) + 1]));
        for word in words
            .chain((0..100_000).map(|i| i * 42_949))
            .chain([u32::MAX])
        {
            let (bound, noise) = (gumbel_bound(word), gumbel(word));
            assert!(bound >= noise, "{word}: {bound} < {noise}");
            assert!(
                word < 2 || bound < noise + 4.5,
                "{word}: {bound} for {noise}"
            );
        }
    }
}
