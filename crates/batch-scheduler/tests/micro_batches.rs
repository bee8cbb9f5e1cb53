//! Micro-batches for pipeline stages: several steps in flight that share no sequence which waits
//! for a token.

mod common;

use std::collections::{HashMap, HashSet, VecDeque};

use batch_scheduler::{SchedulerConfig, SlotId};
use common::manual::{Plan, Sched, output, request, scheduler};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

fn config(depth: usize) -> SchedulerConfig {
    SchedulerConfig {
        max_num_seqs: 16,
        max_num_batched_tokens: 64,
        max_model_len: 400,
        max_steps_in_flight: depth,
        micro_batches: true,
        ..SchedulerConfig::default()
    }
}

fn sampled(plan: &Plan) -> Vec<u32> {
    plan.samples.iter().map(|s| s.slot.0).collect()
}

fn apply(s: &mut Sched, plan: &Plan) {
    s.apply(output(plan, 7), &mut Vec::new()).expect("in step");
}

#[test]
fn the_sequences_are_shared_out_among_the_steps_in_flight() {
    for (depth, count, shares) in [
        (2, 8, vec![4, 4]),
        (3, 8, vec![3, 3, 2]),
        (4, 2, vec![1, 1]),
    ] {
        let mut s = scheduler(config(depth), 400);
        for id in 0..count {
            s.add(request(id, 5, 40)).unwrap();
        }
        let mut in_flight: VecDeque<Plan> = std::iter::from_fn(|| s.schedule()).collect();
        for _ in 0..20 {
            let sizes: Vec<usize> = in_flight.iter().map(|p| p.samples.len()).collect();
            assert_eq!(sizes, shares, "{count} sequences on {depth} steps");
            let all: HashSet<u32> = in_flight.iter().flat_map(sampled).collect();
            assert_eq!(all.len(), count as usize, "no sequence is in two steps");
            // All of the first come back before any of the second do.
            for _ in 0..in_flight.len() {
                let plan = in_flight.pop_front().unwrap();
                apply(&mut s, &plan);
                in_flight.extend(s.schedule());
            }
        }
    }
}

#[test]
fn a_prompt_fills_the_share_of_a_step() {
    let mut s = scheduler(
        SchedulerConfig {
            mixed_step_tokens: 6,
            ..config(2)
        },
        400,
    );
    for id in 0..2 {
        s.add(request(id, 5, 40)).unwrap();
    }
    let first: Vec<Plan> = std::iter::from_fn(|| s.schedule()).collect();
    apply(&mut s, &first[0]);
    s.add(request(2, 40, 40)).unwrap();
    // Two decode, but one in this step.
    let rows: Vec<u32> = s
        .schedule()
        .unwrap()
        .rows
        .iter()
        .map(|row| row.len)
        .collect();
    assert_eq!(rows, [1, 5]);
}

#[test]
fn the_chunks_of_a_prompt_follow_each_other() {
    let mut s = scheduler(config(3), 400);
    s.add(request(0, 200, 4)).unwrap();
    let starts: Vec<u32> = std::iter::from_fn(|| s.schedule())
        .map(|plan| plan.rows[0].start)
        .collect();
    assert_eq!(starts, [0, 64, 128]);
}

#[test]
fn what_a_sequence_leaves_is_taken_up() {
    let mut s = scheduler(config(2), 400);
    for id in 0..6 {
        // Half of them end early: all in the first step.
        s.add(request(id, 5, if id < 3 { 2 } else { 60 })).unwrap();
    }
    let mut in_flight: VecDeque<Plan> = std::iter::from_fn(|| s.schedule()).collect();
    for _ in 0..12 {
        let plan = in_flight.pop_front().unwrap();
        apply(&mut s, &plan);
        in_flight.extend(std::iter::from_fn(|| s.schedule()));
    }
    let sizes: Vec<usize> = in_flight.iter().map(|p| p.samples.len()).collect();
    assert_eq!(sizes.iter().sum::<usize>(), 3);
    assert!(sizes.contains(&2), "three in two steps: {sizes:?}");
}

/// Long prompts come all the time; no sequence may wait for its next token longer than the steps
/// in flight take.
#[test]
fn nobody_waits_for_more_than_the_steps_in_flight() {
    for seed in 0..40 {
        let mut rng = StdRng::seed_from_u64(seed);
        let depth = rng.random_range(2..=4);
        let mut s = scheduler(config(depth), 4000);
        let mut in_flight: VecDeque<Plan> = VecDeque::new();
        let mut last: HashMap<SlotId, u64> = HashMap::new();
        let mut next = 0;
        for _ in 0..400 {
            if rng.random_bool(0.3) {
                let len = *[3, 5, 150, 300].get(rng.random_range(0..4)).unwrap();
                s.add(request(next, len, rng.random_range(1..60))).unwrap();
                next += 1;
            }
            while let Some(plan) = s.schedule() {
                for slot in &plan.released {
                    last.remove(slot);
                }
                for sample in &plan.samples {
                    if let Some(step) = last.insert(sample.slot, plan.step) {
                        let waited = plan.step - step;
                        assert!(waited <= 2 * depth as u64, "seed {seed}: {waited} steps");
                    }
                }
                in_flight.push_back(plan);
            }
            if let Some(plan) = in_flight.pop_front() {
                apply(&mut s, &plan);
            }
        }
    }
}
