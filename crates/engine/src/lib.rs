//! The inference engine: tokenizing, scheduling, running and streaming, blocking or async.
//!
//! ```no_run
//! use engine::{Engine, EngineConfig, GenerateRequest};
//!
//! let mut engine = Engine::from_config(&EngineConfig::new("Qwen/Qwen3-0.6B"))?;
//! let params = engine.frontend().default_sampling_params();
//! let requests = vec![
//!     GenerateRequest::new("1", "The capital of France is", params.clone()),
//!     GenerateRequest::new("2", "Two and two make", params),
//! ];
//! for output in engine.generate(requests) {
//!     match output {
//!         Ok(output) => println!("{}", output.outputs[0].text),
//!         Err(error) => println!("refused: {error}"),
//!     }
//! }
//! # Ok::<(), engine::BuildError>(())
//! ```
//!
//! A request's way: [`Frontend`] tokenizes and checks it; [`EngineCore`] schedules it and runs the
//! model, in token ids only; what comes back is detokenized and searched for stop strings where it
//! is read. [`Engine`] does all this on the caller's thread. [`AsyncEngine`] gives the core a
//! thread of its own and hands out a [`TokenStream`] a request; dropping one aborts the request.

mod async_engine;
mod builder;
pub mod chat_template;
pub mod checkpoint;
mod config;
mod core;
#[cfg(feature = "demo-model")]
pub mod demo;
pub mod detokenizer;
mod engine;
mod error;
mod frontend;
pub mod generation_config;
pub mod hub;
mod jinja;
mod memory;
mod memory_table;
mod output;
mod queue;
mod ranks;
mod report;
mod request;
mod state;
pub mod step_log;
mod stop;
mod stream;
pub mod structured;
pub mod tokenizer;

pub use crate::core::{CoreEvent, EngineCore, EngineDead, KvSnapshot, Runner};
pub use async_engine::{AsyncEngine, AsyncOptions, Look, StepObserver};
pub use builder::{BuildError, Progress};
pub use config::{ConfigError, DeviceChoice, EngineConfig, LoadFormat, MaxModelLen, Policy, Usage};
pub use engine::{Engine, EngineStep};
pub use error::RequestError;
pub use frontend::{Frontend, Limits};
pub use output::{
    CompletionOutput, Finish, FinishReason, OutputDelta, RequestMetrics, RequestOutput, StopReason,
};
pub use queue::QueueLimits;
pub use ranks::follow;
pub use report::{AdmissionReport, RowReport, SeqId, StepReport};
pub use request::{GenerateRequest, Prompt};
pub use step_log::{StepRecord, StepRow};
pub use stream::TokenStream;
pub use structured::{Constraint, StructuredOutputs};

pub use batch_scheduler::{RequestId, Stats};
pub use sampler::{SamplingParams, TokenLogprobs};
pub use tp_model::comm::Health;
pub use tp_model::distributed::{Launcher, World};
pub use tp_model::{Backend, DtypeChoice, ParallelConfig};

/// The README's code is compiled with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
