//! Random operations on random configurations: every request must come to the tokens that a plain
//! sequential run gives, and nothing may leak, hang, or be written while a step reads it.

mod common;

use batch_scheduler::{
    AddError, Fcfs, ForkError, PreemptionMode, Priority, Request, SchedulerConfig,
    SchedulingPolicy, SeqParams, StopCriteria, VictimRule, WeightedFair,
};
use common::model::Params;
use common::world::World;
use paged_kv::Salt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

/// A configuration out of the corners: tiny pools and budgets, every switch.
fn random_world(rng: &mut StdRng) -> World {
    let block_size = *[1, 2, 3, 16].choose(rng).expect("not empty");
    let max_model_len = rng.random_range(2..=48);
    let max_num_seqs = rng.random_range(1..=8);
    let enable_chunked_prefill = rng.random_bool(0.8);
    let least = match enable_chunked_prefill {
        true => max_num_seqs,
        false => max_num_seqs.max(max_model_len),
    };
    let num_blocks = rng.random_range(1..=2 * max_model_len / block_size as usize + 3);
    let config = SchedulerConfig {
        max_num_seqs,
        max_num_batched_tokens: least + rng.random_range(0..=16),
        max_model_len,
        enable_chunked_prefill,
        long_prefill_token_threshold: *[0, 0, 1, 5].choose(rng).expect("not empty"),
        max_steps_in_flight: rng.random_range(1..=3),
        sliding_window: rng.random_bool(0.3).then(|| rng.random_range(1..=12)),
        watermark_blocks: *[0, 0, 1, 3].choose(rng).expect("not empty"),
        preemption_mode: match rng.random_bool(0.5) {
            true => PreemptionMode::Recompute,
            false => PreemptionMode::Swap,
        },
    };
    let host_blocks = match config.preemption_mode {
        PreemptionMode::Recompute => 0,
        PreemptionMode::Swap => rng.random_range(1..=40),
    };
    let config = SchedulerConfig {
        watermark_blocks: config.watermark_blocks.min(num_blocks - 1),
        ..config
    };
    let victim = match rng.random_bool(0.5) {
        true => VictimRule::Newest,
        false => VictimRule::LeastLostWork,
    };
    let policy: Box<dyn SchedulingPolicy> = match rng.random_range(0..4) {
        0 => Box::new(Fcfs { victim }),
        1 => Box::new(Priority { victim }),
        2 => Box::new(WeightedFair::new().with_weight(1, 3)),
        _ => Box::new(Erratic(StdRng::seed_from_u64(rng.random()))),
    };
    World::new(config, num_blocks, host_blocks, block_size, policy)
}

/// A policy without any sense; the guarantees must hold under it.
struct Erratic(StdRng);

impl SchedulingPolicy for Erratic {
    fn queue(&self, request: &batch_scheduler::RequestInfo) -> u64 {
        request.class
    }

    fn rank(&self, request: &batch_scheduler::RequestInfo) -> i64 {
        (request.arrival * 7 % 5) as i64
    }

    fn next_queue(&mut self, backlogged: &[u64]) -> usize {
        self.0.random_range(0..backlogged.len() + 1)
    }

    fn victim(&mut self, behind: &[batch_scheduler::Candidate]) -> usize {
        self.0.random_range(0..behind.len() + 1)
    }
}

fn random_request(rng: &mut StdRng, id: u64, max_model_len: usize) -> Request<Params> {
    // Few tokens and few prefixes, so that prompts share blocks.
    let vocab = *[1, 2, 5, 1000].choose(rng).expect("not empty");
    let len = rng.random_range(1..=max_model_len);
    let prompt = (0..len)
        .map(|i| match rng.random_bool(0.9) {
            true => (i % 3) as u32,
            false => rng.random_range(0..3),
        })
        .collect();
    let max_tokens = rng.random_range(1..=max_model_len as u32);
    let params = |rng: &mut StdRng| Params {
        seed: rng.random_range(0..4),
        vocab,
        fails_at: rng
            .random_bool(0.05)
            .then(|| rng.random_range(1..=max_model_len as u32)),
    };
    let n = if rng.random_bool(0.3) {
        rng.random_range(1..=4)
    } else {
        1
    };
    Request {
        n,
        stop: StopCriteria {
            min_tokens: rng.random_range(0..=max_tokens.min(6)),
            stop_token_ids: vec![3],
            eos_token_ids: vec![4, 77],
            ignore_eos: rng.random_bool(0.3),
            ..StopCriteria::max_tokens(max_tokens)
        },
        priority: rng.random_range(-2..=2),
        class: rng.random_range(0..3),
        salt: *[Salt::NONE, Salt::NONE, Salt::new(9)]
            .choose(rng)
            .expect("not empty"),
        use_prefix_cache: rng.random_bool(0.9),
        lockstep: rng.random_bool(0.5),
        params: SeqParams::PerSequence((0..n).map(|_| params(rng)).collect()),
        ..Request::new(id, prompt, StopCriteria::max_tokens(1), params(rng))
    }
}

/// Forks or rewrites some sequence, if it can be.
fn branch(rng: &mut StdRng, world: &mut World) -> bool {
    let Some(&of) = world.live().choose(rng) else {
        return false;
    };
    let to = match rng.random_bool(0.5) {
        true => of.1,
        false => rng.random_range(0..6),
    };
    let tail: Vec<u32> = (0..rng.random_range(0..3))
        .map(|_| rng.random_range(0..3))
        .collect();
    let params = Params {
        seed: rng.random_range(0..4),
        vocab: 5,
        fails_at: None,
    };
    match world.branch(of, to, rng.random_range(0..8), &tail, params) {
        Ok(()) => true,
        Err(ForkError::NoSequence { .. } | ForkError::KeepOutOfRange { .. }) => {
            panic!("{of:?} is live and keeps what it has")
        }
        Err(_) => false,
    }
}

/// One world's life. Returns the number of branches.
fn live(seed: u64, operations: usize) -> (usize, World) {
    let mut branches = 0;
    let mut rng = StdRng::seed_from_u64(seed);
    let mut world = random_world(&mut rng);
    let max_model_len = world.scheduler.config().max_model_len;
    let depth = world.scheduler.config().max_steps_in_flight;
    let drafting = rng.random_bool(0.3);
    let mut next_id = 0;
    for _ in 0..operations {
        match rng.random_range(0..100) {
            0..25 => {
                let request = random_request(&mut rng, next_id, max_model_len);
                next_id += 1;
                match world.add(request) {
                    Ok(())
                    | Err(
                        AddError::PromptTooLong { .. }
                        | AddError::NeverFits { .. }
                        | AddError::TooManySequences { .. },
                    ) => {}
                    Err(other) => panic!("{other}"),
                }
            }
            25..60 => {
                if drafting {
                    for (id, index) in world.live() {
                        let len = rng.random_range(0..5);
                        world.draft(id, index, len, rng.random_range(0..6));
                    }
                }
                world.launch();
            }
            60..90 => {
                world.collect();
            }
            90..93 => branches += usize::from(branch(&mut rng, &mut world)),
            93..95 => {
                if let Some(&(id, _)) = world.live().choose(&mut rng) {
                    assert!(world.abort(id));
                    assert!(!world.abort(id));
                }
            }
            95..99 => {
                if let Some(&(id, index)) = world.live().choose(&mut rng) {
                    assert!(world.finish(id, index));
                    assert!(!world.finish(id, index));
                }
            }
            _ => world.drain(rng.random_range(1..=depth)),
        }
    }
    world.drain(depth);
    (branches, world)
}

#[test]
fn tokens_are_those_of_a_sequential_run() {
    let (mut operations, mut preemptions, mut copies, mut accepted, mut hits) = (0, 0, 0, 0, 0);
    let (mut branches, mut swapped) = (0, 0);
    for seed in 0..700 {
        let result = std::panic::catch_unwind(|| live(seed, 150));
        let Ok((branched, world)) = result else {
            panic!("seed {seed}");
        };
        operations += 150;
        branches += branched;
        swapped += world.runner.swapped;
        preemptions += world.preemptions;
        copies += world.runner.copies;
        accepted += world.runner.accepted;
        hits += world.scheduler.stats().totals.prefix_hits;
    }
    // The worlds must have gone where it hurts.
    assert!(operations >= 100_000);
    assert!(preemptions > 1_000, "{preemptions} preemptions");
    assert!(copies > 1_000, "{copies} copies");
    assert!(accepted > 1_000, "{accepted} accepted drafts");
    assert!(branches > 500, "{branches} forks and rewrites");
    assert!(swapped > 500, "{swapped} blocks swapped in");
    assert!(hits > 10_000, "{hits} prefix hits");
}
