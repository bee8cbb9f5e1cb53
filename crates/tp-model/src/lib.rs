//! A tensor-parallel Llama-style transformer over a paged KV cache, on libtorch.
//!
//! [`Model::load`] reads a Hugging Face checkpoint. [`Session`] runs one sequence, for tests and
//! evaluation; [`Runner`] runs the batches that a scheduler plans.

pub mod attention;
pub mod comm;
mod config;
pub mod distributed;
mod error;
mod input_batch;
pub mod kv_cache;
pub mod layers;
mod libtorch;
mod model;
pub mod models;
mod options;
mod parallel;
mod runner;
mod session;
mod step_input;
pub mod weights;

pub use config::{Family, ModelConfig, RopeConfig, RopeScaling};
pub use error::{ModelError, RunnerError};
pub use model::Model;
pub use options::{Backend, DtypeChoice, LoadFormat, LoadOptions};
pub use parallel::{ParallelConfig, ParallelGroups, Stage};
pub use runner::{Runner, RunnerConfig, SeqParams, StepTicket, WorkingMemory};
pub use session::Session;

/// The README's example is compiled with the tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
