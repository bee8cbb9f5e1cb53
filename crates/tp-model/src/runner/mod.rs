//! Runs the steps that a scheduler plans.

#[cfg(feature = "cuda")]
mod cuda;
mod host;
mod prompt_logprobs;
mod tell;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use batch_scheduler::{ModelRunner, Sampled, StepOutput, StepPlan};
use paged_kv::TokenId;
use sampler::{SampleResult, SamplingParams, TokenLogprobs};
use smallvec::{SmallVec, smallvec};
use tch::{Device, Tensor};
#[cfg(feature = "cuda")]
use torch_ext::cuda::Event;
use torch_ext::cuda::Memory;

use self::host::{HostRunner, HostTicket};
use self::prompt_logprobs::prompt_rows;
use crate::comm::{CommError, Health};
use crate::distributed::Followers;
use crate::error::{ModelError, RunnerError};
use crate::libtorch;
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

/// What a runner takes on a GPU beside weights and cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkingMemory {
    /// Bytes of the largest steps: activations, sampler, tables.
    pub steps: u64,
    /// Bytes of the captured graphs.
    pub graphs: u64,
    /// How many graphs are captured.
    pub num_graphs: usize,
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
    /// Computed already, here or by the ranks that this one leads soon.
    Host(HostTicket),
    /// On its way.
    #[cfg(feature = "cuda")]
    Cuda(cuda::CudaTicket),
}

/// A model with its cache and the state of all running sequences, on one device.
#[derive(Debug)]
pub struct Runner(Kind);

#[derive(Debug)]
enum Kind {
    Host(Box<HostRunner>),
    #[cfg(feature = "cuda")]
    Cuda(Box<cuda::CudaRunner>),
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
        #[cfg(feature = "cuda")]
        if let Some(kernels) = model.kernels() {
            let runner = cuda::CudaRunner::new(model, kernels, config)?;
            return Ok(Self(Kind::Cuda(Box::new(runner))));
        }
        HostRunner::new(model, config).map(|runner| Self(Kind::Host(Box::new(runner))))
    }

    /// What memory a GPU has left for the KV cache: the device's memory with the model loaded, and
    /// what the largest steps of `config` take beside the cache.
    pub fn measure(
        model: Model,
        device: usize,
        config: &RunnerConfig,
    ) -> Result<(Model, Memory, WorkingMemory), ModelError> {
        #[cfg(feature = "cuda")]
        {
            let options = |e: torch_ext::cuda::CudaError| ModelError::Options(e.to_string());
            let (model, work) = match model.kernels() {
                Some(kernels) => cuda::CudaRunner::measure(model, device, kernels, config)?,
                // libtorch's kernels keep nothing beside what they return.
                None => {
                    let work = WorkingMemory {
                        steps: 1 << 30,
                        ..WorkingMemory::default()
                    };
                    (model, work)
                }
            };
            torch_ext::cuda::release_memory().map_err(options)?;
            let memory = torch_ext::cuda::memory(device).map_err(options)?;
            Ok((model, memory, work))
        }
        #[cfg(not(feature = "cuda"))]
        {
            let _ = (model, config);
            let what = format!("device cuda:{device}: this build has no CUDA support");
            Err(ModelError::Options(what))
        }
    }

    /// As [`Runner::new`], for rank 0 of a divided model: the other ranks do as this one.
    pub fn with_followers(
        model: Model,
        config: &RunnerConfig,
        followers: Followers,
    ) -> Result<Self, ModelError> {
        // Ranks that are GPUs exchange something while they are made: what the others say comes
        // first.
        let made = Self::new(model, config);
        let mut runner = made.map_err(|error| {
            let known = followers.health().failure();
            followers.fail(error.to_string());
            known.map_or(error, ModelError::from)
        })?;
        match &mut runner.0 {
            Kind::Host(runner) => runner.lead(followers),
            #[cfg(feature = "cuda")]
            Kind::Cuda(runner) => runner.lead(followers),
        }
        Ok(runner)
    }

    /// Takes part in a step that rank 0 tells of: this rank's share of the model. Returns the
    /// step's output, encoded, if this rank samples it.
    pub(crate) fn follow(&mut self, message: &[u8]) -> Result<Option<Vec<u8>>, RunnerError> {
        match &mut self.0 {
            Kind::Host(runner) => runner.follow(message),
            #[cfg(feature = "cuda")]
            Kind::Cuda(runner) => runner.follow(message).map(|()| None),
        }
    }

    /// Whether outputs of steps that [`Runner::follow`] has started are yet to come.
    pub(crate) fn owes(&self) -> bool {
        match &self.0 {
            Kind::Host(_) => false,
            #[cfg(feature = "cuda")]
            Kind::Cuda(runner) => runner.owes(),
        }
    }

    /// The oldest of them, encoded, if it is there. Does not wait.
    pub(crate) fn finished(&mut self) -> Result<Option<Vec<u8>>, RunnerError> {
        match &mut self.0 {
            Kind::Host(_) => Ok(None),
            #[cfg(feature = "cuda")]
            Kind::Cuda(runner) => runner.finished(),
        }
    }

    /// The first failure among the ranks of a divided model, and a way to hear of it while nothing
    /// runs; `None` if there is one rank.
    pub fn health(&self) -> Option<&Health> {
        match &self.0 {
            Kind::Host(runner) => runner.followers().map(Followers::health),
            #[cfg(feature = "cuda")]
            Kind::Cuda(runner) => runner.followers().map(Followers::health),
        }
    }

    /// The model.
    pub fn model(&self) -> &Model {
        match &self.0 {
            Kind::Host(runner) => runner.model(),
            #[cfg(feature = "cuda")]
            Kind::Cuda(runner) => runner.model(),
        }
    }

    /// The sizes.
    pub fn config(&self) -> &RunnerConfig {
        match &self.0 {
            Kind::Host(runner) => runner.config(),
            #[cfg(feature = "cuda")]
            Kind::Cuda(runner) => runner.config(),
        }
    }
}

impl ModelRunner for Runner {
    type Params = Arc<SeqParams>;
    type Extra = TokenLogprobs;
    type Ticket = StepTicket;
    type Error = RunnerError;

    fn launch(&mut self, plan: StepPlan<Self::Params>) -> Result<StepTicket, RunnerError> {
        let swaps = !(plan.swap_outs.is_empty() && plan.swap_ins.is_empty());
        let unsupported = match () {
            () if swaps => Some(
                "swapping KV blocks to host memory is not supported by this runner; use \
                 PreemptionMode::Recompute",
            ),
            () if !plan.drafts.is_empty() => Some("draft tokens are not supported by this runner"),
            () => None,
        };
        if let Some(what) = unsupported {
            return Err(RunnerError::Plan {
                step: plan.step,
                what: what.to_owned(),
            });
        }
        match &mut self.0 {
            Kind::Host(runner) => runner.launch(plan).map(Launched::Host),
            #[cfg(feature = "cuda")]
            Kind::Cuda(runner) => runner.launch(plan).map(Launched::Cuda),
        }
        .map(StepTicket)
    }

    fn is_out_of_memory(&self, error: &RunnerError) -> bool {
        matches!(error, RunnerError::OutOfMemory { .. })
    }

    fn collect(&mut self, ticket: StepTicket) -> Result<StepOutput<TokenLogprobs>, RunnerError> {
        match (ticket.0, &mut self.0) {
            (Launched::Host(ticket), Kind::Host(runner)) => runner.collect(ticket),
            #[cfg(feature = "cuda")]
            (Launched::Cuda(ticket), Kind::Cuda(runner)) => runner.collect(ticket),
            #[cfg(feature = "cuda")]
            (Launched::Cuda(_), Kind::Host(_)) | (Launched::Host(_), Kind::Cuda(_)) => {
                unreachable!("a ticket of another runner")
            }
        }
    }
}

/// Runs part of a step. tch panics when libtorch fails, for instance for want of memory: the
/// runner is of no further use then, and says so in an error like any other.
fn guarded<T>(step: u64, run: impl FnOnce() -> Result<T, RunnerError>) -> Result<T, RunnerError> {
    let what = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Err(RunnerError::Device { what, .. })) => libtorch::message(&what),
        Ok(result) => return result,
        Err(panic) => panic_text(panic.as_ref()),
    };
    Err(RunnerError::Device { step, what })
}

/// As [`guarded`], for the part of a step that computes rows: memory that runs out there is no
/// reason to stop. Everything that stands in front of the rows in the plan must have been done.
fn guarded_rows<T>(
    step: u64,
    run: impl FnOnce() -> Result<T, RunnerError>,
) -> Result<T, RunnerError> {
    guarded(step, run).map_err(|error| match error {
        RunnerError::Device { step, what } if libtorch::tells_of_memory(&what) => {
            RunnerError::OutOfMemory { step, what }
        }
        other => other,
    })
}

/// As [`guarded`], for the part of a step that ranks compute together: a rank without memory leaves
/// the others in the middle of an exchange, some of whose results they may have, so no rank can do
/// the step again.
fn guarded_together<T>(
    step: u64,
    run: impl FnOnce() -> Result<T, RunnerError>,
) -> Result<T, RunnerError> {
    guarded(step, run).map_err(|error| match error {
        RunnerError::Device { step, what } if libtorch::tells_of_memory(&what) => {
            let what = format!(
                "out of memory, which several ranks cannot go on from; a lower --gpu-memory-utilization \
                 or --max-num-batched-tokens avoids this: {what}"
            );
            RunnerError::Device { step, what }
        }
        other => other,
    })
}

fn outcome(result: SampleResult, refused: Option<&str>) -> Sampled<TokenLogprobs> {
    if let Some(refused) = refused {
        return failed(refused.to_owned());
    }
    match result.error {
        Some(error) => failed(error.to_string()),
        None => Sampled {
            tokens: smallvec![result.token],
            extras: result.logprobs.into_iter().collect(),
            error: None,
        },
    }
}

fn failed(error: String) -> Sampled<TokenLogprobs> {
    Sampled {
        tokens: SmallVec::new(),
        extras: Vec::new(),
        error: Some(error),
    }
}

/// Copies a float32 tensor into `values`. A GPU that has other ranks to wait for is waited for no longer
/// than `followers` say; without them, whoever notices a failure ends what the GPU waits for.
fn to_host(
    tensor: &Tensor,
    followers: Option<&Followers>,
    values: &mut Vec<f32>,
) -> Result<(), CommError> {
    #[cfg(feature = "cuda")]
    if let (Device::Cuda(device), Some(followers)) = (tensor.device(), followers) {
        let event = Event::new(device, false);
        let reached = event.and_then(|event| event.record().map(|()| event));
        followers.wait_for_gpus(|| match &reached {
            Ok(event) => event.query().map_err(|e| e.to_string()),
            Err(error) => Err(error.to_string()),
        })?;
    }
    #[cfg(not(feature = "cuda"))]
    let _ = followers;
    let tensor = tensor.to_device(Device::Cpu).contiguous();
    let count = tensor.numel();
    values.resize(count, 0.0);
    tensor.copy_data(values, count);
    Ok(())
}

pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    libtorch::message(text.unwrap_or("a panic without a message"))
}
