//! The runner, with plans made by hand.

mod errors;
mod invariance;
mod logprobs;
mod plans;
