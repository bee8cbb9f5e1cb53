//! Random rows and parameters that several tests draw from.
#![allow(dead_code, reason = "each test uses its part")]

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use sampler::{SampleResult, SamplingParams};

pub fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// Roughly normal numbers: the sum of uniform ones.
pub fn normal(rng: &mut StdRng) -> f32 {
    (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0
}

/// Logits of many shapes: flat, peaked, tied, with -inf, with huge ranges, all -inf but one.
pub fn logits(rng: &mut StdRng, vocab_size: usize) -> Vec<f32> {
    let scale = *[0.01, 1.0, 3.0, 10.0, 1e4].choose(rng).unwrap();
    let shift = *[0.0, 0.0, -300.0, 1e6].choose(rng).unwrap();
    let mut row: Vec<f32> = (0..vocab_size)
        .map(|_| normal(rng) * scale + shift)
        .collect();
    match rng.random_range(0..8) {
        0 => row.iter_mut().for_each(|x| *x = x.round()),
        1 => row.fill(shift),
        2 => {
            let kept = rng.random_range(0..vocab_size);
            (0..vocab_size)
                .filter(|&i| i != kept)
                .for_each(|i| row[i] = f32::NEG_INFINITY);
        }
        3 => {
            for x in row.iter_mut().skip(1) {
                if rng.random_bool(0.5) {
                    *x = f32::NEG_INFINITY;
                }
            }
        }
        4 => (row[0], row[vocab_size - 1]) = (f32::MAX, -f32::MAX),
        _ => {}
    }
    row
}

fn ids(rng: &mut StdRng, vocab_size: usize, most: usize) -> Vec<u32> {
    let count = rng.random_range(0..=most);
    (0..count)
        .map(|_| rng.random_range(0..vocab_size as u32))
        .collect()
}

/// Parameters with each option off more often than on. Valid for the vocabulary.
pub fn params(rng: &mut StdRng, vocab_size: usize) -> SamplingParams {
    let mut on = |probability: f64| rng.random_bool(probability);
    let (k, p, m, r, s, a) = (on(0.4), on(0.4), on(0.3), on(0.3), on(0.3), on(0.2));
    let (greedy, bans, early) = (on(0.15), on(0.3), on(0.3));
    let mut params = SamplingParams {
        temperature: *[0.01, 0.3, 0.7, 1.0, 1.0, 1.6, 2.0].choose(rng).unwrap(),
        max_tokens: None,
        ..Default::default()
    };
    if greedy {
        params.temperature = 0.0;
    }
    if k {
        params.top_k = rng.random_range(1..=(vocab_size as i32 + 3));
        if rng.random_bool(0.7) {
            params.top_k = params.top_k.min(40);
        }
    }
    if p {
        params.top_p = *[1e-6, 0.1, 0.5, 0.9, 0.999].choose(rng).unwrap();
    }
    if m {
        params.min_p = *[1e-4, 0.05, 0.3, 1.0].choose(rng).unwrap();
    }
    if r {
        params.repetition_penalty = *[0.8, 1.1, 1.5].choose(rng).unwrap();
    }
    if s {
        params.presence_penalty = *[-0.5, 0.7].choose(rng).unwrap();
        params.frequency_penalty = *[0.0, 0.3, -0.2].choose(rng).unwrap();
        params.logit_bias = ids(rng, vocab_size, 4)
            .into_iter()
            .map(|t| (t, 2.5))
            .collect();
        if rng.random_bool(0.3) {
            params.logit_bias.insert(0, 1e5);
        }
    }
    if a {
        params.allowed_token_ids = Some(ids(rng, vocab_size, 20));
        params.allowed_token_ids.as_mut().unwrap().push(0);
    }
    if bans {
        params.bad_token_ids = ids(rng, vocab_size, 5);
        let mut words: Vec<Vec<u32>> = (0..3).map(|_| ids(rng, vocab_size, 3)).collect();
        words.retain(|word| !word.is_empty());
        params.bad_words_token_ids = words;
    }
    if early {
        params.min_tokens = rng.random_range(0..4);
        params.stop_token_ids = ids(rng, vocab_size, 3);
    }
    params
}

/// How many standard deviations Pearson's statistic lies above what chance gives (Wilson and
/// Hilferty 1931); infinite if something impossible was drawn. Rare tokens share a bin.
pub fn deviation(counts: &[usize], probabilities: &[f64]) -> f64 {
    let draws = counts.iter().sum::<usize>() as f64;
    let (mut bins, mut rare) = (Vec::new(), (0.0, 0.0));
    for (&count, &p) in counts.iter().zip(probabilities) {
        let (seen, expected) = (count as f64, p * draws);
        if expected == 0.0 && count > 0 {
            return f64::INFINITY;
        }
        if expected >= 8.0 {
            bins.push((seen, expected));
        } else {
            rare = (rare.0 + seen, rare.1 + expected);
        }
    }
    if rare.1 > 0.5 {
        bins.push(rare);
    }
    let statistic: f64 = bins.iter().map(|(seen, e)| (seen - e).powi(2) / e).sum();
    let freedom = bins.len() as f64 - 1.0;
    if freedom < 1.0 {
        return 0.0;
    }
    let spread = 2.0 / (9.0 * freedom);
    ((statistic / freedom).cbrt() - (1.0 - spread)) / spread.sqrt()
}

/// Equal but for the rounding of log-probabilities.
pub fn assert_same(found: &SampleResult, expected: &SampleResult, what: &str) {
    assert_eq!(
        (found.token, &found.error),
        (expected.token, &expected.error),
        "{what}"
    );
    assert_eq!(
        found.logprobs.is_some(),
        expected.logprobs.is_some(),
        "{what}"
    );
    let (Some(found), Some(expected)) = (&found.logprobs, &expected.logprobs) else {
        return;
    };
    let close = |a: f32, b: f32| a == b || (a - b).abs() <= 1e-6 * b.abs().max(1.0);
    assert_eq!(
        (found.token, found.rank),
        (expected.token, expected.rank),
        "{what}"
    );
    assert!(
        close(found.logprob, expected.logprob),
        "{what}: {found:?} {expected:?}"
    );
    assert_eq!(found.top.len(), expected.top.len(), "{what}");
    for (a, b) in found.top.iter().zip(&expected.top) {
        assert!(a.0 == b.0 && close(a.1, b.1), "{what}: {a:?} {b:?}");
    }
}
