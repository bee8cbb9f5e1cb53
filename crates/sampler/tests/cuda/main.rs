//! The GPU's sampler against the CPU's: the same tokens, errors and log-probabilities.
#![cfg(feature = "cuda")]

mod batches;
#[path = "../common/mod.rs"]
mod common;
mod pair;
mod rows;
