//! The fast row path against the oracle: random parameters, sizes, shapes and histories.

mod common;

use std::sync::Arc;

use rand::Rng;
use sampler::oracle::{self, History};
use sampler::{RowSampler, SamplingParams, SeqState};

/// Generates `steps` tokens by both and compares each; errors must be equal as well.
fn compare(case: u64, vocab_size: usize, steps: usize) {
    let mut rng = common::rng(case);
    let params = common::params(&mut rng, vocab_size);
    compare_params(case, params, vocab_size, steps);
}

fn compare_params(case: u64, params: SamplingParams, vocab_size: usize, steps: usize) {
    let mut rng = common::rng(case + 1_000_000);
    let params = Arc::new(params);
    let seed = rng.random();
    let prompt: Vec<u32> = (0..rng.random_range(1..9))
        .map(|_| rng.random_range(0..vocab_size as u32))
        .collect();
    let stop_ids = [rng.random_range(0..vocab_size as u32)];
    let new = |tokens: &[u32]| {
        SeqState::new(
            params.clone(),
            seed,
            tokens,
            prompt.len(),
            &stop_ids,
            vocab_size,
        )
        .unwrap()
    };
    let mut state = new(&prompt);
    let mut output: Vec<u32> = Vec::new();
    let mut fast = RowSampler::default();
    for step in 0..steps {
        let logits = common::logits(&mut rng, vocab_size);
        let history = History {
            params: &params,
            seed,
            prompt: &prompt,
            output: &output,
            stop_ids: &stop_ids,
        };
        let expected = oracle::sample_row(&logits, &history);
        let found = fast.sample(&logits, &state).map(|(token, _)| token);
        assert_eq!(
            found, expected,
            "case {case}, step {step}, {vocab_size} tokens, {params:?}"
        );
        // The token that was sampled, or any other where none could be.
        let token = expected.unwrap_or_else(|_| rng.random_range(0..vocab_size as u32));
        state.append(token);
        output.push(token);
        // A preempted sequence is admitted anew with what it generated so far.
        let again = new(&[prompt.as_slice(), &output].concat());
        assert_eq!(fast.sample(&logits, &again), fast.sample(&logits, &state));
    }
}

#[test]
fn small_vocabularies() {
    for case in 0..1500 {
        let vocab_size = common::rng(case + 77).random_range(1..400);
        compare(case, vocab_size, 6);
    }
}

#[test]
fn vocabularies_of_real_size() {
    for case in 2000..2040 {
        let vocab_size = common::rng(case + 77).random_range(5_000..40_000);
        compare(case, vocab_size, 2);
    }
    compare(3000, 151_936, 2);
}

/// Every filter alone and all together, where random draws might not reach.
#[test]
fn filters_on_every_shape() {
    let base = SamplingParams {
        max_tokens: None,
        ..Default::default()
    };
    let table = [
        SamplingParams {
            top_k: 1,
            ..base.clone()
        },
        SamplingParams {
            top_k: 7,
            ..base.clone()
        },
        SamplingParams {
            top_k: 2000,
            ..base.clone()
        },
        SamplingParams {
            top_p: 0.5,
            ..base.clone()
        },
        SamplingParams {
            top_p: 0.999_999,
            ..base.clone()
        },
        SamplingParams {
            min_p: 1e-30,
            ..base.clone()
        },
        SamplingParams {
            min_p: 0.2,
            temperature: 0.3,
            ..base.clone()
        },
        SamplingParams {
            top_k: 900,
            top_p: 0.8,
            min_p: 0.01,
            ..base
        },
    ];
    for (case, params) in (4000..).zip(table) {
        for vocab_size in [1, 63, 64, 65, 2999] {
            compare_params(case, params.clone(), vocab_size, 30);
        }
    }
}
