//! Token sampling for language models: vLLM's parameters, an exact oracle, a fast row path in plain
//! Rust, (feature `torch`) a batched version on tensors and (feature `cuda`) one of GPU kernels. All
//! give the same tokens.
//!
//! # From logits to a token
//!
//! The order is vLLM's:
//!
//! 1. log-probabilities, if asked for, from the raw logits ([`TokenLogprobs`]);
//! 2. in float32: allowed tokens (the parameters' and the row's mask), bad tokens and bad words, stop tokens before `min_tokens`, logit
//!    bias, then repetition (prompt and output), frequency and presence penalty (output);
//! 3. greedy: the largest logit, of equal ones the lowest token id; or
//! 4. in float64: temperature, min-p, top-k and top-p, then one draw.
//!
//! The draw is a race ([`Noise`]) of groups of 64 tokens, and then of the tokens of the one that has
//! won: the one with the largest `ln(weight) + g` wins, where a token's weight is
//! `exp(logit / temperature)`, a group's the sum of its tokens', and `g` Gumbel noise that is a
//! function of the sequence's seed, the token's position and its id or its group's, by the
//! counter-based generator Philox. So what a request gets depends on its prompt, parameters and
//! seed, never on the batch it runs in.
//!
//! # Where is what
//!
//! [`BatchSampler`] samples batches of sequences that live in slots, [`RowSampler`] a row of one
//! sequence with its [`SeqState`]; [`oracle`] defines what both compute and is meant to be read.

mod batch;
#[cfg(feature = "cuda")]
pub mod cuda;
mod error;
mod exp;
mod filter;
mod logprobs;
mod noise;
pub mod oracle;
mod params;
mod processors;
mod race;
mod row;
mod scan;
mod slots;
mod state;
#[cfg(feature = "torch")]
pub mod torch;

pub use batch::{BatchSampler, SampleResult};
pub use error::{AdmitError, SampleError};
pub use logprobs::{TokenLogprobs, prompt_logprobs};
pub use noise::{Noise, philox4x32, sequence_seed};
pub use params::{
    GREEDY_BELOW, MAX_LOGIT_BIAS, MAX_N, MIN_TEMPERATURE, ParamError, SamplingParams,
};
pub use row::RowSampler;
pub use state::SeqState;

/// The README's example is a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
