//! What happens to logits before temperature, in float32 and in vLLM's order.

use crate::params::SamplingParams;
use crate::state::{Seen, SeqState};

/// Writes the processed logits of a sequence into `out`: allowed tokens, bans (bad tokens, bad
/// words, `min_tokens`), logit bias, then repetition, frequency and presence penalty.
pub(crate) fn apply(state: &SeqState, logits: &[f32], out: &mut Vec<f32>) {
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
