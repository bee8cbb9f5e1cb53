//! The life of a random world: whatever can be done to a scheduler, in any order. What happens is up
//! to a generator of random numbers, or to the bytes of a fuzzer that stand in for one.

use batch_scheduler::{
    AddError, Fcfs, ForkError, PreemptionMode, Priority, Request, SchedulerConfig,
    SchedulingPolicy, SeqParams, StopCriteria, VictimRule, WeightedFair,
};
use paged_kv::Salt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use super::model::Params;
use super::world::World;

/// A configuration out of the corners: tiny pools and budgets, every switch.
fn random_world(rng: &mut impl Rng) -> World {
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
        mixed_step_tokens: *[0, 0, 4, 9, 24].choose(rng).expect("not empty"),
        max_steps_in_flight: rng.random_range(1..=3),
        micro_batches: rng.random_bool(0.3),
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

fn random_params(rng: &mut impl Rng, vocab: u32, max_model_len: usize) -> Params {
    let fails = rng.random_bool(0.05);
    Params {
        seed: rng.random_range(0..4),
        vocab,
        fails_at: fails.then(|| rng.random_range(1..=max_model_len as u32)),
    }
}

fn random_request(rng: &mut impl Rng, id: u64, max_model_len: usize) -> Request<Params> {
    // Few tokens and few prefixes, so that prompts share blocks.
    let vocab: u32 = *[1, 2, 5, 1000].choose(rng).expect("not empty");
    let len = rng.random_range(1..=max_model_len);
    let prompt = (0..len)
        .map(|i| match rng.random_bool(0.9) {
            true => (i % 3) as u32,
            false => rng.random_range(0..3),
        })
        .collect();
    let max_tokens = rng.random_range(1..=max_model_len as u32);
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
        params: SeqParams::PerSequence(
            (0..n)
                .map(|_| random_params(rng, vocab, max_model_len))
                .collect(),
        ),
        ..Request::new(
            id,
            prompt,
            StopCriteria::max_tokens(1),
            random_params(rng, vocab, max_model_len),
        )
    }
}

/// Forks or rewrites some sequence, if it can be.
fn branch(rng: &mut impl Rng, world: &mut World) -> bool {
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
pub fn live(rng: &mut impl Rng, operations: usize) -> (usize, World) {
    let mut branches = 0;
    let mut world = random_world(rng);
    let max_model_len = world.scheduler.config().max_model_len;
    let depth = world.scheduler.config().max_steps_in_flight;
    let drafting = rng.random_bool(0.3);
    let mut next_id = 0;
    for _ in 0..operations {
        match rng.random_range(0..100) {
            0..25 => {
                let request = random_request(rng, next_id, max_model_len);
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
            90..93 => branches += usize::from(branch(rng, &mut world)),
            93..95 => {
                if let Some(&(id, _)) = world.live().choose(rng) {
                    assert!(world.abort(id));
                    assert!(!world.abort(id));
                }
            }
            95..97 => {
                if let Some(&(id, index)) = world.live().choose(rng) {
                    assert!(world.finish(id, index));
                    assert!(!world.finish(id, index));
                }
            }
            _ => match rng.random_bool(0.4) {
                true => world.drain(rng.random_range(1..=depth)),
                false => {
                    let small = rng.random_range(1..=8);
                    world.set_memory(if rng.random_bool(0.5) {
                        small
                    } else {
                        usize::MAX
                    });
                }
            },
        }
    }
    world.drain(depth);
    (branches, world)
}
