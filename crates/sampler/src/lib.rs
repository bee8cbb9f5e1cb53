//! Token sampling for language models.

mod batch;
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
