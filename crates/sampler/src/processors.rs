//! What happens to logits before temperature, in float32 and in vLLM's order.

use crate::params::SamplingParams;
use crate::state::{Seen, SeqState};

/// Writes the processed logits of a sequence into `out`: allowed tokens (the parameters' and those
/// of `mask`), bans (bad tokens, bad words, `min_tokens`), logit bias, then repetition, frequency and
/// presence penalty.
pub(crate) fn apply(state: &SeqState, mask: Option<&[u32]>, logits: &[f32], out: &mut Vec<f32>) {
    out.clear();
    match &state.params().allowed_token_ids {
        Some(allowed) => {
            out.resize(logits.len(), f32::NEG_INFINITY);
            for &token in allowed {
                out[token as usize] = logits[token as usize];
            }
        }
        None => out.extend_from_slice(logits),
    }
    if let Some(mask) = mask {
        restrict(out, mask);
    }
    for token in state.banned() {
        out[token as usize] = f32::NEG_INFINITY;
    }
    for (token, bias) in state.biases() {
        out[token as usize] += bias;
    }
    for seen in state.seen() {
        let logit = &mut out[seen.token as usize];
        *logit = penalized(*logit, *seen, state.params());
    }
}

/// Masks every token whose bit is not set in `mask`; see [`crate::BatchSampler::sample_masked`].
fn restrict(logits: &mut [f32], mask: &[u32]) {
    let words = mask.iter().copied().chain(std::iter::repeat(0));
    for (logits, word) in logits.chunks_mut(32).zip(words) {
        if word == 0 {
            logits.fill(f32::NEG_INFINITY);
        } else if word != u32::MAX {
            for (bit, logit) in logits.iter_mut().enumerate() {
                if word >> bit & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }
}

/// Repetition penalty as in CTRL (Keskar et al. 2019, section 4.1), made monotone for negative
/// logits as everyone does; frequency and presence penalty as in OpenAI's API reference.
fn penalized(logit: f32, seen: Seen, params: &SamplingParams) -> f32 {
    let repetition = params.repetition_penalty;
    let logit = if logit > 0.0 {
        logit / repetition
    } else {
        logit * repetition
    };
    if seen.in_output == 0 {
        return logit;
    }
    logit - params.frequency_penalty * seen.in_output as f32 - params.presence_penalty
}
