//! The race: which token has the largest `x + g`, without computing `g` for most.
//!
//! A token's random word bounds its noise: `e = -ln(1 - u)` is at least `u`, so `g = -ln(e)` is at
//! most `-ln(u)`; and a float's bits, read as a number, are a piecewise linear logarithm that is
//! never above the true one. Only tokens whose bound exceeds the best score so far are scored
//! exactly, in float64; and chunks in which no noise could help are skipped altogether.

use crate::filter::scaled;
use crate::noise::{MAX_GUMBEL, Noise, gumbel};
use crate::scan::{CHUNK, Scan};

/// Covers the rounding of everything that is float32 below (all terms are below 30).
const SLACK: f64 = 1e-3;

/// The token that is sampled: of those with logits of at least `threshold` the one with the
/// largest `scaled(logit) + gumbel`, and of equal ones the first.
pub(crate) fn race(
    row: &[f32],
    scan: &Scan,
    threshold: f32,
    temperature: f64,
    noise: &Noise,
) -> u32 {
    let favourite = scan.argmax(row);
    let mut best = (noise.gumbel(favourite), favourite);
    for (first, chunk) in scan.chunks_from(row, threshold) {
        let chunk_max = scan.chunk_max[first / CHUNK];
        if scaled(chunk_max, scan.max, temperature) + MAX_GUMBEL < best.0 {
            continue;
        }
        let words = noise.words(first as u32);
        let bounds = bounds(chunk, &words, scan.max, (1.0 / temperature) as f32);
        let mut bar = (best.0 - SLACK) as f32;
        if !bounds.iter().any(|&bound| bound >= bar) {
            continue;
        }
        for (i, &logit) in chunk.iter().enumerate() {
            if bounds[i] < bar || logit < threshold {
                continue;
            }
            let score = scaled(logit, scan.max, temperature) + gumbel(words[i]);
            let token = (first + i) as u32;
            if score > best.0 || (score == best.0 && token < best.1) {
                best = (score, token);
                bar = (best.0 - SLACK) as f32;
            }
        }
    }
    best.1
}

/// Upper bounds of the scores; -inf beyond the end of the row.
fn bounds(chunk: &[f32], words: &[u32; CHUNK], max: f32, inverse_temperature: f32) -> [f32; CHUNK] {
    /// Bits of the float 2^31.
    const BITS_OF_2_31: i32 = 0x4F00_0000;
    /// ln(2) / 2^23: what one step of a float's bits adds to its (piecewise linear) logarithm.
    const PER_BIT: f32 = std::f32::consts::LN_2 / 8_388_608.0;

    let mut out = [f32::NEG_INFINITY; CHUNK];
    for ((out, &logit), &word) in out.iter_mut().zip(chunk).zip(words) {
        // Signed conversion is one instruction; halving rounds down, so the bound stays one.
        // Word 0 and 1 give bits 0 and a bound of 109, which is one too.
        let half = (word >> 1) as i32 as f32;
        let noise = (BITS_OF_2_31 - half.to_bits() as i32) as f32 * PER_BIT;
        *out = (logit - max) * inverse_temperature + noise;
    }
    out
}
