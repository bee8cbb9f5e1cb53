//! The scheduler: its books, and requests coming in.

mod abandon;
mod admit;
mod apply;
mod fork;
mod leave;
mod running;
mod step;
mod views;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use paged_kv::{KvAllocator, SwapOut, TokenId};
use smallvec::SmallVec;

use crate::arena::Arena;
use crate::config::{ConfigError, PreemptionMode, SchedulerConfig};
use crate::plan::SlotId;
use crate::policy::{Candidate, Fcfs, RequestInfo, SchedulingPolicy};
use crate::request::{AddError, Request, RequestId, SeqParams};
use crate::scheduler::step::{Record, Spares};
use crate::sequence::{Drafts, Seq, Status, StopTokens};
use crate::stats::{StepStats, Totals};
use crate::tokens::Tokens;
use crate::waiting::{Order, Waiting};

pub use apply::ApplyError;
pub use fork::ForkError;

/// Decides, step by step, which tokens of which sequences the model computes. The crate's front
/// page tells how it works and shows the loop around it.
///
/// `K` keeps the blocks, `P` is what the runner needs to sample (kept and cloned, never read).
pub struct Scheduler<K: KvAllocator, P: Clone> {
    config: SchedulerConfig,
    /// Tokens the next step may compute: fewer than configured after memory ran out.
    token_budget: usize,
    kv: K,
    policy: Box<dyn SchedulingPolicy>,
    /// Tokens the pool holds.
    capacity: usize,
    block_size: u32,
    seqs: Arena<Seq<P>>,
    /// Live sequences of each request as `(index, key)`; one that is yet to fork is in the `fork`
    /// list of the sequence that computes the prompt.
    requests: HashMap<RequestId, SmallVec<[(u32, u32); 1]>>,
    waiting: Waiting,
    /// Sequences with a slot, in the order of service.
    running: Vec<u32>,
    free_slots: Vec<u32>,
    /// Free slots that are promised to sequences yet to fork.
    promised_slots: usize,
    /// Key of the sequence in each slot.
    slot_owner: Vec<u32>,
    /// Sequences that no step in flight names and whose slot and blocks `sweep` takes.
    idle: Vec<u32>,
    /// Whether `running` holds sequences that do not run any more, for `sweep` to drop.
    stale: bool,
    /// Sequences that keep their blocks only until the steps in flight are applied.
    departing: usize,
    /// Slots given up since the last plan.
    released: Vec<SlotId>,
    /// Blocks of sequences that were preempted since the last plan.
    swap_outs: Vec<SwapOut>,
    /// The head of the queue that found no room, and how many blocks were available then.
    turned_away: Option<(Order, usize)>,
    in_flight: VecDeque<Record>,
    spares: Spares<P>,
    next_step: u64,
    next_arrival: u64,
    candidates: Vec<Candidate>,
    last_step: StepStats,
    totals: Totals,
}

impl<K: KvAllocator, P: Clone> Scheduler<K, P> {
    /// A scheduler that serves first come, first served.
    pub fn new(config: SchedulerConfig, kv: K) -> Result<Self, ConfigError> {
        Self::with_policy(config, kv, Box::new(Fcfs::default()))
    }

    /// A scheduler with a policy of choice.
    pub fn with_policy(
        config: SchedulerConfig,
        kv: K,
        policy: Box<dyn SchedulingPolicy>,
    ) -> Result<Self, ConfigError> {
        let blocks = kv.num_available();
        config.validate(blocks)?;
        if config.preemption_mode == PreemptionMode::Swap && kv.num_host_blocks() == 0 {
            return Err(ConfigError::NoHostBlocks);
        }
        let block_size = kv.block_size().get();
        let slots = config.max_num_seqs as u32;
        Ok(Self {
            capacity: blocks.saturating_mul(block_size),
            block_size: block_size as u32,
            token_budget: config.max_num_batched_tokens,
            kv,
            policy,
            seqs: Arena::new(),
            requests: HashMap::new(),
            waiting: Waiting::default(),
            running: Vec::with_capacity(config.max_num_seqs),
            free_slots: (0..slots).rev().collect(),
            promised_slots: 0,
            slot_owner: vec![u32::MAX; config.max_num_seqs],
            idle: Vec::new(),
            stale: false,
            departing: 0,
            released: Vec::new(),
            swap_outs: Vec::new(),
            turned_away: None,
            in_flight: VecDeque::with_capacity(config.max_steps_in_flight),
            spares: Spares::default(),
            next_step: 0,
            next_arrival: 0,
            candidates: Vec::new(),
            last_step: StepStats::default(),
            totals: Totals::default(),
            config,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    /// The KV cache's books.
    pub fn kv(&self) -> &K {
        &self.kv
    }

    /// The KV cache's books, for maintenance (emptying the prefix cache, observers). The
    /// scheduler counts on every block being there for its sequences: take none.
    pub fn kv_mut(&mut self) -> &mut K {
        &mut self.kv
    }

    /// Longest sequence in tokens: `max_model_len`, or one more than the KV cache holds (the last
    /// token is never fed to the model). A sequence that reaches it ends with
    /// [`FinishReason::Length`](crate::FinishReason::Length).
    pub fn max_len(&self) -> usize {
        self.config.max_model_len.min(self.capacity + 1)
    }

    /// Whether any sequence waits or runs, or any step is in flight.
    pub fn has_work(&self) -> bool {
        self.waiting.len() > 0 || !self.running.is_empty() || !self.in_flight.is_empty()
    }

    /// Plans not yet applied.
    pub fn steps_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Takes in a request. It waits until a step has room for it.
    pub fn add(&mut self, request: Request<P>) -> Result<(), AddError> {
        self.check(&request)?;
        let arrival = self.next_arrival;
        self.next_arrival += 1;
        let num_prompt = request.prompt.len() as u32;
        let info = RequestInfo {
            id: request.id,
            arrival,
            priority: request.priority,
            class: request.class,
            prompt_tokens: num_prompt,
            max_tokens: request.stop.max_tokens,
            n: request.n,
        };
        let order = Order {
            rank: self.policy.rank(&info),
            arrival,
            index: 0,
        };
        let queue = self.policy.queue(&info);
        let limit = (num_prompt as usize)
            .saturating_add(request.stop.max_tokens as usize)
            .min(self.max_len()) as u32;
        let stop = StopTokens::new(&request.stop);
        let params = |index| request.params.get(index);
        let key = self.seqs.insert(Seq {
            status: Status::Waiting,
            speculating: false,
            lockstep: request.lockstep,
            announced: false,
            slot: u32::MAX,
            computed: 0,
            done: 0,
            settle_at: 0,
            sampling: 0,
            in_flight: 0,
            limit,
            num_prompt,
            reclaim_at: u32::MAX,
            table: None,
            swapped: None,
            drafts: None,
            stop_from: num_prompt.saturating_add(request.stop.min_tokens),
            stop_sieve: stop.sieve(),
            stop: Arc::new(stop),
            id: request.id,
            index: 0,
            order,
            queue,
            salt: request.salt,
            use_cache: request.use_prefix_cache,
            params: params(0),
            fork: (1..request.n).map(|i| (i, params(i))).collect(),
            cached: None,
            preemptions: 0,
            prompt_reported: 0,
            tokens: Tokens::new(request.prompt),
        });
        self.requests
            .insert(request.id, SmallVec::from_elem((0, key), 1));
        let policy = self.policy.as_mut();
        self.waiting.insert(policy, queue, order, key, num_prompt);
        Ok(())
    }

    fn check(&self, request: &Request<P>) -> Result<(), AddError> {
        let id = request.id;
        let prompt = request.prompt.len();
        let (n, stop) = (request.n, &request.stop);
        if prompt == 0 {
            return Err(AddError::EmptyPrompt { id });
        }
        if prompt >= self.config.max_model_len {
            return Err(AddError::PromptTooLong {
                id,
                prompt,
                max_model_len: self.config.max_model_len,
            });
        }
        if prompt > self.capacity {
            return Err(AddError::NeverFits {
                id,
                prompt,
                capacity: self.capacity,
            });
        }
        if n == 0 {
            return Err(AddError::ZeroSequences { id });
        }
        if n as usize > self.config.max_num_seqs {
            return Err(AddError::TooManySequences {
                id,
                n,
                max_num_seqs: self.config.max_num_seqs,
            });
        }
        if stop.max_tokens == 0 {
            return Err(AddError::ZeroMaxTokens { id });
        }
        if stop.min_tokens > stop.max_tokens {
            return Err(AddError::MinAboveMaxTokens {
                id,
                min_tokens: stop.min_tokens,
                max_tokens: stop.max_tokens,
            });
        }
        if let SeqParams::PerSequence(params) = &request.params
            && params.len() != n as usize
        {
            return Err(AddError::ParamsCount {
                id,
                given: params.len(),
                n,
            });
        }
        if self.requests.contains_key(&id) {
            return Err(AddError::DuplicateId { id });
        }
        Ok(())
    }

    /// Proposes the tokens that follow the last known one of a sequence; the next step in which
    /// it decodes verifies as many of them as fit. `false` if there is no such sequence, or none
    /// that decodes, or its next token is in flight already: with several steps in flight a
    /// sequence is proposed for when its last sample is in. While its drafts are being verified it
    /// takes part in no other step.
    pub fn set_drafts(&mut self, id: RequestId, index: u32, drafts: &[TokenId]) -> bool {
        let Some(key) = self.find(id, index) else {
            return false;
        };
        let seq = &mut self.seqs[key];
        // The row that completes a prompt for several sequences is sampled by all of them.
        if seq.status != Status::Running
            || !seq.fork.is_empty()
            || seq.sampling > 0
            || seq.wanted() - seq.computed != 1
        {
            return false;
        }
        let Drafts(own) = &mut **seq.drafts.get_or_insert_default();
        own.clear();
        own.extend_from_slice(drafts);
        true
    }

    fn find(&self, id: RequestId, index: u32) -> Option<u32> {
        let seqs = self.requests.get(&id)?;
        seqs.iter().find(|(i, _)| *i == index).map(|(_, key)| *key)
    }

    /// Puts a sequence into its place among the running ones.
    fn join_running(&mut self, key: u32) {
        let order = self.seqs[key].order;
        let in_front = |&k: &u32| self.seqs[k].order < order;
        let at = match self.running.last() {
            Some(last) if !in_front(last) => self.running.partition_point(in_front),
            _ => self.running.len(),
        };
        self.running.insert(at, key);
    }
}
