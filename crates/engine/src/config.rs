//! What a user chooses about an engine, named as in vLLM.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use batch_scheduler::{Fcfs, Priority, SchedulingPolicy, WeightedFair};
use tp_model::comm::Health;
use tp_model::distributed::World;
use tp_model::{Backend, DtypeChoice, ParallelConfig};

use crate::generation_config::{GenerationDefaults, GenerationOverrides};

/// Less would not tell a rank that is gone from one whose thread waits its turn.
const MIN_TIMEOUT: Duration = Duration::from_millis(100);

/// Configuration of an engine. [`EngineConfig::new`] gives vLLM's defaults.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// A directory in Hugging Face format, or a hub id such as `Qwen/Qwen3-0.6B`.
    pub model: String,
    /// Branch, tag or commit of a hub id.
    pub revision: Option<String>,
    /// Dtype of weights and KV cache.
    pub dtype: DtypeChoice,
    /// Where to run.
    pub device: DeviceChoice,
    /// Longest sequence, prompt and output together.
    pub max_model_len: MaxModelLen,
    /// Sequences that run at once.
    pub max_num_seqs: usize,
    /// What the engine is for.
    pub usage: Usage,
    /// Tokens that a step computes at most; unset: 2048 on a CPU and 8192 on a GPU, where
    /// [`Usage::Offline`] has 16384 if the GPU has 70 GiB and [`Usage::Server`] 4096 if a GPU has more than
    /// 4e9 weights (more if other limits need it).
    pub max_num_batched_tokens: Option<usize>,
    /// Most prompt tokens of one sequence in a step; 0 for no limit.
    pub long_prefill_token_threshold: usize,
    /// Tokens up to which prompts fill a step in which some sequences decode (see
    /// [`SchedulerConfig`](batch_scheduler::SchedulerConfig::mixed_step_tokens)); 0 for as many as the step has
    /// room for. Unset: 224 if each GPU has more than 4e9 weights, 0 if not and with `deterministic`.
    pub mixed_step_tokens: Option<usize>,
    /// Tokens in a block of the KV cache.
    pub block_size: usize,
    /// Whether requests share the keys and values of equal beginnings.
    pub enable_prefix_caching: bool,
    /// Whether long prompts are computed over several steps, mixed with decoding.
    pub enable_chunked_prefill: bool,
    /// Memory for the KV cache. Unset: on a CPU at most 4 GiB and half of what is free, on a GPU
    /// what `gpu_memory_utilization` leaves; never more than all sequences at full length need.
    pub kv_cache_memory_bytes: Option<u64>,
    /// Share of a GPU's memory that weights, working memory and KV cache may take together, with
    /// what other processes hold counted in: above 0, at most 1.
    pub gpu_memory_utilization: f64,
    /// Number of blocks of the KV cache, whatever the memory.
    pub num_gpu_blocks_override: Option<usize>,
    /// Where weights come from.
    pub load_format: LoadFormat,
    /// Who is served first.
    pub scheduling_policy: Policy,
    /// With [`Policy::Fair`]: shares of classes of requests, 1 for those that are not here.
    pub class_weights: BTreeMap<u64, u32>,
    /// Seed of requests without one, and of dummy weights.
    pub seed: u64,
    /// Whether the next step is planned while one runs. Unset: on a GPU and with several pipeline
    /// stages, but not on a CPU, where both would want the same cores.
    pub overlap: Option<bool>,
    /// Which kernels run the model.
    pub attention_backend: Backend,
    /// Experimental: whether a request's logits are to be the same bits whatever its batch mates,
    /// chunks and cache hits. The CPU's are anyway; a GPU pays with speed, and does not reach it in
    /// all cases yet.
    pub deterministic: bool,
    /// Whether decode steps on a GPU go without captured CUDA graphs.
    pub enforce_eager: bool,
    /// Names under which a server offers the model; empty: the model's own.
    pub served_model_name: Vec<String>,
    /// Ranks to divide each layer among: threads of this process, unless there is a `world`. Each
    /// has a GPU of its own, if they do not run on the CPU.
    pub tensor_parallel_size: usize,
    /// Stages to divide the layers among, each of which is `tensor_parallel_size` ranks. On the CPU
    /// only. As many steps as stages are under way, unless `overlap` is off.
    pub pipeline_parallel_size: usize,
    /// How many layers each stage has; unset: evenly ([`ParallelConfig::pp_layer_partition`]).
    pub pp_layer_partition: Option<Vec<usize>>,
    /// On GPUs that can read each other's memory, as threads of one process: take short sums over
    /// ranks with our own kernel, fused with the norm behind them, instead of NCCL's.
    pub custom_all_reduce: bool,
    /// Which GPU each rank has, if ranks are threads; unset: rank `r` has GPU `r`. One GPU for several
    /// ranks is for tests.
    pub device_ids: Option<Vec<usize>>,
    /// The processes that are the ranks, of which this is one.
    pub world: Option<World>,
    /// How long a rank may keep the others waiting before the engine ends.
    pub distributed_timeout: Duration,
    /// What hears of the first failure of ranks that are threads of this process, also while the engine
    /// hangs with one of them in a driver, where nothing can end it but the process's end. For one
    /// engine; processes have `world`'s.
    pub health: Option<Health>,
    /// Most log-probabilities a token that a request may ask for; -1 for no limit.
    pub max_logprobs: i32,
    /// A template file to use instead of the checkpoint's.
    pub chat_template: Option<PathBuf>,
    /// Where sampling defaults come from.
    pub generation_defaults: GenerationDefaults,
    /// What is put over them.
    pub generation_overrides: GenerationOverrides,
    /// Serve token ids only, even if the checkpoint has a tokenizer.
    pub skip_tokenizer_init: bool,
    /// Show progress bars while a model is downloaded.
    pub download_progress: bool,
}

/// What an engine is for, as far as defaults depend on it (vLLM's usage context).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Usage {
    /// Requests that are there from the beginning: what counts is when the last one is done.
    #[default]
    Offline,
    /// Requests that come meanwhile: a step must not keep the next one waiting for long.
    Server,
}

/// Where to run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// A GPU if there is one and this build supports it, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The first GPU.
    Cuda,
}

/// Longest sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MaxModelLen {
    /// What the model was made for; an error if the KV cache cannot hold one such sequence.
    #[default]
    Model,
    /// As `Model`, but shortened to what the KV cache holds.
    Auto,
    /// This many tokens.
    Tokens(usize),
}

/// Where weights come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoadFormat {
    /// The checkpoint's safetensors files.
    #[default]
    Safetensors,
    /// Random ones; of the checkpoint only `config.json` must exist.
    Dummy,
}

/// Who is served first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// In the order of arrival.
    #[default]
    Fcfs,
    /// By the requests' `priority`, lower first; then in the order of arrival.
    Priority,
    /// Classes of requests share the tokens by their weights: the one that has had the least goes
    /// first, however many requests the others send.
    Fair,
}

/// A configuration that cannot work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{option}: {message}")]
pub struct ConfigError {
    /// The field of [`EngineConfig`] at fault.
    pub option: &'static str,
    /// What is wrong with it and what would work.
    pub message: String,
}

impl ConfigError {
    pub(crate) fn new(option: &'static str, message: impl Into<String>) -> Self {
        ConfigError {
            option,
            message: message.into(),
        }
    }
}

macro_rules! from_names {
    ($type:ty, $option:literal, $($name:literal => $value:expr),+) => {
        impl FromStr for $type {
            type Err = ConfigError;

            fn from_str(text: &str) -> Result<Self, ConfigError> {
                match text {
                    $($name => Ok($value),)+
                    _ => Err(ConfigError::new(
                        $option,
                        format!("`{text}` is none of {}", [$($name),+].join(", ")),
                    )),
                }
            }
        }
    };
}

from_names!(DeviceChoice, "device", "auto" => Self::Auto, "cpu" => Self::Cpu, "cuda" => Self::Cuda);
from_names!(LoadFormat, "load_format",
    "auto" => Self::Safetensors, "safetensors" => Self::Safetensors, "dummy" => Self::Dummy);
from_names!(Policy, "scheduling_policy", 
    "fcfs" => Self::Fcfs, "priority" => Self::Priority, "fair" => Self::Fair);

impl EngineConfig {
    /// vLLM's defaults for `model`.
    pub fn new(model: impl Into<String>) -> Self {
        EngineConfig {
            model: model.into(),
            revision: None,
            dtype: DtypeChoice::Auto,
            device: DeviceChoice::Auto,
            max_model_len: MaxModelLen::Model,
            max_num_seqs: 256,
            usage: Usage::default(),
            max_num_batched_tokens: None,
            long_prefill_token_threshold: 0,
            mixed_step_tokens: None,
            block_size: 16,
            enable_prefix_caching: true,
            enable_chunked_prefill: true,
            kv_cache_memory_bytes: None,
            gpu_memory_utilization: 0.92,
            num_gpu_blocks_override: None,
            load_format: LoadFormat::Safetensors,
            scheduling_policy: Policy::Fcfs,
            class_weights: BTreeMap::new(),
            seed: 0,
            overlap: None,
            attention_backend: Backend::Auto,
            deterministic: false,
            enforce_eager: false,
            served_model_name: Vec::new(),
            tensor_parallel_size: 1,
            pipeline_parallel_size: 1,
            pp_layer_partition: None,
            custom_all_reduce: true,
            device_ids: None,
            world: None,
            distributed_timeout: Duration::from_secs(60),
            health: None,
            max_logprobs: 20,
            chat_template: None,
            generation_defaults: GenerationDefaults::default(),
            generation_overrides: GenerationOverrides::default(),
            skip_tokenizer_init: false,
            download_progress: true,
        }
    }

    /// How the model is divided among ranks.
    pub fn parallel(&self) -> ParallelConfig {
        ParallelConfig {
            tensor_parallel_size: self.tensor_parallel_size,
            pipeline_parallel_size: self.pipeline_parallel_size,
            pp_layer_partition: self.pp_layer_partition.clone(),
        }
    }

    /// The scheduler's policy for `scheduling_policy`.
    pub fn policy(&self) -> Box<dyn SchedulingPolicy> {
        match self.scheduling_policy {
            Policy::Fcfs => Box::new(Fcfs::default()),
            Policy::Priority => Box::new(Priority::default()),
            Policy::Fair => {
                let weights = self.class_weights.iter();
                let fair = weights.fold(WeightedFair::new(), |fair, (class, weight)| {
                    fair.with_weight(*class, *weight)
                });
                Box::new(fair)
            }
        }
    }

    /// Checks what can be checked before the model is known.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if let Some(world) = &self.world {
            self.check_world_size(world.world_size())?;
        }
        if self.distributed_timeout < MIN_TIMEOUT {
            return Err(ConfigError::new(
                "distributed_timeout",
                "must be at least 0.1 seconds",
            ));
        }
        let sizes = [
            ("tensor_parallel_size", Some(self.tensor_parallel_size)),
            ("pipeline_parallel_size", Some(self.pipeline_parallel_size)),
            ("max_num_seqs", Some(self.max_num_seqs)),
            ("block_size", Some(self.block_size)),
            ("max_num_batched_tokens", self.max_num_batched_tokens),
            ("num_gpu_blocks_override", self.num_gpu_blocks_override),
        ];
        for (option, size) in sizes {
            if size == Some(0) {
                return Err(ConfigError::new(option, "must be at least 1, got 0"));
            }
        }
        if self.max_model_len == MaxModelLen::Tokens(0) {
            return Err(ConfigError::new(
                "max_model_len",
                "must be at least 1, got 0",
            ));
        }
        if let Some(tokens) = self.max_num_batched_tokens
            && tokens < self.max_num_seqs
        {
            return Err(ConfigError::new(
                "max_num_batched_tokens",
                format!(
                    "{tokens} is below max_num_seqs ({}): a step could not give every sequence a \
                     token; raise it or lower max_num_seqs",
                    self.max_num_seqs
                ),
            ));
        }
        let utilization = self.gpu_memory_utilization;
        if !(utilization > 0.0 && utilization <= 1.0) {
            return Err(ConfigError::new(
                "gpu_memory_utilization",
                format!("must be above 0 and at most 1, got {utilization}"),
            ));
        }
        if self.max_logprobs < -1 {
            return Err(ConfigError::new(
                "max_logprobs",
                format!("must be at least -1 (no limit), got {}", self.max_logprobs),
            ));
        }
        Ok(())
    }
    /// Fails unless `processes` are as many as the ranks.
    pub fn check_world_size(&self, processes: usize) -> Result<(), ConfigError> {
        let (tp, pp) = (self.tensor_parallel_size, self.pipeline_parallel_size);
        if tp.checked_mul(pp) == Some(processes) {
            return Ok(());
        }
        let mut fits: Vec<String> = Vec::new();
        if pp > 0 && processes.is_multiple_of(pp) {
            fits.push(format!("tensor_parallel_size {}", processes / pp));
        }
        if tp > 0 && processes.is_multiple_of(tp) {
            fits.push(format!("pipeline_parallel_size {}", processes / tp));
        }
        if let Some(ranks) = tp.checked_mul(pp) {
            fits.push(format!("{ranks} processes"));
        }
        Err(ConfigError::new(
            "tensor_parallel_size",
            format!(
                "{tp} times pipeline_parallel_size {pp} must be the number of \
                 processes, but the launcher started {processes} processes (WORLD_SIZE); use {}",
                fits.join(" or ")
            ),
        ))
    }
}
