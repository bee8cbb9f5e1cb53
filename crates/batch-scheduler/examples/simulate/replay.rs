//! One run of a workload under one policy.

use std::collections::HashMap;

use batch_scheduler::{
    Event, Fcfs, Priority, Request, RequestId, Sampled, Scheduler, SchedulerConfig,
    SchedulingPolicy, StepOutput, StepPlan, StopCriteria, WeightedFair,
};
use paged_kv::{BlockManager, BlockSize, Config, TokenId};
use smallvec::smallvec;

use crate::options::Options;
use crate::trace::Arrival;

pub const BLOCK_SIZE: usize = 16;

/// Seconds a step takes: weights are read once, then every token costs its arithmetic and every
/// token of context its reading. About an 8B model on one large GPU.
struct Cost {
    step: f64,
    token: f64,
    context: f64,
}

const COST: Cost = Cost {
    step: 8e-3,
    token: 40e-6,
    context: 45e-9,
};

impl Cost {
    fn of(&self, plan: &StepPlan<()>) -> f64 {
        let tokens: u32 = plan.rows.iter().map(|r| r.len).sum();
        let context: u64 = plan.rows.iter().map(|r| u64::from(r.start + r.len)).sum();
        self.step + self.token * f64::from(tokens) + self.context * context as f64
    }
}

/// What came of a run.
pub struct Outcome {
    /// Output tokens a second.
    pub throughput: f64,
    /// Seconds from arrival to first token, sorted.
    pub ttft: Vec<f64>,
    /// Mean seconds between tokens after the first.
    pub tpot: f64,
    pub hit_rate: f64,
    pub preemptions: u64,
}

impl Outcome {
    pub fn quantile(&self, q: f64) -> f64 {
        let last = self.ttft.len().saturating_sub(1);
        let at = (last as f64 * q).round() as usize;
        self.ttft.get(at).copied().unwrap_or(f64::NAN)
    }
}

fn policy(name: &str) -> Result<Box<dyn SchedulingPolicy>, String> {
    match name {
        "fcfs" => Ok(Box::new(Fcfs::default())),
        "priority" => Ok(Box::new(Priority::default())),
        "fair" => Ok(Box::new(WeightedFair::new())),
        _ => Err(format!(
            "unknown policy {name:?}; there are fcfs, priority, fair"
        )),
    }
}

/// Token ids: equal within the shared part of a class, different everywhere else.
fn prompt(id: usize, arrival: &Arrival) -> Vec<TokenId> {
    let run = |start: u64, offset: usize| (start as u32).wrapping_mul(8192) + offset as u32;
    let shared = (0..arrival.shared).map(|i| run(arrival.class, i) | 1 << 31);
    let own = (arrival.shared..arrival.prompt).map(|i| run(id as u64, i) & !(1 << 31));
    shared.chain(own).collect()
}

pub fn run(
    trace: &[Arrival],
    name: &str,
    options: &Options,
) -> Result<Outcome, Box<dyn std::error::Error>> {
    let size = BlockSize::new(BLOCK_SIZE as u32)?;
    // One block more: the manager keeps one as padding.
    let kv = BlockManager::new(Config::new(options.blocks + 1, size))?;
    let config = SchedulerConfig {
        max_num_seqs: options.max_num_seqs,
        max_num_batched_tokens: options.max_num_batched_tokens,
        max_model_len: 8192,
        max_steps_in_flight: 1,
        ..SchedulerConfig::default()
    };
    let mut scheduler = Scheduler::with_policy(config, kv, policy(name)?)?;

    let (mut now, mut arrived, mut tokens) = (0.0, 0, 0);
    let (mut gaps, mut gap_time) = (0_u64, 0.0);
    let mut ttft = Vec::with_capacity(trace.len());
    let mut last_token: HashMap<RequestId, f64> = HashMap::new();
    let mut events = Vec::new();
    while arrived < trace.len() || scheduler.has_work() {
        while let Some(next) = trace.get(arrived).filter(|next| next.arrival <= now) {
            let stop = StopCriteria::max_tokens(next.output);
            let mut request = Request::new(arrived as u64, prompt(arrived, next), stop, ());
            request.class = next.class;
            request.priority = next.class as i32;
            scheduler.add(request)?;
            arrived += 1;
        }
        let Some(plan) = scheduler.schedule() else {
            match trace.get(arrived) {
                Some(next) => now = next.arrival,
                None => return Err("the scheduler has work but plans nothing".into()),
            }
            continue;
        };
        now += COST.of(&plan);
        scheduler.apply(output(&plan), &mut events)?;
        scheduler.recycle(plan);
        for event in events.drain(..) {
            if let Event::Tokens { id, .. } = event {
                tokens += 1;
                match last_token.insert(id, now) {
                    None => ttft.push(now - trace[id.0 as usize].arrival),
                    Some(before) => {
                        gaps += 1;
                        gap_time += now - before;
                    }
                }
            }
        }
    }
    ttft.sort_by(f64::total_cmp);
    let stats = scheduler.stats();
    Ok(Outcome {
        throughput: f64::from(tokens) / now.max(f64::MIN_POSITIVE),
        ttft,
        tpot: gap_time / gaps.max(1) as f64,
        hit_rate: stats.prefix_hit_rate(),
        preemptions: stats.totals.preemptions,
    })
}

fn output(plan: &StepPlan<()>) -> StepOutput<()> {
    let sampled = |_: &_| Sampled {
        tokens: smallvec![0],
        extras: Vec::new(),
        error: None,
    };
    StepOutput {
        step: plan.step,
        samples: plan.samples.iter().map(sampled).collect(),
        prompt_extras: Vec::new(),
    }
}
