//! What is drawn against the exact distribution.
//!
//! All seeds are fixed, so a test either always passes or always fails. Each statistical test has
//! a control: the same draws must fail against a distribution that is slightly wrong.

mod common;

use std::sync::Arc;

use common::deviation;
use sampler::oracle::{self, History};
use sampler::{Noise, RowSampler, SamplingParams, SeqState};

const DRAWS: usize = 40_000;
const PROMPT: [u32; 4] = [3, 4, 5, 3];
const OUTPUT: [u32; 5] = [7, 3, 7, 9, 8];

fn base() -> SamplingParams {
    SamplingParams {
        max_tokens: None,
        ..Default::default()
    }
}

fn exact(logits: &[f32], params: &SamplingParams) -> Vec<f64> {
    let history = History {
        params,
        seed: 0,
        prompt: &PROMPT,
        output: &OUTPUT,
        stop_ids: &[2],
    };
    oracle::distribution(logits, &history).unwrap()
}

/// How often each token is drawn, with a seed a draw.
fn counts(logits: &[f32], params: &SamplingParams) -> Vec<usize> {
    let params = Arc::new(params.clone());
    let tokens = [PROMPT.as_slice(), &OUTPUT].concat();
    let mut counts = vec![0; logits.len()];
    let mut sampler = RowSampler::default();
    for seed in 0..DRAWS as u64 {
        let state = SeqState::new(
            params.clone(),
            seed,
            &tokens,
            PROMPT.len(),
            &[2],
            logits.len(),
        )
        .unwrap();
        counts[sampler.sample(logits, &state).unwrap().0 as usize] += 1;
    }
    counts
}

/// Each option and combinations: the draws fit the exact distribution and do not fit the one of
/// `wrong`, which differs in one parameter.
#[test]
fn draws_fit_the_exact_distribution() {
    let mut rng = common::rng(1);
    let logits: Vec<f32> = (0..83).map(|_| common::normal(&mut rng) * 1.5).collect();
    let bias = |value: f32| [(6, value), (11, 1.0)].into();
    let combined = SamplingParams {
        temperature: 0.8,
        top_k: 20,
        top_p: 0.9,
        min_p: 0.02,
        repetition_penalty: 1.3,
        presence_penalty: 0.4,
        frequency_penalty: 0.3,
        logit_bias: bias(2.0),
        bad_token_ids: vec![1],
        bad_words_token_ids: vec![vec![9, 8, 10], vec![8, 9, 10, 12]],
        min_tokens: 6,
        ..base()
    };
    let b = base;
    let table = [
        (
            b(),
            SamplingParams {
                temperature: 1.08,
                ..b()
            },
        ),
        (
            SamplingParams {
                temperature: 0.5,
                ..b()
            },
            SamplingParams {
                temperature: 0.53,
                ..b()
            },
        ),
        (
            SamplingParams {
                temperature: 2.0,
                ..b()
            },
            SamplingParams {
                temperature: 1.85,
                ..b()
            },
        ),
        (
            SamplingParams { top_k: 5, ..b() },
            SamplingParams { top_k: 4, ..b() },
        ),
        (
            SamplingParams { top_p: 0.7, ..b() },
            SamplingParams { top_p: 0.6, ..b() },
        ),
        (
            SamplingParams { min_p: 0.1, ..b() },
            SamplingParams { min_p: 0.2, ..b() },
        ),
        (
            SamplingParams {
                repetition_penalty: 1.5,
                ..b()
            },
            b(),
        ),
        (
            SamplingParams {
                presence_penalty: 1.0,
                ..b()
            },
            b(),
        ),
        (
            SamplingParams {
                frequency_penalty: 0.5,
                ..b()
            },
            SamplingParams {
                presence_penalty: 0.5,
                ..b()
            },
        ),
        (
            SamplingParams {
                logit_bias: bias(4.0),
                ..b()
            },
            SamplingParams {
                logit_bias: bias(3.5),
                ..b()
            },
        ),
        (
            SamplingParams {
                allowed_token_ids: Some(vec![1, 5, 8, 30]),
                ..b()
            },
            SamplingParams {
                allowed_token_ids: Some(vec![1, 5, 8]),
                ..b()
            },
        ),
        (
            SamplingParams {
                min_tokens: 5,
                bad_token_ids: vec![13],
                ..b()
            },
            SamplingParams {
                min_tokens: 6,
                bad_token_ids: vec![13, 14],
                ..b()
            },
        ),
        (
            combined.clone(),
            SamplingParams {
                top_p: 0.8,
                ..combined.clone()
            },
        ),
        (
            combined.clone(),
            SamplingParams {
                repetition_penalty: 1.0,
                ..combined
            },
        ),
    ];
    for (right, wrong) in table {
        let counts = counts(&logits, &right);
        let fit = deviation(&counts, &exact(&logits, &right));
        assert!(fit < 3.5, "{fit} deviations: {right:?}");
        let control = deviation(&counts, &exact(&logits, &wrong));
        assert!(
            control > 6.0,
            "a wrong distribution passes ({control}): {wrong:?}"
        );
    }
}

/// Tokens at successive positions of one sequence are independent of each other.
#[test]
fn successive_positions_are_independent() {
    let width = 8;
    let logits = vec![0.0; width];
    let params = Arc::new(base());
    let mut state = SeqState::new(params, 99, &[0], 1, &[], width).unwrap();
    let mut sampler = RowSampler::default();
    let mut pairs = vec![0; width * width];
    let mut last = 0;
    for _ in 0..DRAWS {
        let (token, _) = sampler.sample(&logits, &state).unwrap();
        state.append(token);
        pairs[last * width + token as usize] += 1;
        last = token as usize;
    }
    let uniform = vec![1.0 / (width * width) as f64; width * width];
    let fit = deviation(&pairs, &uniform);
    assert!(fit < 3.5, "{fit} deviations");
}

/// Kolmogorov-Smirnov distance of numbers from the Gumbel distribution, times sqrt(n).
fn distance_from_gumbel(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    let n = numbers.len() as f64;
    let gaps = numbers.iter().enumerate().map(|(i, &g)| {
        let cdf = (-(-g).exp()).exp();
        (cdf - i as f64 / n)
            .abs()
            .max((cdf - (i + 1) as f64 / n).abs())
    });
    gaps.fold(0.0, f64::max) * n.sqrt()
}

#[test]
fn noise_has_the_gumbel_distribution() {
    let over_tokens: Vec<f64> = (0..100_000).map(|t| Noise::new(3, 5).gumbel(t)).collect();
    let over_positions: Vec<f64> = (0..100_000).map(|p| Noise::new(3, p).gumbel(5)).collect();
    let over_seeds: Vec<f64> = (0..100_000).map(|s| Noise::new(s, 3).gumbel(5)).collect();
    for numbers in [&over_tokens, &over_positions, &over_seeds] {
        // 1.95 is exceeded by chance once in a thousand.
        assert!(distance_from_gumbel(numbers.clone()) < 1.95);
        let shifted = numbers.iter().map(|g| g + 0.02).collect();
        assert!(
            distance_from_gumbel(shifted) > 1.95,
            "a wrong distribution passes"
        );
    }
}

/// A large vocabulary: the pruned race still draws by the exact distribution. Tokens are grouped
/// by rank, as most are never drawn.
#[test]
fn large_vocabulary() {
    let mut rng = common::rng(4);
    let logits: Vec<f32> = (0..20_011).map(|_| common::normal(&mut rng)).collect();
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[a].total_cmp(&logits[b]));
    let mut groups = vec![0; logits.len()];
    order
        .iter()
        .enumerate()
        .for_each(|(rank, &token)| groups[token] = rank * 50 / logits.len());
    let grouped = |per_token: &[f64]| {
        let mut sums = vec![0.0; 50];
        groups
            .iter()
            .zip(per_token)
            .for_each(|(&group, value)| sums[group] += value);
        sums
    };
    let params = Arc::new(SamplingParams {
        top_p: 0.95,
        ..base()
    });
    let mut state = SeqState::new(params.clone(), 1, &[0], 1, &[], logits.len()).unwrap();
    let mut sampler = RowSampler::default();
    let mut drawn = vec![0.0; logits.len()];
    for _ in 0..4000 {
        let (token, _) = sampler.sample(&logits, &state).unwrap();
        state.append(token);
        drawn[token as usize] += 1.0;
    }
    let counts: Vec<usize> = grouped(&drawn)
        .iter()
        .map(|&count| count as usize)
        .collect();
    let fit = deviation(&counts, &grouped(&exact(&logits, &params)));
    assert!(fit < 3.5, "{fit} deviations");
    let wrong = SamplingParams {
        top_p: 0.93,
        ..base()
    };
    let control = deviation(&counts, &grouped(&exact(&logits, &wrong)));
    assert!(control > 6.0, "a wrong distribution passes ({control})");
    let wrong = SamplingParams {
        temperature: 1.2,
        ..(*params).clone()
    };
    let control = deviation(&counts, &grouped(&exact(&logits, &wrong)));
    assert!(control > 6.0, "a wrong distribution passes ({control})");
}
