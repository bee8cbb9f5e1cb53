//! The loop around scheduler and model.
//!
//! [`EngineCore`] owns both by value. Whoever holds it (a blocking [`crate::Engine`], or the thread
//! behind an [`crate::AsyncEngine`]) calls [`EngineCore::step`] and passes the events on. It deals
//! in token ids only: text is the business of the callers, so that tokenizing and detokenizing
//! never hold up a step.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use batch_scheduler::{
    AddError, Event, FinishReason, ModelRunner, Request, RequestId, Scheduler, SeqSnapshot, Stats,
    StepPlan,
};
use paged_kv::{BlockManager, BlockState};
use sampler::TokenLogprobs;
use tp_model::SeqParams;

use crate::report::{SeqId, StepReport, Tracer};
use crate::step_log::{StepLog, StepRecord, StepRow};
use crate::structured::{Constraints, Grammar};

/// What the engine needs of a model: [`tp_model::Runner`], or a fake one in tests.
pub trait Runner: ModelRunner<Params = Arc<SeqParams>, Extra = TokenLogprobs> {}

impl<R: ModelRunner<Params = Arc<SeqParams>, Extra = TokenLogprobs>> Runner for R {}

/// After so many steps within a token budget that was cut for want of memory, it is doubled.
const CALM_STEPS: u32 = 256;

/// News from the core.
#[derive(Clone, Debug, PartialEq)]
pub enum CoreEvent {
    /// A step computes something for this request, for the first time.
    Scheduled {
        /// The request.
        id: RequestId,
        /// When.
        at: Instant,
        /// Prompt tokens found in the prefix cache.
        cached_tokens: u32,
    },
    /// News of one sequence.
    Sequence(Event<TokenLogprobs>),
}

impl CoreEvent {
    /// The request it is about.
    pub fn id(&self) -> RequestId {
        match self {
            CoreEvent::Scheduled { id, .. } => *id,
            CoreEvent::Sequence(
                Event::Tokens { id, .. }
                | Event::PromptExtras { id, .. }
                | Event::Finished { id, .. },
            ) => *id,
        }
    }
}

/// The engine has stopped for good.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct EngineDead(pub String);

/// One look at the KV cache.
#[derive(Clone, Debug)]
pub struct KvSnapshot {
    /// State of every block that sequences can have, by block id (ids count from 1).
    pub blocks: Vec<BlockState>,
    /// Every sequence with its block table.
    pub sequences: Vec<SeqSnapshot>,
}

impl KvSnapshot {
    /// Blocks that more than one sequence reads.
    pub fn num_shared(&self) -> usize {
        let shared = |state: &&BlockState| matches!(state, BlockState::Referenced { readers, .. } if *readers > 1);
        self.blocks.iter().filter(shared).count()
    }
}

/// Scheduler, KV cache and model, with one owner.
pub struct EngineCore<R: Runner> {
    scheduler: Scheduler<BlockManager, Arc<SeqParams>>,
    runner: R,
    /// Steps that were launched and not collected, oldest first.
    tickets: VecDeque<R::Ticket>,
    /// Requests that no step has touched yet.
    unscheduled: Vec<(RequestId, Arc<SeqParams>)>,
    tracer: Option<Tracer>,
    log: StepLog,
    scratch: Vec<Event<TokenLogprobs>>,
    /// Where constrained sequences stand.
    constraints: Constraints,
    /// Steps since memory ran out or the token budget was raised.
    calm_steps: u32,
    dead: Option<EngineDead>,
}

impl<R: Runner> EngineCore<R> {
    /// A core around a scheduler and the runner that was made for the same limits.
    pub fn new(scheduler: Scheduler<BlockManager, Arc<SeqParams>>, runner: R) -> Self {
        EngineCore {
            scheduler,
            runner,
            tickets: VecDeque::new(),
            unscheduled: Vec::new(),
            tracer: None,
            log: StepLog::default(),
            scratch: Vec::new(),
            constraints: Constraints::default(),
            calm_steps: 0,
            dead: None,
        }
    }

    /// Takes in a request; its `n` sequences share `params`.
    pub fn add(&mut self, request: Request<Arc<SeqParams>>) -> Result<(), AddError> {
        self.add_constrained(request, None)
    }

    /// As [`EngineCore::add`]; with a grammar, for a request in lockstep.
    pub(crate) fn add_constrained(
        &mut self,
        request: Request<Arc<SeqParams>>,
        grammar: Option<Grammar>,
    ) -> Result<(), AddError> {
        let (id, n) = (request.id, request.n);
        let params = match &request.params {
            batch_scheduler::SeqParams::Shared(params) => Some(params.clone()),
            batch_scheduler::SeqParams::PerSequence(list) => list.first().cloned(),
        };
        self.scheduler.add(request)?;
        self.unscheduled.extend(params.map(|params| (id, params)));
        if let Some(grammar) = grammar {
            self.constraints.add(id, n, grammar);
        }
        Ok(())
    }

    /// Ends a request at any time. Its sequences report [`FinishReason::Aborted`].
    pub fn abort(&mut self, id: RequestId, events: &mut Vec<CoreEvent>) -> bool {
        self.unscheduled.retain(|(other, _)| *other != id);
        let found = self.scheduler.abort(id, &mut self.scratch);
        self.pass_on(events);
        found
    }

    /// Ends one sequence for a reason that shows in its text only.
    pub fn finish(
        &mut self,
        id: RequestId,
        index: u32,
        reason: FinishReason,
        events: &mut Vec<CoreEvent>,
    ) -> bool {
        let found = self.scheduler.finish(id, index, reason, &mut self.scratch);
        self.pass_on(events);
        found
    }

    /// Whether there is anything left to do.
    pub fn has_work(&self) -> bool {
        self.dead.is_none() && self.scheduler.has_work()
    }

    /// Launches the next step if there is one, and collects the oldest in flight if the pipeline
    /// is full or nothing could be launched. Without overlap both are the same step.
    ///
    /// After an error the core is dead: every later call returns the same error.
    pub fn step(&mut self, events: &mut Vec<CoreEvent>) -> Result<(), EngineDead> {
        if let Some(dead) = &self.dead {
            return Err(dead.clone());
        }
        let result = self.try_step(events);
        if let Err(dead) = &result {
            tracing::error!("the engine stops: {dead}");
            self.dead = Some(dead.clone());
            // What is in flight will never be collected.
            self.tickets.clear();
        }
        result
    }

    fn try_step(&mut self, events: &mut Vec<CoreEvent>) -> Result<(), EngineDead> {
        let plan = self.scheduler.schedule();
        let launched = plan.is_some();
        if let Some(mut plan) = plan {
            if !self.constraints.is_empty() {
                self.constrain(&mut plan);
            }
            self.note_admissions(&plan, events);
            if let Some(tracer) = &mut self.tracer {
                tracer.planned(&plan, &self.scheduler.snapshot());
            }
            self.record(&plan);
            let (step, tokens) = (plan.step, plan.rows.iter().map(|r| r.len as usize).sum());
            match self.runner.launch(plan) {
                Ok(ticket) => self.tickets.push_back(ticket),
                Err(error) if self.runner.is_out_of_memory(&error) => {
                    self.do_with_less_memory(step, tokens, &error.to_string());
                    self.pass_on(events);
                    return Ok(());
                }
                Err(error) => return Err(dead(error)),
            }
        }
        let full = self.tickets.len() >= self.scheduler.config().max_steps_in_flight;
        if !launched || full {
            let Some(ticket) = self.tickets.pop_front() else {
                return if self.scheduler.has_work() {
                    // Nothing in flight can change this: better an error than a silent hang.
                    Err(dead("the scheduler has work but plans no step"))
                } else {
                    Ok(())
                };
            };
            let output = self.runner.collect(ticket).map_err(dead)?;
            self.scheduler
                .apply(output, &mut self.scratch)
                .map_err(dead)?;
            self.pass_on(events);
            self.try_more_memory();
        }
        Ok(())
    }

    /// Memory ran out in a step: it is done again in smaller ones. A sequence that finds none even
    /// for a single token fails.
    fn do_with_less_memory(&mut self, step: u64, tokens: usize, error: &str) {
        let rows = self.scheduler.abandon(step).unwrap_or_default();
        if tokens <= 1 {
            tracing::error!("{error}; not even for one token: its request fails");
            for (id, index) in rows {
                let reason = FinishReason::Error("out of memory".to_owned());
                self.scheduler.finish(id, index, reason, &mut self.scratch);
            }
            return;
        }
        self.scheduler.set_token_budget(tokens / 2);
        self.calm_steps = 0;
        let (seqs, budget) = (rows.len(), self.scheduler.token_budget());
        tracing::warn!(
            "{error}; its {seqs} sequences are computed again, in steps of at most {budget} tokens \
             for now. A lower --gpu-memory-utilization or --max-num-batched-tokens avoids this"
        );
    }

    /// After many steps that found memory, larger ones are tried again.
    fn try_more_memory(&mut self) {
        let (budget, most) = (
            self.scheduler.token_budget(),
            self.scheduler.config().max_num_batched_tokens,
        );
        if budget < most {
            self.calm_steps += 1;
            if self.calm_steps == CALM_STEPS {
                self.calm_steps = 0;
                self.scheduler.set_token_budget(2 * budget);
            }
        }
    }

    fn record(&mut self, plan: &StepPlan<Arc<SeqParams>>) {
        if !self.log.is_on() {
            return;
        }
        let rows = plan.rows.iter().filter_map(|row| {
            let (request, index, num_prompt) = self.scheduler.occupant(row.slot)?;
            Some(StepRow {
                seq: SeqId { request, index },
                len: row.len,
                decode: row.start >= num_prompt && row.len == 1 + row.drafts.len() as u32,
            })
        });
        self.log.push(plan.step, rows);
    }

    fn note_admissions(&mut self, plan: &StepPlan<Arc<SeqParams>>, events: &mut Vec<CoreEvent>) {
        if plan.admitted.is_empty() || self.unscheduled.is_empty() {
            return;
        }
        let at = Instant::now();
        for seq in &plan.admitted {
            // Parameters are shared by a request's sequences and by nobody else. Requests enter
            // roughly in the order in which they came, so this looks at the first few only.
            let known = self
                .unscheduled
                .iter()
                .position(|(_, params)| Arc::ptr_eq(params, &seq.params));
            if let Some(position) = known {
                let (id, _) = self.unscheduled.remove(position);
                events.push(CoreEvent::Scheduled {
                    id,
                    at,
                    cached_tokens: seq.num_computed.min(seq.num_prompt),
                });
            }
        }
    }

    /// Writes into a plan what its constrained sequences may say. Those that can say nothing end;
    /// the step computes them all the same.
    fn constrain(&mut self, plan: &mut StepPlan<Arc<SeqParams>>) {
        let scheduler = &self.scheduler;
        let occupant = |slot| scheduler.occupant(slot).map(|(id, index, _)| (id, index));
        for ending in self.constraints.fill(plan, occupant) {
            let (id, index) = (ending.id, ending.index);
            self.scheduler
                .finish(id, index, ending.reason, &mut self.scratch);
        }
    }

    fn pass_on(&mut self, events: &mut Vec<CoreEvent>) {
        if !self.constraints.is_empty() {
            for ending in self.constraints.advance(&self.scratch) {
                let (id, index) = (ending.id, ending.index);
                self.scheduler
                    .finish(id, index, ending.reason, &mut self.scratch);
            }
            self.constraints.forget(&self.scratch);
        }
        if let Some(tracer) = &mut self.tracer {
            tracer.happened(&self.scratch);
        }
        events.extend(self.scratch.drain(..).map(CoreEvent::Sequence));
    }

    /// Turns the recording of step reports on. It copies block tables each step: for views only.
    pub fn trace(&mut self) {
        self.tracer.get_or_insert_with(Tracer::default);
    }

    /// What happened since the last report; `None` unless [`EngineCore::trace`] was called.
    pub fn take_report(&mut self) -> Option<StepReport> {
        let stats = self.stats();
        self.tracer.as_mut().map(|tracer| tracer.take(stats))
    }

    /// Figures of now.
    pub fn stats(&self) -> Stats {
        self.scheduler.stats()
    }

    /// The block map and who holds what.
    pub fn kv_snapshot(&self) -> KvSnapshot {
        KvSnapshot {
            blocks: self
                .scheduler
                .kv()
                .block_map()
                .map(|(_, state)| state)
                .collect(),
            sequences: self.scheduler.snapshot(),
        }
    }

    /// The last steps, oldest first. Steps are recorded from the first look on, and until a few
    /// thousand steps after the last.
    pub fn recent_steps(&mut self) -> Vec<StepRecord> {
        self.log.look()
    }

    /// The scheduler, to look at.
    pub fn scheduler(&self) -> &Scheduler<BlockManager, Arc<SeqParams>> {
        &self.scheduler
    }
}

fn dead(error: impl std::fmt::Display) -> EngineDead {
    EngineDead(error.to_string())
}
