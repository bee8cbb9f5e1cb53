//! Steps by hand, for tests of one rule each.

use batch_scheduler::{
    Event, Fcfs, Request, RequestId, Sampled, Scheduler, SchedulerConfig, SchedulingPolicy,
    SeqState, StepOutput, StepPlan, StopCriteria,
};
use paged_kv::{BlockManager, BlockSize, Config, TokenId};
use smallvec::smallvec;

pub type Sched = Scheduler<BlockManager, &'static str>;
pub type Plan = StepPlan<&'static str>;
pub type News = Event<()>;

pub fn config() -> SchedulerConfig {
    SchedulerConfig {
        max_num_seqs: 4,
        max_num_batched_tokens: 16,
        max_model_len: 32,
        max_steps_in_flight: 1,
        ..SchedulerConfig::default()
    }
}

/// A scheduler on `blocks` blocks of 4 tokens.
pub fn scheduler(config: SchedulerConfig, blocks: usize) -> Sched {
    with_policy(config, blocks, Box::new(Fcfs::default()))
}

pub fn with_policy(
    config: SchedulerConfig,
    blocks: usize,
    policy: Box<dyn SchedulingPolicy>,
) -> Sched {
    let size = BlockSize::new(4).expect("4 is not 0");
    let kv = BlockManager::new(Config::new(blocks + 1, size)).expect("pool");
    Scheduler::with_policy(config, kv, policy).expect("config")
}

/// A prompt of `len` tokens that shares no block with another request's.
pub fn request(id: u64, len: usize, max_tokens: u32) -> Request<&'static str> {
    let prompt = (0..len as u32).map(|i| id as u32 * 1000 + i).collect();
    Request::new(id, prompt, StopCriteria::max_tokens(max_tokens), "params")
}

/// The result of a plan in which every sample is `token`.
pub fn output(plan: &Plan, token: TokenId) -> StepOutput<()> {
    let sampled = |_: &_| Sampled {
        tokens: smallvec![token],
        extras: Vec::new(),
        error: None,
    };
    StepOutput {
        step: plan.step,
        samples: plan.samples.iter().map(sampled).collect(),
        prompt_extras: Vec::new(),
    }
}

/// Plans and applies a step.
pub fn step(s: &mut Sched, token: TokenId) -> (Plan, Vec<News>) {
    let plan = s.schedule().expect("a step");
    let mut events = Vec::new();
    s.apply(output(&plan, token), &mut events).expect("in step");
    (plan, events)
}

/// `(start, len)` of each row.
pub fn rows(plan: &Plan) -> Vec<(u32, u32)> {
    plan.rows.iter().map(|r| (r.start, r.len)).collect()
}

pub fn state(s: &Sched, id: u64, index: u32) -> Option<SeqState> {
    s.snapshot()
        .iter()
        .find(|q| q.id == RequestId(id) && q.index == index)
        .map(|q| q.state)
}

pub fn ended(events: &[News]) -> Vec<(u64, u32, String)> {
    let end = |e: &News| match e {
        Event::Finished {
            id, index, reason, ..
        } => Some((id.0, *index, format!("{reason:?}"))),
        _ => None,
    };
    events.iter().filter_map(end).collect()
}
