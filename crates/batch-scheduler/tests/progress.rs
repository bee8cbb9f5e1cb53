//! The progress guarantee: in the order of service, the first sequence is never preempted and
//! computes something in every step, so the steps of a workload are bounded by the sum of what
//! each sequence takes alone.

mod common;

use batch_scheduler::{
    Fcfs, PreemptionMode, Priority, Request, SchedulerConfig, SchedulingPolicy, StopCriteria,
    VictimRule, WeightedFair,
};
use common::model::Params;
use common::world::World;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

fn policies() -> Vec<Box<dyn SchedulingPolicy>> {
    let victim = VictimRule::LeastLostWork;
    vec![
        Box::new(Fcfs::default()),
        Box::new(Fcfs { victim }),
        Box::new(Priority::default()),
        Box::new(Priority { victim }),
        Box::new(WeightedFair::new()),
    ]
}

/// Forty sequences in a cache that holds one: they preempt each other all the time.
fn steps_and_bound(
    seed: u64,
    depth: usize,
    host_blocks: u32,
    policy: Box<dyn SchedulingPolicy>,
) -> (World, usize) {
    let mut rng = StdRng::seed_from_u64(seed);
    let config = SchedulerConfig {
        max_num_seqs: 8,
        max_num_batched_tokens: 11,
        max_model_len: 40,
        max_steps_in_flight: depth,
        preemption_mode: match host_blocks {
            0 => PreemptionMode::Recompute,
            _ => PreemptionMode::Swap,
        },
        ..SchedulerConfig::default()
    };
    let chunk = config.max_num_batched_tokens - config.max_num_seqs + 1;
    let mut world = World::new(config, 13, host_blocks, 3, policy);
    let mut bound = 0;
    for id in 0..40 {
        let prompt: Vec<u32> = (0..rng.random_range(1..12)).map(|_| rng.random()).collect();
        let output = rng.random_range(1..=39 - prompt.len());
        bound += (prompt.len() + output).div_ceil(chunk) + output;
        let params = Params {
            seed: id,
            vocab: 1 << 20,
            fails_at: None,
        };
        let mut request = Request::new(id, prompt, StopCriteria::max_tokens(output as u32), params);
        request.priority = rng.random_range(0..3);
        world.add(request).expect("fits alone");
    }
    world.drain(depth);
    (world, bound)
}

#[test]
fn steps_are_bounded_whatever_the_policy() {
    let (mut preemptions, mut swapped) = (0, 0);
    for seed in 0..20 {
        for host_blocks in [0, 5, 40] {
            for policy in policies() {
                let (world, bound) = steps_and_bound(seed, 1, host_blocks, policy);
                assert!(world.steps <= bound, "{} steps, bound {bound}", world.steps);
                preemptions += world.preemptions;
                swapped += world.runner.swapped;
            }
        }
    }
    assert!(swapped > 1000, "{swapped} blocks swapped");
    assert!(preemptions > 1000, "{preemptions}: the cache was not tight");
}

#[test]
fn overlap_adds_at_most_the_steps_that_wait_for_blocks() {
    for seed in 0..20 {
        for depth in 2..=3 {
            for policy in policies() {
                let (world, bound) = steps_and_bound(seed, depth, 40 * (depth as u32 - 2), policy);
                let bound = bound * depth;
                assert!(world.steps <= bound, "{} steps, bound {bound}", world.steps);
            }
        }
    }
}
