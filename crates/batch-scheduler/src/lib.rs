//! Continuous batching.
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
mod waiting;

pub use config::{ConfigError, SchedulerConfig};
pub use event::{Event, FinishReason, Usage};
pub use plan::{AdmittedSeq, Row, SampleRow, Sampled, SlotId, StepOutput, StepPlan};
pub use policy::{
    Candidate, Fcfs, Priority, RequestInfo, SchedulingPolicy, VictimRule, WeightedFair,
};
pub use request::{AddError, Request, RequestId, SeqParams, StopCriteria};
pub use runner::ModelRunner;
pub use scheduler::{ApplyError, Scheduler};
pub use stats::{SeqSnapshot, SeqState, Stats, StepStats, Totals};
