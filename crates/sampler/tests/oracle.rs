//! The oracle itself, against numbers worked out by hand.

use sampler::SamplingParams;
use sampler::oracle::{self, History};

fn base() -> SamplingParams {
    SamplingParams {
        max_tokens: None,
        ..Default::default()
    }
}

#[test]
fn distributions_by_hand() {
    // Probabilities 8, 4, 2, 1, 1 sixteenths.
    let logits = [8.0_f32, 4.0, 2.0, 1.0, 1.0].map(f32::ln);
    let table: [(SamplingParams, [f64; 5]); 9] = [
        (base(), [8.0, 4.0, 2.0, 1.0, 1.0]),
        (
            SamplingParams {
                temperature: 0.5,
                ..base()
            },
            [64.0, 16.0, 4.0, 1.0, 1.0],
        ),
        (
            SamplingParams {
                temperature: 0.0,
                ..base()
            },
            [1.0, 0.0, 0.0, 0.0, 0.0],
        ),
        (
            SamplingParams { top_k: 2, ..base() },
            [8.0, 4.0, 0.0, 0.0, 0.0],
        ),
        // Equal ones stay together.
        (
            SamplingParams { top_k: 4, ..base() },
            [8.0, 4.0, 2.0, 1.0, 1.0],
        ),
        (
            SamplingParams {
                top_p: 0.7,
                ..base()
            },
            [8.0, 4.0, 0.0, 0.0, 0.0],
        ),
        // Of what top-k leaves, 8/12 is enough.
        (
            SamplingParams {
                top_k: 2,
                top_p: 0.6,
                ..base()
            },
            [8.0, 0.0, 0.0, 0.0, 0.0],
        ),
        (
            SamplingParams {
                min_p: 0.2,
                ..base()
            },
            [8.0, 4.0, 2.0, 0.0, 0.0],
        ),
        (
            SamplingParams {
                logit_bias: [(4, 4.0_f32.ln())].into(),
                ..base()
            },
            [8.0, 4.0, 2.0, 1.0, 4.0],
        ),
    ];
    let check = |found: Vec<f64>, weights: &[f64], what: &SamplingParams| {
        let total: f64 = weights.iter().sum();
        for (p, w) in found.iter().zip(weights) {
            assert!(
                (p - w / total).abs() < 1e-6,
                "{found:?} is not {weights:?}: {what:?}"
            );
        }
    };
    let none = History {
        params: &base(),
        seed: 0,
        prompt: &[],
        output: &[],
        stop_ids: &[],
    };
    for (params, weights) in &table {
        let found = oracle::distribution(&logits, &History { params, ..none }).unwrap();
        check(found, weights, params);
    }
    // Token 0 in the prompt, token 1 twice and token 2 once in the output.
    let penalties = SamplingParams {
        repetition_penalty: 2.0,
        frequency_penalty: 0.25,
        presence_penalty: 0.5,
        ..base()
    };
    let history = History {
        params: &penalties,
        prompt: &[0],
        output: &[1, 2, 1],
        ..none
    };
    let weights = [
        8.0_f64.sqrt(),
        4.0_f64.sqrt() * (-1.0_f64).exp(),
        2.0_f64.sqrt() * (-0.75_f64).exp(),
        1.0,
        1.0,
    ];
    check(
        oracle::distribution(&logits, &history).unwrap(),
        &weights,
        &penalties,
    );
    // A negative logit is multiplied.
    let found = oracle::distribution(
        &[-1.0, 0.0],
        &History {
            output: &[],
            ..history
        },
    )
    .unwrap();
    check(found, &[(-2.0_f64).exp(), 1.0], &penalties);
    // Stops are banned for one more token; the bad word [2, 0] is about to be completed.
    let early = SamplingParams {
        min_tokens: 3,
        stop_token_ids: vec![4],
        bad_words_token_ids: vec![vec![2, 0], vec![1, 3]],
        ..base()
    };
    let history = History {
        params: &early,
        output: &[1, 2],
        stop_ids: &[3],
        ..none
    };
    check(
        oracle::distribution(&logits, &history).unwrap(),
        &[0.0, 4.0, 2.0, 0.0, 0.0],
        &early,
    );
    let history = History {
        output: &[1, 1, 1],
        ..history
    };
    check(
        oracle::distribution(&logits, &history).unwrap(),
        &[8.0, 4.0, 2.0, 0.0, 1.0],
        &early,
    );
}
