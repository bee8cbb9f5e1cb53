//! Log-probabilities, of the logits as the model gave them.

use crate::error::SampleError;
use crate::exp::exp_chunk;
use crate::scan::{CHUNK, Scan};

/// Log-probability of a token and of the most likely ones: `log_softmax` of the raw logits,
/// before any processor and temperature (vLLM's `raw_logprobs`).
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// The token.
    pub token: u32,
    /// Its log-probability (-inf if the model ruled it out).
    pub logprob: f32,
    /// How many tokens are at least as likely, itself included: 1 is the most likely.
    pub rank: u32,
    /// The most likely tokens and their log-probabilities, most likely first; of equal ones the
    /// lowest token id first.
    pub top: Vec<(u32, f32)>,
}

/// Log-probabilities of `next[i]` under row `i` of `logits` (rows x `vocab_size`), and of the
/// `count` most likely tokens (-1: all), as for `prompt_logprobs`.
///
/// # Panics
/// If `logits` does not have `next.len()` rows.
pub fn prompt_logprobs(
    logits: &[f32],
    next: &[u32],
    vocab_size: usize,
    count: i32,
) -> Result<Vec<TokenLogprobs>, SampleError> {
    assert_eq!(
        logits.len(),
        next.len() * vocab_size,
        "one row of logits a token"
    );
    let mut scan = Scan::default();
    let rows = logits.chunks_exact(vocab_size).zip(next);
    rows.map(|(row, &token)| {
        if token as usize >= vocab_size {
            return Err(SampleError::TokenOutOfRange { token, vocab_size });
        }
        scan.run(row)?;
        Ok(token_logprobs(row, &scan, token, count))
    })
    .collect()
}

/// Log-probabilities of `token` and the `count` most likely (negative: all) in a scanned row.
pub(crate) fn token_logprobs(row: &[f32], scan: &Scan, token: u32, count: i32) -> TokenLogprobs {
    let sum = log_sum_exp(row, scan.max);
    let logprob = |logit: f32| (f64::from(logit) - sum) as f32;
    let chosen = row[token as usize];
    let rank = row.iter().map(|&logit| u32::from(logit >= chosen)).sum();
    let count = usize::try_from(count).map_or(row.len(), |count| count.min(row.len()));
    let top = most_likely(row, scan, count).into_iter();
    let top = top
        .map(|token| (token, logprob(row[token as usize])))
        .collect();
    TokenLogprobs {
        token,
        logprob: logprob(chosen),
        rank,
        top,
    }
}

/// `ln(sum(exp(logits)))`.
fn log_sum_exp(row: &[f32], max: f32) -> f64 {
    let mut sum = 0.0;
    for chunk in row.chunks(CHUNK) {
        let mut shifted = [f64::NEG_INFINITY; CHUNK];
        for (shifted, &logit) in shifted.iter_mut().zip(chunk) {
            *shifted = f64::from(logit) - f64::from(max);
        }
        let weights = exp_chunk(&shifted);
        let mut lanes = [0.0; 8];
        for part in weights.chunks_exact(8) {
            lanes
                .iter_mut()
                .zip(part)
                .for_each(|(lane, weight)| *lane += weight);
        }
        sum += lanes.iter().sum::<f64>();
    }
    f64::from(max) + sum.ln()
}

/// The `count` most likely tokens in order; of equal ones the lowest token id first.
fn most_likely(row: &[f32], scan: &Scan, count: usize) -> Vec<u32> {
    if count == 0 {
        return Vec::new();
    }
    let mut bound = f32::NEG_INFINITY;
    if count <= scan.chunk_max.len() {
        // As for top-k: `count` chunks have a logit of at least this.
        let mut maxima = scan.chunk_max.clone();
        bound = *maxima
            .select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a))
            .1;
    }
    let mut tokens: Vec<u32> = Vec::new();
    for (first, chunk) in scan.chunks_from(row, bound) {
        let kept = chunk
            .iter()
            .enumerate()
            .filter(|(_, logit)| **logit >= bound);
        tokens.extend(kept.map(|(i, _)| (first + i) as u32));
    }
    let logit = |token: &u32| row[*token as usize];
    let order = |a: &u32, b: &u32| logit(b).total_cmp(&logit(a)).then(a.cmp(b));
    if count < tokens.len() {
        tokens.select_nth_unstable_by(count - 1, order);
        tokens.truncate(count);
    }
    tokens.sort_unstable_by(order);
    tokens
}
