//! How far prompts fill steps in which sequences decode.

mod common;

use batch_scheduler::SchedulerConfig;
use common::manual::*;

/// Prompts fill steps up to `tokens`, and nothing else is in their way.
fn filled(tokens: usize) -> SchedulerConfig {
    SchedulerConfig {
        mixed_step_tokens: tokens,
        max_num_batched_tokens: 512,
        max_model_len: 512,
        ..config()
    }
}

#[test]
fn prompts_fill_the_steps_of_some_that_decode() {
    let mut s = scheduler(filled(10), 600);
    s.add(request(0, 20, 30)).unwrap();
    // Nobody decodes: the prompt is computed as fast as can be.
    assert_eq!(rows(&step(&mut s, 7).0), [(0, 20)]);
    s.add(request(1, 20, 30)).unwrap();
    s.add(request(2, 3, 30)).unwrap();
    assert_eq!(rows(&step(&mut s, 7).0), [(20, 1), (0, 9)]);
    assert_eq!(rows(&step(&mut s, 7).0), [(21, 1), (9, 9)]);
    assert_eq!(rows(&step(&mut s, 7).0), [(22, 1), (18, 2), (0, 3)]);
    // Three of ten decode, and a quarter or more: there is nothing to be had for nothing.
    s.add(request(3, 40, 2)).unwrap();
    assert_eq!(
        rows(&step(&mut s, 7).0),
        [(23, 1), (20, 1), (3, 1), (0, 40)]
    );
}

/// Of steps of 36 tokens, three and more are some.
#[test]
fn very_few_that_decode_wait_for_a_prompt() {
    let mut s = scheduler(filled(36), 600);
    for id in 0..2 {
        s.add(request(id, 4, 30)).unwrap();
    }
    step(&mut s, 7);
    s.add(request(2, 60, 30)).unwrap();
    assert_eq!(rows(&step(&mut s, 7).0), [(4, 1), (4, 1), (0, 60)]);
    s.add(request(3, 60, 30)).unwrap();
    let filled = [(5, 1), (5, 1), (60, 1), (0, 33)];
    assert_eq!(rows(&step(&mut s, 7).0), filled);
}

#[test]
fn who_has_its_last_token_in_flight_does_not_decode() {
    let config = SchedulerConfig {
        max_steps_in_flight: 2,
        ..filled(6)
    };
    let mut s = scheduler(config, 600);
    s.add(request(0, 20, 1)).unwrap();
    s.schedule().expect("a step");
    s.add(request(1, 40, 1)).unwrap();
    assert_eq!(rows(&s.schedule().expect("a step")), [(0, 40)]);
}

#[test]
fn who_cannot_enter_does_not_make_steps_longer() {
    let config = SchedulerConfig {
        long_prefill_token_threshold: 20,
        ..filled(8)
    };
    let mut s = scheduler(config, 100);
    s.add(request(0, 8, 100)).unwrap();
    step(&mut s, 7);
    s.add(request(1, 80, 10)).unwrap();
    assert_eq!(rows(&step(&mut s, 7).0), [(8, 1), (0, 7)]);
    // Until it was tried, it counts.
    s.add(request(2, 350, 10)).unwrap();
    assert_eq!(rows(&step(&mut s, 7).0), [(9, 1), (7, 20)]);
    assert_eq!(rows(&step(&mut s, 7).0), [(10, 1), (27, 7)]);
}

#[test]
fn what_more_waits_than_fills_the_next_steps_is_computed_at_once() {
    let config = SchedulerConfig {
        max_num_seqs: 8,
        ..filled(8)
    };
    let mut s = scheduler(config, 600);
    s.add(request(0, 8, 100)).unwrap();
    step(&mut s, 7);
    for id in 1..5 {
        s.add(request(id, 100, 50)).unwrap();
    }
    let prompts = |plan: &Plan| plan.rows.iter().map(|r| r.len as usize).sum::<usize>() - 1;
    // One decodes, so seven tokens fill a step: twelve such steps are left over.
    assert_eq!(prompts(&step(&mut s, 7).0), 400 - 12 * 7);
    // Four decode, half of eight: the rest at once.
    assert_eq!(prompts(&step(&mut s, 7).0), 3 + 12 * 7);
    // No more than have a slot: of 40 prompts of 100 tokens three can enter.
    let mut s = scheduler(filled(8), 600);
    s.add(request(0, 8, 100)).unwrap();
    step(&mut s, 7);
    for id in 1..41 {
        s.add(request(id, 100, 2)).unwrap();
    }
    assert_eq!(prompts(&step(&mut s, 7).0), 300 - 12 * 7);
}
