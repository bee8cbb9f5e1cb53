//! The exact distribution, written to be read: what every other implementation must agree with.
//!
//! It recounts and sorts the whole vocabulary for each token, from the sequence's full history.

use crate::error::SampleError;
use crate::noise::{GROUP, Noise};
use crate::params::{MAX_LOGIT_BIAS, SamplingParams};

/// A sequence, as far as sampling its next token depends on it.
#[derive(Clone, Copy, Debug)]
pub struct History<'a> {
    /// The parameters.
    pub params: &'a SamplingParams,
    /// The seed.
    pub seed: u64,
    /// Tokens of the prompt.
    pub prompt: &'a [u32],
    /// Tokens generated so far.
    pub output: &'a [u32],
    /// End-of-sequence tokens, banned until `min_tokens` like `params.stop_token_ids`.
    pub stop_ids: &'a [u32],
}

/// Probability of each token to be next.
pub fn distribution(logits: &[f32], history: &History<'_>) -> Result<Vec<f64>, SampleError> {
    let params = history.params;
    check(logits)?;
    let logits = processed(logits, history);
    let max = check(&logits)?;
    if params.is_greedy() {
        let first = logits.iter().position(|&x| x == max);
        return Ok((0..logits.len())
            .map(|i| f64::from(Some(i) == first))
            .collect());
    }
    let temperature = f64::from(params.effective_temperature());
    let exponents: Vec<f64> = logits
        .iter()
        .map(|&x| (f64::from(x) - f64::from(max)) / temperature)
        .collect();
    let mut weights: Vec<f64> = exponents.iter().map(|x| x.exp()).collect();

    if params.min_p > 0.0 {
        let bound = f64::from(params.min_p).ln();
        retain(&mut weights, |i| exponents[i] >= bound);
    }
    let mut sorted = exponents.clone();
    sorted.sort_unstable_by(|a, b| b.total_cmp(a));
    if let Ok(k @ 1..) = usize::try_from(params.top_k) {
        let kth = sorted[k.min(sorted.len()) - 1];
        retain(&mut weights, |i| exponents[i] >= kth);
    }
    if params.top_p < 1.0 {
        let mut order: Vec<usize> = (0..weights.len()).collect();
        order.sort_by(|&a, &b| exponents[b].total_cmp(&exponents[a]));
        let target = f64::from(params.top_p) * order.iter().map(|&i| weights[i]).sum::<f64>();
        let (mut above, mut last) = (0.0, f64::INFINITY);
        for &i in &order {
            if above < target && weights[i] > 0.0 {
                last = exponents[i];
            }
            above += weights[i];
        }
        retain(&mut weights, |i| exponents[i] >= last);
    }
    let total: f64 = weights.iter().sum();
    Ok(weights.into_iter().map(|weight| weight / total).collect())
}

/// Samples the next token: the winner of the race that [`Noise`] describes.
pub fn sample_row(logits: &[f32], history: &History<'_>) -> Result<u32, SampleError> {
    let position = history.prompt.len() + history.output.len();
    let noise = Noise::new(history.seed, position as u32);
    let probabilities = distribution(logits, history)?;
    let groups = probabilities.chunks(GROUP).map(|group| group.iter().sum());
    let group = winner(groups, |group| noise.group_gumbel(group));
    let first = group * GROUP as u32;
    let tokens = probabilities.iter().copied().skip(first as usize);
    Ok(first + winner(tokens.take(GROUP), |i| noise.gumbel(first + i)))
}

/// Which has the largest `ln(weight) + noise`; of equal ones the first.
fn winner(weights: impl Iterator<Item = f64>, noise: impl Fn(u32) -> f64) -> u32 {
    let mut best = (f64::NEG_INFINITY, 0);
    for (i, weight) in (0..).zip(weights) {
        let score = weight.ln() + noise(i);
        if score > best.0 {
            best = (score, i);
        }
    }
    best.1
}

/// The largest logit, if all are numbers below infinity and one is above -inf.
fn check(logits: &[f32]) -> Result<f32, SampleError> {
    if let Some(token) = logits
        .iter()
        .position(|x| x.is_nan() || *x == f32::INFINITY)
    {
        return Err(SampleError::NotFinite {
            token: token as u32,
        });
    }
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if max == f32::NEG_INFINITY {
        Err(SampleError::AllMasked)
    } else {
        Ok(max)
    }
}

fn retain(weights: &mut [f64], keep: impl Fn(usize) -> bool) {
    for (i, weight) in weights.iter_mut().enumerate() {
        if !keep(i) {
            *weight = 0.0;
        }
    }
}

/// Logits after allowed tokens, bans, bias and penalties, in float32.
fn processed(logits: &[f32], history: &History<'_>) -> Vec<f32> {
    let params = history.params;
    let too_early = history.output.len() < params.min_tokens as usize;
    let banned = |token: u32| {
        let allowed = params
            .allowed_token_ids
            .as_ref()
            .is_none_or(|ids| ids.contains(&token));
        let bad_word = params.bad_words_token_ids.iter().any(|word| {
            let (last, before) = word.split_last().expect("validated: not empty");
            *last == token && history.output.ends_with(before)
        });
        let stop = history.stop_ids.contains(&token) || params.stop_token_ids.contains(&token);
        !allowed || bad_word || params.bad_token_ids.contains(&token) || (too_early && stop)
    };
    let process = |(token, &logit): (u32, &f32)| {
        if banned(token) {
            return f32::NEG_INFINITY;
        }
        let bias = params.logit_bias.get(&token).copied().unwrap_or(0.0);
        let mut logit = logit + bias.clamp(-MAX_LOGIT_BIAS, MAX_LOGIT_BIAS);
        let count = history.output.iter().filter(|&&t| t == token).count();
        if count > 0 || history.prompt.contains(&token) {
            let r = params.repetition_penalty;
            logit = if logit > 0.0 { logit / r } else { logit * r };
        }
        if count > 0 {
            logit -= params.frequency_penalty * count as f32;
            logit -= params.presence_penalty;
        }
        logit
    };
    (0..).zip(logits).map(process).collect()
}
