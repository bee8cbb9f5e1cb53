//! A scheduler with work and without a model, for the bench and for `examples/core_rows.rs`.

use std::hint::black_box;
use std::time::{Duration, Instant};

use batch_scheduler::{
    Event, Request, Sampled, Scheduler, SchedulerConfig, StepOutput, StepPlan, StopCriteria,
};
use paged_kv::{BlockManager, BlockSize, Config};
use smallvec::smallvec;

pub type Sched = Scheduler<BlockManager, ()>;

const MAX_LEN: usize = 4096;

/// A scheduler for `seqs` sequences of up to `tokens` tokens each.
pub fn scheduler(seqs: usize, tokens: usize, max_batched: usize) -> Sched {
    with_blocks(seqs, seqs * tokens.div_ceil(16) + 1, max_batched)
}

/// The same on `blocks` blocks.
pub fn with_blocks(seqs: usize, blocks: usize, max_batched: usize) -> Sched {
    let kv = BlockManager::new(Config::new(blocks, BlockSize::default())).expect("pool");
    let config = SchedulerConfig {
        max_num_seqs: seqs,
        max_num_batched_tokens: max_batched,
        max_model_len: MAX_LEN,
        max_steps_in_flight: 1,
        ..SchedulerConfig::default()
    };
    Scheduler::new(config, kv).expect("config")
}

/// Adds `seqs` requests whose prompts share nothing and that never end by themselves.
pub fn add_all(s: &mut Sched, seqs: usize, prompt: usize) {
    for id in 0..seqs as u64 {
        let tokens = (0..prompt as u64).map(|i| (id * 7919 + i * 31) as u32 % 50_000);
        let stop = StopCriteria {
            eos_token_ids: vec![2, 3],
            ..StopCriteria::max_tokens(u32::MAX / 8)
        };
        let request = Request::new(id, tokens.collect(), stop, ());
        s.add(request).expect("fits");
    }
}

/// What a model returns that says 11 to everyone.
#[inline(never)] // so that a profile can tell it from the scheduler
pub fn output(plan: &StepPlan<()>) -> StepOutput<()> {
    let sampled = |_: &_| Sampled {
        tokens: smallvec![11],
        extras: Vec::new(),
        error: None,
    };
    StepOutput {
        step: plan.step,
        samples: plan.samples.iter().map(sampled).collect(),
        prompt_extras: Vec::new(),
    }
}

/// One step, the model's part left out of the clock.
#[inline(never)]
pub fn timed_step(s: &mut Sched, events: &mut Vec<Event<()>>) -> Duration {
    let start = Instant::now();
    let plan = s.schedule().expect("work");
    let scheduled = start.elapsed();
    let out = output(&plan);
    events.clear();
    let start = Instant::now();
    s.recycle(plan);
    s.apply(out, events).expect("in step");
    black_box(&events);
    scheduled + start.elapsed()
}
