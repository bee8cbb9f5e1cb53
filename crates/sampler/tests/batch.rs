//! The batch: independence of its rows, errors, slots.

mod common;

use std::sync::Arc;

use rand::Rng;
use rand::seq::SliceRandom;
use sampler::{
    AdmitError, BatchSampler, SampleError, SampleResult, SamplingParams, TokenLogprobs,
    prompt_logprobs,
};

const VOCAB_SIZE: usize = 30_011;

/// Logits that depend on the sequence alone, as a model's do.
fn logits(sequence: u32, step: u32) -> Vec<f32> {
    let mut rng = common::rng(u64::from(sequence) << 32 | u64::from(step));
    (0..VOCAB_SIZE)
        .map(|_| rng.random::<f32>() * 12.0)
        .collect()
}

fn params(sequence: u32) -> Arc<SamplingParams> {
    let base = SamplingParams {
        max_tokens: None,
        ..Default::default()
    };
    Arc::new(match sequence % 4 {
        0 => base,
        1 => SamplingParams {
            temperature: 0.0,
            repetition_penalty: 1.2,
            ..base
        },
        2 => SamplingParams {
            top_k: 30,
            frequency_penalty: 0.5,
            logprobs: Some(2),
            ..base
        },
        _ => SamplingParams {
            top_p: 0.8,
            min_p: 0.001,
            ..base
        },
    })
}

fn admit(sampler: &mut BatchSampler, slot: u32, sequence: u32) {
    let prompt = [sequence, 1, 2];
    sampler
        .admit(
            slot,
            params(sequence),
            1000 + u64::from(sequence),
            &prompt,
            3,
            &[0],
        )
        .unwrap();
}

/// A sequence's tokens are the same alone as in batches of changing size, order, company, slot
/// and number of threads.
#[test]
fn batch_mates_do_not_matter() {
    let (sequences, steps) = (12, 5);
    let alone: Vec<Vec<SampleResult>> = (0..sequences)
        .map(|sequence| {
            let mut sampler = BatchSampler::with_threads(VOCAB_SIZE, 1);
            admit(&mut sampler, 0, sequence);
            (0..steps)
                .flat_map(|step| sampler.sample(&logits(sequence, step), &[0]))
                .collect()
        })
        .collect();
    for threads in [1, 2, 5] {
        let mut rng = common::rng(threads as u64);
        let mut sampler = BatchSampler::with_threads(VOCAB_SIZE, threads);
        let mut slots: Vec<u32> = (0..sequences + 5).collect();
        slots.shuffle(&mut rng);
        (0..sequences).for_each(|s| admit(&mut sampler, slots[s as usize], s));
        let mut done = vec![0; sequences as usize];
        while done.iter().any(|&step| step < steps) {
            let mut batch: Vec<u32> = (0..sequences)
                .filter(|&s| done[s as usize] < steps && rng.random())
                .collect();
            batch.shuffle(&mut rng);
            let rows: Vec<f32> = batch
                .iter()
                .flat_map(|&s| logits(s, done[s as usize]))
                .collect();
            let at: Vec<u32> = batch.iter().map(|&s| slots[s as usize]).collect();
            for (&s, result) in batch.iter().zip(sampler.sample(&rows, &at)) {
                let step = &mut done[s as usize];
                assert_eq!(result, alone[s as usize][*step as usize], "sequence {s}");
                *step += 1;
            }
        }
    }
}

#[test]
fn seeds_and_positions_matter() {
    let row = vec![0.0; VOCAB_SIZE];
    let mut sampler = BatchSampler::new(VOCAB_SIZE);
    let params = Arc::new(SamplingParams::default());
    for slot in 0..8 {
        let seed = if slot == 7 { 0 } else { slot.into() };
        sampler
            .admit(slot, params.clone(), seed, &[1], 1, &[])
            .unwrap();
    }
    let slots: Vec<u32> = (0..8).collect();
    let first: Vec<u32> = sampler
        .sample(&row.repeat(8), &slots)
        .iter()
        .map(|r| r.token)
        .collect();
    let second = sampler.sample(&row.repeat(8), &slots);
    assert_eq!(first[0], first[7], "equal seeds");
    let distinct: std::collections::HashSet<_> = first.iter().collect();
    assert_eq!(distinct.len(), 7);
    assert!(
        second
            .iter()
            .zip(&first)
            .all(|(second, first)| second.token != *first)
    );
}

#[test]
fn one_bad_row_costs_no_other() {
    let mut sampler = BatchSampler::with_threads(3, 2);
    let greedy = Arc::new(SamplingParams::greedy());
    for slot in 0..4 {
        sampler
            .admit(slot, greedy.clone(), 0, &[1], 1, &[])
            .unwrap();
    }
    let never = SamplingParams {
        bad_token_ids: vec![0, 1, 2],
        ..SamplingParams::greedy()
    };
    sampler.admit(4, Arc::new(never), 0, &[1], 1, &[]).unwrap();
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let rows = [
        [0.0, 1.0, 1.0],
        [0.0, 1.0, nan],
        [-inf, inf, 0.0],
        [-inf, -inf, -inf],
        [0.0, 1.0, 2.0],
        [0.0, 1.0, 2.0],
    ];
    let results = sampler.sample(rows.as_flattened(), &[0, 1, 2, 3, 4, 9]);
    let errors: Vec<_> = results.iter().map(|result| result.error.clone()).collect();
    let expected = [
        None,
        Some(SampleError::NotFinite { token: 2 }),
        Some(SampleError::NotFinite { token: 1 }),
        Some(SampleError::AllMasked),
        Some(SampleError::AllMasked),
        Some(SampleError::EmptySlot { slot: 9 }),
    ];
    assert_eq!(errors, expected);
    assert_eq!(results[0].token, 1, "of equal ones the first");
    let lengths: Vec<_> = (0..5)
        .map(|slot| sampler.state(slot).unwrap().num_output())
        .collect();
    assert_eq!(lengths, [1, 0, 0, 0, 0]);
}

#[test]
fn slots_are_taken_and_released() {
    let mut sampler = BatchSampler::new(10);
    let params = Arc::new(SamplingParams::default());
    let mut admit = |slot, params: &Arc<SamplingParams>, tokens: &[u32], num_prompt| {
        sampler.admit(slot, params.clone(), 0, tokens, num_prompt, &[])
    };
    admit(3, &params, &[1], 1).unwrap();
    assert_eq!(
        admit(3, &params, &[1], 1),
        Err(AdmitError::SlotTaken { slot: 3 })
    );
    assert_eq!(
        admit(0, &params, &[1], 2),
        Err(AdmitError::PromptLength {
            num_prompt: 2,
            num_tokens: 1
        })
    );
    assert_eq!(
        admit(0, &params, &[1, 10], 2),
        Err(AdmitError::TokenOutOfRange {
            token: 10,
            vocab_size: 10
        })
    );
    let wrong = Arc::new(SamplingParams {
        bad_token_ids: vec![11],
        ..Default::default()
    });
    let error = admit(0, &wrong, &[1], 1).unwrap_err();
    assert!(
        matches!(&error, AdmitError::Params(e) if e.param() == "bad_token_ids"),
        "{error}"
    );
    sampler.release(3);
    sampler.release(1000);
    assert!(sampler.state(3).is_none());
    sampler.admit(3, params, 0, &[1], 1, &[]).unwrap();
}

/// A slot named twice in one call is sampled as by two calls.
#[test]
fn repeated_slots() {
    let new = || {
        let mut sampler = BatchSampler::with_threads(5, 1);
        let params = SamplingParams {
            presence_penalty: 2.0,
            ..SamplingParams::greedy()
        };
        sampler.admit(0, Arc::new(params), 0, &[1], 1, &[]).unwrap();
        sampler
    };
    let row = [0.0, 1.0, 1.5, 0.5, 0.2];
    let together = new().sample(&row.repeat(3), &[0, 0, 0]);
    let mut sampler = new();
    let apart: Vec<_> = (0..3).flat_map(|_| sampler.sample(&row, &[0])).collect();
    assert_eq!(together, apart);
    assert_eq!(
        together.iter().map(|r| r.token).collect::<Vec<_>>(),
        [2, 1, 3]
    );
}

/// Log-probabilities against a direct computation, at sizes around those of the chunks.
#[test]
fn logprobs_by_definition() {
    for (vocab_size, count) in [
        (1, 1),
        (7, 3),
        (63, 0),
        (64, 5),
        (65, 70),
        (5003, 20),
        (999, -1),
    ] {
        let mut rng = common::rng(vocab_size as u64);
        // Rounded, so that there are ties.
        let row: Vec<f32> = (0..vocab_size)
            .map(|_| (common::normal(&mut rng) * 8.0).round() / 4.0)
            .collect();
        let total = row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
        let mut order: Vec<u32> = (0..vocab_size as u32).collect();
        order.sort_by(|&a, &b| row[b as usize].total_cmp(&row[a as usize]));
        for token in [0, vocab_size as u32 / 2, vocab_size as u32 - 1] {
            let logprob = |t: u32| (f64::from(row[t as usize]) - total) as f32;
            let shown = if count < 0 {
                vocab_size
            } else {
                vocab_size.min(count as usize)
            };
            let expected = TokenLogprobs {
                token,
                logprob: logprob(token),
                rank: row.iter().filter(|&&x| x >= row[token as usize]).count() as u32,
                top: order[..shown].iter().map(|&t| (t, logprob(t))).collect(),
            };
            let found = prompt_logprobs(&row, &[token], vocab_size, count)
                .unwrap()
                .remove(0);
            assert_eq!((found.token, found.rank), (expected.token, expected.rank));
            let pairs = found.top.iter().zip(&expected.top);
            assert_eq!(found.top.len(), expected.top.len());
            for (found, expected) in pairs.chain([(&(0, found.logprob), &(0, expected.logprob))]) {
                assert_eq!(found.0, expected.0, "{vocab_size} tokens");
                assert!(
                    (found.1 - expected.1).abs() < 1e-5,
                    "{found:?} {expected:?}"
                );
            }
        }
    }
    let out_of_range = SampleError::TokenOutOfRange {
        token: 2,
        vocab_size: 2,
    };
    assert_eq!(prompt_logprobs(&[0.0, 1.0], &[2], 2, 1), Err(out_of_range));
    let broken = SampleError::NotFinite { token: 1 };
    assert_eq!(prompt_logprobs(&[0.0, f32::NAN], &[0], 2, 1), Err(broken));
}

/// Log-probabilities are of the raw logits, whatever the parameters do to them.
#[test]
fn logprobs_are_raw() {
    let mut sampler = BatchSampler::new(3);
    let params = SamplingParams {
        temperature: 0.3,
        bad_token_ids: vec![2],
        logit_bias: [(0, 50.0)].into(),
        logprobs: Some(1),
        ..Default::default()
    };
    sampler.admit(0, Arc::new(params), 5, &[1], 1, &[]).unwrap();
    let row = [0.0, 0.0, 2.0_f32.ln()];
    let result = sampler.sample(&row, &[0]).remove(0);
    let logprobs = result.logprobs.unwrap();
    assert_eq!((result.token, logprobs.token, logprobs.rank), (0, 0, 3));
    assert!((logprobs.logprob - 0.25_f32.ln()).abs() < 1e-6);
    assert_eq!(logprobs.top[0].0, 2);
    assert!((logprobs.top[0].1 - 0.5_f32.ln()).abs() < 1e-6);
}

/// A mask does what `allowed_token_ids` with the same tokens does, in a batch where others have none.
#[test]
fn masks_are_allowed_tokens() {
    let mut rng = common::rng(41);
    for vocab_size in [1, 31, 32, 33, 95, 257] {
        for _ in 0..40 {
            let count = rng.random_range(1..6);
            let rows: Vec<f32> = (0..count)
                .flat_map(|_| common::logits(&mut rng, vocab_size))
                .collect();
            // Words may be missing at the end, and there may be more than the vocabulary has.
            let words = rng.random_range(0..=vocab_size.div_ceil(32) + 1);
            let mut masks: Vec<Vec<u32>> = Vec::new();
            for _ in 0..count {
                let dense: u32 = rng.random();
                masks.push((0..words).map(|_| rng.random::<u32>() & dense).collect());
            }
            let masked: Vec<bool> = (0..count).map(|_| rng.random()).collect();
            let mut one = BatchSampler::with_threads(vocab_size, 2);
            let mut other = BatchSampler::with_threads(vocab_size, 1);
            let mut hopeless = vec![false; count];
            for slot in 0..count {
                let mut params = common::params(&mut rng, vocab_size);
                params.logprobs = Some(3);
                let (seed, prompt) = (rng.random(), [0]);
                let slot_id = slot as u32;
                one.admit(slot_id, Arc::new(params.clone()), seed, &prompt, 1, &[])
                    .unwrap();
                if masked[slot] {
                    let bit = |t: &u32| {
                        let word = masks[slot].get(*t as usize / 32).copied().unwrap_or(0);
                        word >> (t % 32) & 1 == 1
                    };
                    let own = params.allowed_token_ids.take();
                    let ids = (0..vocab_size as u32).filter(bit);
                    let ids: Vec<u32> = ids
                        .filter(|t| own.as_ref().is_none_or(|own| own.contains(t)))
                        .collect();
                    hopeless[slot] = ids.is_empty();
                    // The parameters cannot say "none".
                    params.allowed_token_ids = (!ids.is_empty()).then_some(ids);
                }
                other
                    .admit(slot_id, Arc::new(params), seed, &prompt, 1, &[])
                    .unwrap();
            }
            let slots: Vec<u32> = (0..count as u32).collect();
            let pairs: Vec<(usize, &[u32])> = (0..count)
                .filter(|row| masked[*row])
                .map(|row| (row, masks[row].as_slice()))
                .collect();
            let got = one.sample_masked(&rows, &slots, &pairs);
            let expected = other.sample(&rows, &slots);
            for slot in 0..count {
                match hopeless[slot] {
                    true => assert_eq!(got[slot].error, Some(SampleError::AllMasked)),
                    false => assert_eq!(got[slot], expected[slot]),
                }
            }
        }
    }
}
