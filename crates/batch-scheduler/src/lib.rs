//! Continuous batching for language models: which tokens of which sequences does the model
//! compute in the next step?
//!
//! The scheduler of vLLM's kind as a library of its own: chunked prefill mixed with decoding,
//! paged KV memory with prefix sharing, preemption by recompute or swap, parallel sampling and beams
//! by fork, speculative drafts, several steps in flight. It knows no tensors, threads or clocks. A [`StepPlan`] goes out, a
//! [`StepOutput`] comes back, both plain data; whatever runs the model implements
//! [`ModelRunner`].
//!
//! # The loop
//!
//! ```
//! use batch_scheduler::*;
//! use paged_kv::{BlockManager, BlockSize, Config};
//!
//! let kv = BlockManager::new(Config::new(1024, BlockSize::default()))?;
//! let mut scheduler = Scheduler::new(SchedulerConfig::default(), kv)?;
//! scheduler.add(Request::new(0, vec![1, 2, 3], StopCriteria::max_tokens(2), ()))?;
//!
//! let mut events = Vec::new();
//! while let Some(plan) = scheduler.schedule() {
//!     // A model would run here; this one says 42 whatever it reads.
//!     let say = |_: &SampleRow| Sampled::<()> {
//!         tokens: [42].into_iter().collect(),
//!         extras: vec![],
//!         error: None,
//!     };
//!     let samples = plan.samples.iter().map(say).collect();
//!     let output = StepOutput { step: plan.step, samples, prompt_extras: vec![] };
//!     scheduler.apply(output, &mut events)?;
//! }
//! assert!(matches!(
//!     events.last(),
//!     Some(Event::Finished { reason: FinishReason::Length, .. })
//! ));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! `examples/engine.rs` is this loop with a model that reads its KV memory through the block
//! tables, and with a step in flight while the next is planned.
//!
//! # A sequence's life
//!
//! ```text
//!             admitted: slot, blocks            prompt computed:
//!             for the whole prompt              first token; n > 1 forks
//!   WAITING ───────────────────────▶ PREFILL ───────────────────────▶ RUNNING ──▶ FINISHED
//!      ▲                                │                                │        eos, stop,
//!      │                                └───────────────┬────────────────┘        length, abort
//!      │     in front of what came later                ▼ no block for one
//!      └─────────────────────────────────────────── PREEMPTED  with more claim
//! ```
//!
//! [`SeqState`] names the states and [`Scheduler::snapshot`] shows them. Inside there are no
//! prefill and decode steps: a sequence has so many tokens computed and wants so many, and each
//! step gives it a part of the difference. A prompt in chunks, a token to decode, a prefix found
//! in the cache, a return after preemption and drafts to verify are all that one case.
//!
//! # A step
//!
//! 1. *Running sequences*, in the order of the policy, get what they want, within
//!    [`max_num_batched_tokens`](SchedulerConfig::max_num_batched_tokens). Whatever one takes, a
//!    token is left for each one behind: a long prompt slows decoding down, but never stops it.
//! 2. *Where a block is missing*, a sequence with less claim is preempted: the policy chooses
//!    among those behind the one in need. It keeps its tokens and computes them again later,
//!    most of them from the prefix cache; or, under [`PreemptionMode::Swap`], its keys and values go
//!    to host memory and come back. The last in line waits where it is.
//! 3. *Waiting sequences* are admitted while slots, blocks and budget last, unless somebody was
//!    preempted or left without room. Blocks for all of a sequence's tokens are taken at once.
//!    Where the first in line does not fit, nobody passes it.
//!    Where some sequences decode, prompts, of running sequences and of these, only fill the step up to
//!    [`mixed_step_tokens`](SchedulerConfig::mixed_step_tokens), where their tokens cost less than in steps of their own.
//! 4. *A prompt that completes* for a request of `n` > 1 forks: the others share its blocks and
//!    sample from the same logits. Their slots were set aside at admission.
//!
//! Between steps the caller may end a sequence ([`Scheduler::finish`]), replace what it has said
//! ([`Scheduler::rewrite`]) and branch it ([`Scheduler::fork`]): beam search and guided decoding, as in
//! `examples/beam.rs`.
//!
//! # Several steps in flight
//!
//! With [`max_steps_in_flight`](SchedulerConfig::max_steps_in_flight) of 2 or more, the next step
//! is planned before the last is applied. A sequence then decodes after a token that only the
//! runner knows. If that token turns out to have ended it, what is still in flight for it is
//! discarded. Slots and blocks return only when no step in flight reads them; the next plan names
//! the slots in [`StepPlan::released`]. Runners carry plans out in order, so a block may be
//! written by a later plan than the one that copies it. Tokens do not depend on the depth.
//!
//! # Progress
//!
//! Any request that [`Scheduler::add`] accepts fits the cache alone (its length is bounded by
//! [`Scheduler::max_len`]). A running sequence gives way only to one in front of it in the order
//! of rank and arrival, whatever the policy. So the first running sequence is never preempted and
//! computes at least a token in every step it is not waiting for its own result; it finishes, and
//! then the next is first. Preemption cannot go in circles, and under [`Fcfs`] and
//! [`WeightedFair`] no request starves; under [`Priority`] none does while the more urgent ones
//! are finite. (All this of sequences that their callers do not cut back again and again.)
//! `tests/progress.rs` holds the bound in steps that follows.
//!
//! # Cost
//!
//! A decode step allocates nothing but the growth of token lists and block tables, which double (a
//! fiftieth of an allocation a sequence and step in `benches/scheduler.rs`), copies no token list and
//! no table, and hashes a block's tokens only when the block is full. It is linear work in the
//! running sequences, and the same work whatever the size of the cache.
#![deny(missing_docs)]
#![forbid(unsafe_code)]

mod arena;
mod config;
mod event;
mod plan;
mod policy;
mod request;
mod runner;
mod scheduler;
mod sequence;
mod stats;
mod tokens;
mod waiting;

pub use config::{ConfigError, PreemptionMode, SchedulerConfig};
pub use event::{Event, FinishReason, Usage};
pub use plan::{AdmittedSeq, Row, SampleMask, SampleRow, Sampled, SlotId, StepOutput, StepPlan};
pub use policy::{
    Candidate, Fcfs, Priority, RequestInfo, SchedulingPolicy, VictimRule, WeightedFair,
};
pub use request::{AddError, Request, RequestId, SeqParams, StopCriteria};
pub use runner::ModelRunner;
pub use scheduler::{ApplyError, ForkError, Scheduler};
pub use stats::{SeqSnapshot, SeqState, Stats, StepStats, Totals};

/// The README's code is compiled and run with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
