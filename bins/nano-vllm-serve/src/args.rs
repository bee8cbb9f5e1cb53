//! The flags that every command shares, named as in vLLM.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use engine::{Health, MaxModelLen, Usage, World};

use crate::sizes::{parse_count, parse_size};

/// What to load and how to run it.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Engine")]
pub struct EngineArgs {
    /// A folder in Hugging Face format, or a hub id such as Qwen/Qwen3-0.6B. Without it: the
    /// built-in demo model.
    #[arg(long, group = "named")]
    pub model: Option<String>,
    /// Revision of a hub id.
    #[arg(long, requires = "named")]
    pub revision: Option<String>,
    /// Name of the model in requests and answers; may be given several times.
    #[arg(long, num_args = 1..)]
    pub served_model_name: Vec<String>,
    /// auto, float32, bfloat16 or float16. auto takes the checkpoint's type. On the CPU weights and KV cache have this type, and
    /// arithmetic is float32.
    #[arg(long, default_value = "auto")]
    pub dtype: String,
    /// auto, safetensors or dummy. dummy: random weights, only config.json is read.
    #[arg(long, default_value = "auto")]
    pub load_format: String,
    /// Where to run: auto, cpu or cuda.
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Same as --device cpu.
    #[arg(long, conflicts_with = "device")]
    pub cpu: bool,
    /// Threads for computing on the CPU; all cores unless set.
    #[arg(long, value_parser = parse_threads)]
    pub threads: Option<usize>,
    /// Most tokens of a sequence, prompt and answer (accepts 1k, 1K) [default: the
    /// model's own]. auto or -1: the most that the KV cache holds.
    #[arg(long, value_parser = parse_model_len, allow_hyphen_values = true)]
    pub max_model_len: Option<MaxModelLen>,
    /// Most sequences running at once [default: 256; demo: 6].
    #[arg(long, value_parser = parse_count)]
    pub max_num_seqs: Option<usize>,
    /// Most tokens computed in one step.
    #[arg(long, value_parser = parse_count)]
    pub max_num_batched_tokens: Option<usize>,
    /// Tokens in a block of the KV cache.
    #[arg(long, default_value = "16", value_parser = parse_block_size)]
    pub block_size: usize,
    /// Share the KV cache of equal prompt beginnings (the default).
    #[arg(long, overrides_with = "no_enable_prefix_caching")]
    pub enable_prefix_caching: bool,
    /// Compute every prompt in full.
    #[arg(long)]
    pub no_enable_prefix_caching: bool,
    /// Split long prompts over steps and mix them with decoding (the default).
    #[arg(long, overrides_with = "no_enable_chunked_prefill")]
    pub enable_chunked_prefill: bool,
    /// Compute every prompt in one step.
    #[arg(long)]
    pub no_enable_chunked_prefill: bool,
    /// Most prompt tokens of one sequence in a step; 0: no limit.
    #[arg(long, default_value_t = 0)]
    pub long_prefill_token_threshold: usize,
    /// Tokens up to which prompts fill a step in which some sequences decode; 0: as many as it has room for
    /// [default: 224 where a GPU has more than 4 billion weights, 0 if not and with --deterministic].
    #[arg(long)]
    pub mixed_step_tokens: Option<usize>,
    /// Memory for the KV cache in bytes (accepts 512M, 4G, …).
    #[arg(long, value_parser = parse_size)]
    pub kv_cache_memory_bytes: Option<u64>,
    /// Share of the GPU's memory to use, for weights, working memory and KV cache together.
    #[arg(long, default_value_t = 0.92)]
    pub gpu_memory_utilization: f64,
    /// Number of blocks of the KV cache, whatever the memory.
    #[arg(long)]
    pub num_gpu_blocks_override: Option<usize>,
    /// Ranks to divide each layer among: threads of this process, or, under torchrun, processes. Each
    /// has a GPU of its own, or a part of the CPU.
    #[arg(long, alias = "tp", default_value_t = 1)]
    pub tensor_parallel_size: usize,
    /// Pipeline stages to divide the layers among, each of --tensor-parallel-size ranks.
    #[arg(long, alias = "pp", default_value_t = 1)]
    pub pipeline_parallel_size: usize,
    /// Layers of each pipeline stage, such as 20,12 [default: the same number; what is left goes to
    /// the stages before the last].
    #[arg(long, value_delimiter = ',', value_name = "LAYERS")]
    pub pp_layer_partition: Option<Vec<usize>>,
    /// Short sums over GPUs of this process through NCCL as all others, instead of our own kernel.
    #[arg(long)]
    pub disable_custom_all_reduce: bool,
    /// The GPU of each rank, such as 0,1; one for several ranks is for tests.
    #[arg(long, value_delimiter = ',', value_name = "GPUS", hide = true)]
    pub device_ids: Option<Vec<usize>>,
    /// Seconds that a rank may keep the others waiting before all of them end.
    #[arg(
        long,
        alias = "distributed-timeout-seconds",
        default_value = "60",
        value_parser = parse_seconds
    )]
    pub distributed_timeout: Duration,
    /// The other ranks, if they are processes.
    #[arg(skip)]
    pub world: Option<World>,
    /// What hears of their failures, if they are threads.
    #[arg(skip)]
    pub health: Option<Health>,
    /// Who goes first: fcfs, priority (lower values first), or fair (API keys share the tokens, by
    /// their weights) [default: fcfs; with several API keys: fair].
    #[arg(long)]
    pub scheduling_policy: Option<String>,
    /// What the engine is for.
    #[arg(skip)]
    pub usage: Usage,
    /// Weights of the API keys.
    #[arg(skip)]
    pub class_weights: BTreeMap<u64, u32>,
    /// auto (the fastest for the device), reference, torch, cpu or cuda.
    #[arg(long, default_value = "auto")]
    pub attention_backend: String,
    /// Experimental: the same bits for a request whatever its batch mates, chunks and cache hits. A
    /// CPU always gives them; a GPU gets closer, more slowly, but does not give them in all cases yet.
    #[arg(long)]
    pub deterministic: bool,
    /// No CUDA graphs: every kernel of a decode step is launched on its own.
    #[arg(long)]
    pub enforce_eager: bool,
    /// Schedule a step only once the step before has finished.
    #[arg(long)]
    pub no_overlap: bool,
    /// Most log-probabilities a token that a request may ask for; -1: no limit.
    #[arg(long, default_value_t = 20, allow_hyphen_values = true)]
    pub max_logprobs: i32,
    /// A chat template file to use instead of the checkpoint's.
    #[arg(long)]
    pub chat_template: Option<PathBuf>,
    /// Sampling defaults: auto (the checkpoint's generation_config.json), vllm (none), or a folder with
    /// such a file.
    #[arg(long, default_value = "auto", value_name = "auto|vllm|DIR")]
    pub generation_config: String,
    /// Sampling defaults that win over those, as a JSON object: {"temperature": 0.5, …}.
    #[arg(long, value_name = "JSON")]
    pub override_generation_config: Option<String>,
    /// Token-id prompts only: no tokenizer is loaded.
    #[arg(long)]
    pub skip_tokenizer_init: bool,
    /// Seed of requests that bring none, and of random weights.
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    pub seed: u64,
}

/// `--max-model-len`: `auto` and `-1` mean the longest that the KV cache holds.
fn parse_model_len(text: &str) -> Result<MaxModelLen, String> {
    match text {
        "auto" | "-1" => Ok(MaxModelLen::Auto),
        _ => parse_count(text).map(MaxModelLen::Tokens),
    }
}

fn parse_threads(text: &str) -> Result<usize, String> {
    // Threads beyond the cores only wait for each other, and thousands of them never get done.
    let most = 4 * std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    match parse_count(text)? {
        threads if threads <= most => Ok(threads),
        _ => Err(format!("must be at most {most}, four for each core")),
    }
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    match Duration::try_from_secs_f64(seconds) {
        Ok(time) if (0.1..=86_400.0).contains(&seconds) => Ok(time),
        _ => Err("must be between 0.1 and 86400".to_owned()),
    }
}

/// Most tokens in a block: beyond any model's context, and far from overflowing anything.
const MAX_BLOCK_SIZE: usize = 1 << 20;

fn parse_block_size(text: &str) -> Result<usize, String> {
    match parse_count(text)? {
        size if size <= MAX_BLOCK_SIZE => Ok(size),
        _ => Err(format!("must be at most {MAX_BLOCK_SIZE}")),
    }
}

impl EngineArgs {
    /// What the demo changes unless told otherwise: few places and few blocks, so that sequences
    /// wait, take each other's places, and the block map fits a screen.
    pub fn for_demo(mut self) -> Self {
        let seqs = *self.max_num_seqs.get_or_insert(6);
        self.max_num_batched_tokens.get_or_insert(seqs.max(96));
        if self.kv_cache_memory_bytes.is_none() {
            self.num_gpu_blocks_override = self.num_gpu_blocks_override.or(Some(192));
        }
        self
    }
}
