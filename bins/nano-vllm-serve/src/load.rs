//! From flags to an engine that is ready, with a progress bar while weights are read.

use std::str::FromStr;

use engine::{DeviceChoice, Engine, EngineConfig};
use indicatif::{ProgressBar, ProgressStyle};
use tp_model::Runner;

use crate::args::EngineArgs;
use crate::openai::ModelNames;

impl EngineArgs {
    /// Loads the model and returns the engine and the names that requests may call it by.
    pub fn load(&self) -> anyhow::Result<(Engine<Runner>, ModelNames)> {
        if let Some(threads) = self.threads {
            torch_ext::cpu::set_num_threads(threads);
        }
        let config = self.config()?;
        let name = self
            .model
            .clone()
            .unwrap_or_else(|| "nano-vllm-demo".to_owned());
        let names = match self.served_model_name.is_empty() {
            true => vec![name],
            false => self.served_model_name.clone(),
        };
        if self.model.is_none() {
            return Ok((engine::demo::engine(&config)?, ModelNames(names)));
        }
        // indicatif draws on a terminal only.
        let bar = ProgressBar::no_length().with_style(
            ProgressStyle::with_template(
                "loading weights {bar:30} {bytes}/{total_bytes} {bytes_per_sec}",
            )
            .expect("a constant template"),
        );
        let progress = |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        };
        let engine = Engine::from_config_with(&config, Some(&progress))?;
        bar.finish_and_clear();
        Ok((engine, ModelNames(names)))
    }

    /// Runs a rank other than 0 until rank 0 ends; returns rank 0's exit code.
    pub fn follow(&self) -> anyhow::Result<i32> {
        if let Some(threads) = self.threads {
            torch_ext::cpu::set_num_threads(threads);
        }
        let config = self.config()?;
        Ok(match self.model {
            None => engine::demo::follow(&config)?,
            Some(_) => engine::follow(&config, None)?,
        })
    }

    /// The engine's configuration.
    pub fn config(&self) -> anyhow::Result<EngineConfig> {
        let defaults = EngineConfig::new(self.model.clone().unwrap_or_default());
        Ok(EngineConfig {
            revision: self.revision.clone(),
            dtype: FromStr::from_str(&self.dtype)?,
            device: match self.cpu {
                true => DeviceChoice::Cpu,
                false => self.device.parse()?,
            },
            max_model_len: self.max_model_len.unwrap_or_default(),
            max_num_seqs: self.max_num_seqs.unwrap_or(defaults.max_num_seqs),
            usage: self.usage,
            max_num_batched_tokens: self.max_num_batched_tokens,
            long_prefill_token_threshold: self.long_prefill_token_threshold,
            mixed_step_tokens: self.mixed_step_tokens,
            block_size: self.block_size,
            enable_prefix_caching: !self.no_enable_prefix_caching,
            enable_chunked_prefill: !self.no_enable_chunked_prefill,
            kv_cache_memory_bytes: self.kv_cache_memory_bytes,
            gpu_memory_utilization: self.gpu_memory_utilization,
            num_gpu_blocks_override: self.num_gpu_blocks_override,
            load_format: self.load_format.parse()?,
            scheduling_policy: match &self.scheduling_policy {
                Some(policy) => policy.parse()?,
                None => defaults.scheduling_policy,
            },
            class_weights: self.class_weights.clone(),
            seed: self.seed,
            overlap: self.no_overlap.then_some(false),
            attention_backend: FromStr::from_str(&self.attention_backend)?,
            deterministic: self.deterministic,
            enforce_eager: self.enforce_eager,
            served_model_name: self.served_model_name.clone(),
            tensor_parallel_size: self.tensor_parallel_size,
            pipeline_parallel_size: self.pipeline_parallel_size,
            pp_layer_partition: self.pp_layer_partition.clone(),
            custom_all_reduce: !self.disable_custom_all_reduce,
            device_ids: self.device_ids.clone(),
            world: self.world.clone(),
            health: self.health.clone(),
            distributed_timeout: self.distributed_timeout,
            max_logprobs: self.max_logprobs,
            chat_template: self.chat_template.clone(),
            generation_defaults: FromStr::from_str(&self.generation_config)?,
            generation_overrides: match &self.override_generation_config {
                Some(json) => json.parse()?,
                None => defaults.generation_overrides.clone(),
            },
            skip_tokenizer_init: self.skip_tokenizer_init,
            ..defaults
        })
    }
}
