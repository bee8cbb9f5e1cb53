//! Token sampling for language models.

mod params;

pub use params::{
    GREEDY_BELOW, MAX_LOGIT_BIAS, MAX_N, MIN_TEMPERATURE, ParamError, SamplingParams,
};
