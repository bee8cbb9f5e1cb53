//! From a configuration to an engine that is ready.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use batch_scheduler::{Scheduler, SchedulerConfig};
use paged_kv::{BlockManager, BlockSize};
use tch::Device;
use tp_model::{LoadOptions, Model, ModelConfig, ModelError, Runner, RunnerConfig};

use crate::async_engine::AsyncEngine;
use crate::chat_template::{ChatError, ChatTemplate};
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::config::{ConfigError, DeviceChoice, EngineConfig, LoadFormat, Policy, Usage};
use crate::core::EngineCore;
use crate::engine::Engine;
use crate::frontend::{Frontend, Limits};
use crate::generation_config::GenerationConfig;
use crate::hub::{self, HubError, HubOptions};
use crate::memory::{Budget, size_cache, wanted_model_len};
use crate::memory_table::MemoryTable;
use crate::ranks::{Ranks, tell};
use crate::tokenizer::Tokenizer;

/// Why an engine could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The configuration contradicts itself, the model or the machine.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The model's files could not be had.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// A file beside the weights is broken.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// `config.json` or the weights cannot be used.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The chat template that the configuration names cannot be used.
    #[error("{path}: {source}")]
    ChatTemplate {
        /// The file.
        path: String,
        /// What is wrong with it.
        source: ChatError,
    },
    /// The limits contradict each other.
    #[error(transparent)]
    Scheduler(#[from] batch_scheduler::ConfigError),
    /// The operating system refused.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// What it said.
        source: std::io::Error,
    },
}

/// Told of bytes of weights read so far, and in total.
pub type Progress<'a> = &'a (dyn Fn(u64, u64) + Sync);

impl Engine<Runner> {
    /// Finds or downloads the model, loads it, and sizes the KV cache.
    pub fn from_config(config: &EngineConfig) -> Result<Self, BuildError> {
        Self::from_config_with(config, None)
    }

    /// As [`Engine::from_config`], with news of the loading.
    pub fn from_config_with(
        config: &EngineConfig,
        progress: Option<Progress<'_>>,
    ) -> Result<Self, BuildError> {
        let dir = resolve_model(config).map_err(|error| tell(config, error))?;
        Self::from_directory(config, &dir, progress)
    }

    /// Loads the checkpoint in `dir`, whatever `config.model` says.
    pub fn from_directory(
        config: &EngineConfig,
        dir: &Path,
        progress: Option<Progress<'_>>,
    ) -> Result<Self, BuildError> {
        Self::load(config, dir, progress).map_err(|error| tell(config, error))
    }

    fn load(
        config: &EngineConfig,
        dir: &Path,
        progress: Option<Progress<'_>>,
    ) -> Result<Self, BuildError> {
        config.validate()?;
        let options = load_options(config, progress)?;
        // Everything small first: a broken tokenizer is reported before weights are read.
        let checkpoint = Checkpoint::Directory(dir.to_path_buf());
        let model_config = ModelConfig::from_dir(dir)?;
        wanted_model_len(config, model_config.max_context())?;
        let (defaults, over) = (&config.generation_defaults, &config.generation_overrides);
        let generation_config = GenerationConfig::for_flags(&checkpoint, defaults, over)?;
        let tokenizer = match config.skip_tokenizer_init {
            true => None,
            false => Tokenizer::load(&checkpoint)?.map(Arc::new),
        };
        let template = chat_template(config, &checkpoint, tokenizer.as_deref())?;
        let (model, ranks) = Ranks::load(config, dir, &options)?;
        assemble(config, model, ranks, tokenizer, template, generation_config)
    }

    /// Moves the engine to a thread of its own.
    pub fn into_async(self) -> Result<AsyncEngine, BuildError> {
        let (core, frontend) = self.into_parts();
        AsyncEngine::start(core, frontend).map_err(|source| BuildError::Io {
            what: "starting the engine's thread".to_string(),
            source,
        })
    }
}

impl AsyncEngine {
    /// Finds or downloads the model, loads it, and starts the engine's thread.
    pub fn from_config(config: &EngineConfig) -> Result<Self, BuildError> {
        Engine::from_config(config)?.into_async()
    }
}

/// The checkpoint's folder, after downloading it if need be.
pub(crate) fn resolve_model(config: &EngineConfig) -> Result<PathBuf, BuildError> {
    config.validate()?;
    let options = HubOptions {
        progress: config.download_progress,
        ..HubOptions::from_env()
    };
    let weights = config.load_format != LoadFormat::Dummy;
    let revision = config.revision.as_deref();
    Ok(hub::resolve(&config.model, revision, weights, &options)?)
}

/// How every rank loads its share.
pub(crate) fn load_options<'a>(
    config: &EngineConfig,
    progress: Option<Progress<'a>>,
) -> Result<LoadOptions<'a>, ConfigError> {
    Ok(LoadOptions {
        device: device(config.device)?,
        dtype: config.dtype,
        format: match config.load_format {
            LoadFormat::Safetensors => tp_model::LoadFormat::Safetensors,
            LoadFormat::Dummy => tp_model::LoadFormat::Dummy { seed: config.seed },
        },
        backend: config.attention_backend,
        deterministic: config.deterministic,
        enforce_eager: config.enforce_eager,
        progress,
    })
}

fn assemble(
    config: &EngineConfig,
    model: Model,
    mut ranks: Ranks,
    tokenizer: Option<Arc<Tokenizer>>,
    template: Option<ChatTemplate>,
    generation_config: GenerationConfig,
) -> Result<Engine<Runner>, BuildError> {
    let on_cpu = model.device() == Device::Cpu;
    // All stages have the same number of blocks, so the one with most layers says how many.
    let block_bytes = model.most_kv_bytes_per_block(config.block_size) as u64;
    let stages = config.pipeline_parallel_size;
    let model_len = wanted_model_len(config, model.config().max_context())?;
    let gpus = (config.tensor_parallel_size * stages) as u64;
    let many_weights = !on_cpu && model.config().num_parameters() / gpus > MANY_PARAMETERS;
    let max_num_batched_tokens = config.max_num_batched_tokens.unwrap_or_else(|| {
        let usual = match config.usage {
            _ if on_cpu => 2048,
            Usage::Offline if is_large(model.device()) => 16_384,
            // A step of 8192 tokens would take these longer than a tenth of a second.
            Usage::Server if many_weights => 4096,
            _ => 8192,
        };
        let whole_prompt = match config.enable_chunked_prefill {
            true => 0,
            false => model_len,
        };
        usual.max(config.max_num_seqs).max(whole_prompt)
    });
    let mut sizes = RunnerConfig {
        max_num_seqs: config.max_num_seqs,
        max_num_batched_tokens,
        max_model_len: model_len,
        block_size: config.block_size,
        num_blocks: 2,
    };
    let (model, budget, mut table) = budget(config, model, &mut ranks, &sizes)?;
    let size = size_cache(config, model.config().max_context(), block_bytes, budget)?;
    (table.num_blocks, table.block_bytes) = (size.num_blocks - 1, block_bytes);
    (sizes.max_model_len, sizes.num_blocks) = (size.max_model_len, size.num_blocks);
    let scheduler_config = SchedulerConfig {
        max_num_seqs: config.max_num_seqs,
        max_num_batched_tokens,
        max_model_len: size.max_model_len,
        enable_chunked_prefill: config.enable_chunked_prefill,
        long_prefill_token_threshold: config.long_prefill_token_threshold,
        mixed_step_tokens: config.mixed_step_tokens.unwrap_or(match many_weights {
            // The products that make such steps cheap are not batch-invariant.
            true if !config.deterministic => FILLED_STEP,
            // Those of 0.6B are so short that the host cannot launch a step's kernels as fast.
            _ => 0,
        }),
        max_steps_in_flight: match config.overlap.unwrap_or(stages > 1 || !on_cpu) {
            true => stages.max(2),
            false => 1,
        },
        sliding_window: model
            .config()
            .sliding_window()
            .and_then(|window| u32::try_from(window).ok()),
        micro_batches: stages > 1,
        watermark_blocks: 0,
        preemption_mode: batch_scheduler::PreemptionMode::Recompute,
    };
    let block_size = u32::try_from(config.block_size)
        .map_err(|error| ConfigError::new("block_size", error.to_string()))?;
    let kv_error = |error: paged_kv::ConfigError| ConfigError::new("block_size", error.to_string());
    let block_size = BlockSize::new(block_size).map_err(kv_error)?;
    let kv_config = paged_kv::Config::new(size.num_blocks, block_size)
        .prefix_caching(config.enable_prefix_caching && model.config().prefix_cacheable());
    let kv = BlockManager::new(kv_config).map_err(kv_error)?;
    let limits = Limits {
        vocab_size: model.config().vocab_size,
        max_model_len: size.max_model_len,
        cache_tokens: (size.num_blocks - 1) * config.block_size,
        max_num_seqs: config.max_num_seqs,
        max_logprobs: config.max_logprobs,
        priorities: config.scheduling_policy == Policy::Priority,
        seed: config.seed,
    };
    let scheduler = Scheduler::with_policy(scheduler_config, kv, config.policy())?;
    let runner = ranks.runner(config, model, &sizes)?;
    tracing::info!(
        max_model_len = size.max_model_len,
        "memory of rank {}:{table}",
        runner.model().shard().rank
    );
    let frontend = Frontend::new(tokenizer, template, generation_config, limits);
    let core = EngineCore::new(scheduler, runner);
    Ok(Engine::new(core, Arc::new(frontend)))
}

/// What the KV cache of a rank can have, measured with the model loaded, and the table of it, which
/// has the cache yet to come: those of the rank that can have least.
fn budget(
    config: &EngineConfig,
    model: Model,
    ranks: &mut Ranks,
    sizes: &RunnerConfig,
) -> Result<(Model, Budget, MemoryTable), BuildError> {
    let mut table = MemoryTable {
        device: "cpu".to_owned(),
        total: 0,
        weights: model.weight_bytes() as u64,
        work: 0,
        graphs: (0, 0),
        max_num_batched_tokens: sizes.max_num_batched_tokens,
        num_blocks: 0,
        block_size: config.block_size,
        block_bytes: 0,
    };
    let Device::Cuda(device) = model.device() else {
        let free = ranks.free_memory(config)?;
        table.total = free + table.weights;
        return Ok((model, Budget::of_host(free), table));
    };
    let (model, measured) = ranks.measure(config, model, device, sizes)?;
    let utilization = config.gpu_memory_utilization;
    let mut least = Budget {
        free: u64::MAX,
        usual: u64::MAX,
    };
    for (rank, m) in measured.iter().enumerate() {
        let beside = m.work.steps + m.work.graphs;
        let budget = Budget::of_gpu(m.total, m.free, beside, utilization);
        if (budget.usual, budget.free) >= (least.usual, least.free) {
            continue;
        }
        least = budget;
        table.device = match measured.len() {
            1 => format!("cuda:{device}"),
            ranks => format!("cuda (rank {rank} of {ranks})"),
        };
        table.total = m.total;
        table.work = m.work.steps;
        table.graphs = (m.work.graphs, m.work.num_graphs);
    }
    Ok((model, least, table))
}

fn chat_template(
    config: &EngineConfig,
    checkpoint: &Checkpoint,
    tokenizer: Option<&Tokenizer>,
) -> Result<Option<ChatTemplate>, BuildError> {
    let Some(path) = &config.chat_template else {
        return Ok(ChatTemplate::load(checkpoint, tokenizer)?);
    };
    let source = std::fs::read_to_string(path).map_err(|source| BuildError::Io {
        what: path.display().to_string(),
        source,
    })?;
    ChatTemplate::new(vec![("default".to_string(), source)], tokenizer)
        .map(Some)
        .map_err(|source| BuildError::ChatTemplate {
            path: path.display().to_string(),
            source,
        })
}

/// Weights on one GPU of a model whose steps are smaller when it serves.
const MANY_PARAMETERS: u64 = 4_000_000_000;
/// Tokens of a filled step: on an H200 the products of so many take two fifths longer than those of 32, in 16 bits.
const FILLED_STEP: usize = 224;

/// Whether it is a GPU with room for large steps; the limit is vLLM's.
fn is_large(device: Device) -> bool {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(index) = device {
        return torch_ext::cuda::memory(index).is_ok_and(|memory| memory.total >= 70 << 30);
    }
    #[cfg(not(feature = "cuda"))]
    let _ = device;
    false
}

fn device(choice: DeviceChoice) -> Result<Device, ConfigError> {
    let usable = cfg!(feature = "cuda") && torch_ext::cuda::is_available();
    match choice {
        DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Auto if !usable => Ok(Device::Cpu),
        DeviceChoice::Cuda if !cfg!(feature = "cuda") => Err(ConfigError::new(
            "device",
            "this build has no CUDA support; build with `--features cuda`, or use cpu",
        )),
        DeviceChoice::Cuda if !usable => Err(ConfigError::new(
            "device",
            "no CUDA device is available; use cpu, or check the NVIDIA driver",
        )),
        DeviceChoice::Auto | DeviceChoice::Cuda => Ok(Device::Cuda(0)),
    }
}
