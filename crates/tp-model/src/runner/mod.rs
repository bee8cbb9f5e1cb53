//! Runs the steps that a scheduler plans.

mod host;

use std::sync::Arc;

use batch_scheduler::{ModelRunner, StepOutput, StepPlan};
use paged_kv::TokenId;
use sampler::{SamplingParams, TokenLogprobs};

use self::host::HostRunner;
use crate::error::{ModelError, RunnerError};
use crate::model::Model;

/// Sizes of a runner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunnerConfig {
    /// Number of slots.
    pub max_num_seqs: usize,
    /// Most tokens in a step.
    pub max_num_batched_tokens: usize,
    /// Most tokens of a sequence.
    pub max_model_len: usize,
    /// Tokens in a block.
    pub block_size: usize,
    /// Number of blocks in the cache, block 0 (the placeholder) included.
    pub num_blocks: usize,
}

/// What the runner must know of a sequence beside its tokens.
#[derive(Clone, Debug)]
pub struct SeqParams {
    /// Sampling parameters.
    pub sampling: Arc<SamplingParams>,
    /// Seed of the request. The `n` sequences of a request differ by their index.
    pub seed: u64,
    /// End-of-sequence tokens: banned until `min_tokens` were generated, as are the parameters'
    /// own stop tokens.
    pub eos_token_ids: Vec<TokenId>,
}

/// A launched step.
#[derive(Debug)]
pub struct StepTicket(Launched);

#[derive(Debug)]
enum Launched {
    /// Computed already.
    Done(StepOutput<TokenLogprobs>),
}

/// A model with its cache and the state of all running sequences, on one device.
#[derive(Debug)]
pub struct Runner(Kind);

#[derive(Debug)]
enum Kind {
    Host(Box<HostRunner>),
}

impl Runner {
    /// Allocates the cache and the slots.
    pub fn new(model: Model, config: &RunnerConfig) -> Result<Self, ModelError> {
        for (name, value) in [
            ("max_num_seqs", config.max_num_seqs),
            ("max_num_batched_tokens", config.max_num_batched_tokens),
            ("max_model_len", config.max_model_len),
        ] {
            if value == 0 {
                return Err(ModelError::Options(format!(
                    "{name} must be at least 1, got 0"
                )));
            }
        }
        HostRunner::new(model, config).map(|runner| Self(Kind::Host(Box::new(runner))))
    }

    /// The model.
    pub fn model(&self) -> &Model {
        match &self.0 {
            Kind::Host(runner) => runner.model(),
        }
    }

    /// The sizes.
    pub fn config(&self) -> &RunnerConfig {
        match &self.0 {
            Kind::Host(runner) => runner.config(),
        }
    }
}

impl ModelRunner for Runner {
    type Params = Arc<SeqParams>;
    type Extra = TokenLogprobs;
    type Ticket = StepTicket;
    type Error = RunnerError;

    fn launch(&mut self, plan: StepPlan<Self::Params>) -> Result<StepTicket, RunnerError> {
        match &mut self.0 {
            Kind::Host(runner) => runner.launch(plan).map(Launched::Done),
        }
        .map(StepTicket)
    }

    fn collect(&mut self, ticket: StepTicket) -> Result<StepOutput<TokenLogprobs>, RunnerError> {
        match ticket.0 {
            Launched::Done(output) => Ok(output),
        }
    }
}
