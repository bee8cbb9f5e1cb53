//! `generation_config.json`: a checkpoint's own end tokens and sampling defaults.

use std::convert::Infallible;
use std::path::PathBuf;
use std::str::FromStr;

use sampler::SamplingParams;
use serde::Deserialize;

use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::config::ConfigError;

/// Where sampling defaults come from (vLLM's `--generation-config`). End tokens are the checkpoint's
/// with each of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum GenerationDefaults {
    /// The checkpoint's `generation_config.json`, if it has one (`auto`).
    #[default]
    Checkpoint,
    /// The engine's own, whatever the checkpoint recommends (`vllm`).
    Engine,
    /// The `generation_config.json` of this folder.
    Folder(PathBuf),
}

impl FromStr for GenerationDefaults {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match text {
            "auto" => Self::Checkpoint,
            "vllm" => Self::Engine,
            folder => Self::Folder(folder.into()),
        })
    }
}

/// What an operator puts over the defaults (vLLM's `--override-generation-config`), by the names of
/// `generation_config.json`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // `GenerationConfig` has the same
pub struct GenerationOverrides {
    pub temperature: Option<f32>,
    pub top_k: Option<i64>,
    pub top_p: Option<f32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub max_new_tokens: Option<u32>,
}

impl FromStr for GenerationOverrides {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let wrong = |error: String| ConfigError::new("override_generation_config", error);
        let example = r#"must be a JSON object such as {"temperature": 0.5}"#;
        let over: Self =
            serde_json::from_str(text).map_err(|error| wrong(format!("{example}: {error}")))?;
        let params = over.put_over(GenerationConfig::default()).sampling_params();
        params
            .validate()
            .map_err(|error| wrong(error.to_string()))?;
        Ok(over)
    }
}

impl GenerationOverrides {
    fn put_over(&self, base: GenerationConfig) -> GenerationConfig {
        GenerationConfig {
            eos_token_id: base.eos_token_id,
            temperature: self.temperature.or(base.temperature),
            top_k: self.top_k.or(base.top_k),
            top_p: self.top_p.or(base.top_p),
            min_p: self.min_p.or(base.min_p),
            repetition_penalty: self.repetition_penalty.or(base.repetition_penalty),
            max_new_tokens: self.max_new_tokens.or(base.max_new_tokens),
            max_tokens_limit: self.max_new_tokens.or(base.max_tokens_limit),
        }
    }
}

/// What the checkpoint's author recommends. Fields that are absent fall back to the engine's
/// defaults; a request that sets a parameter wins over both.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct GenerationConfig {
    /// Tokens that end a sequence.
    #[serde(default, deserialize_with = "one_or_many")]
    pub eos_token_id: Vec<u32>,
    /// Sampling temperature.
    pub temperature: Option<f32>,
    /// How many of the likeliest tokens to keep; 0 keeps all.
    pub top_k: Option<i64>,
    /// Probability mass to keep.
    pub top_p: Option<f32>,
    /// Least probability relative to the likeliest token.
    pub min_p: Option<f32>,
    /// Penalty on tokens that occurred in prompt or output.
    pub repetition_penalty: Option<f32>,
    /// Default for `max_tokens`.
    pub max_new_tokens: Option<u32>,
    /// Most tokens that a request gets, whatever it asks for: `max_new_tokens` where the operator
    /// brought it (in a folder, or as an override). The checkpoint's own is a default only, as in vLLM.
    #[serde(skip)]
    pub max_tokens_limit: Option<u32>,
}

/// `eos_token_id` as a number, a list of numbers, or null.
pub(crate) fn one_or_many<'de, D>(deserializer: D) -> Result<Vec<u32>, D::Error>
where
    D: serde::Deserializer<'de>,
{
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum OneOrMany {
        One(u32),
        Many(Vec<u32>),
    }
    Ok(match Option::<OneOrMany>::deserialize(deserializer)? {
        None => Vec::new(),
        Some(OneOrMany::One(id)) => vec![id],
        Some(OneOrMany::Many(ids)) => ids,
    })
}

#[derive(Deserialize)]
struct ModelConfig {
    #[serde(default, deserialize_with = "one_or_many")]
    eos_token_id: Vec<u32>,
}

impl GenerationConfig {
    /// The defaults that the flags ask for, with the checkpoint's end tokens.
    pub fn for_flags(
        checkpoint: &Checkpoint,
        defaults: &GenerationDefaults,
        over: &GenerationOverrides,
    ) -> Result<Self, CheckpointError> {
        let own = Self::load(checkpoint)?;
        let base = match defaults {
            GenerationDefaults::Checkpoint => own.clone(),
            GenerationDefaults::Engine => Self::default(),
            GenerationDefaults::Folder(folder) => {
                let folder = Checkpoint::Directory(folder.clone());
                let file = "generation_config.json";
                let missing = || folder.error(file, "missing, and --generation-config names it");
                let named: Self = folder.read_json(file)?.ok_or_else(missing)?;
                Self {
                    max_tokens_limit: named.max_new_tokens,
                    ..named
                }
            }
        };
        Ok(over.put_over(Self {
            eos_token_id: own.eos_token_id,
            ..base
        }))
    }

    /// The parameters of a request that sets none: these, and the sampler's defaults where they are
    /// silent.
    pub fn sampling_params(&self) -> SamplingParams {
        let base = SamplingParams::default();
        SamplingParams {
            temperature: self.temperature.unwrap_or(base.temperature),
            top_k: self
                .top_k
                .map_or(base.top_k, |k| i32::try_from(k).unwrap_or(base.top_k)),
            top_p: self.top_p.unwrap_or(base.top_p),
            min_p: self.min_p.unwrap_or(base.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(base.repetition_penalty),
            max_tokens: self.max_new_tokens.or(base.max_tokens),
            ..base
        }
    }

    /// Reads `generation_config.json`; end tokens that it leaves out come from `config.json`.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self, CheckpointError> {
        let mut config: GenerationConfig = checkpoint
            .read_json("generation_config.json")?
            .unwrap_or_default();
        if config.eos_token_id.is_empty()
            && let Some(model) = checkpoint.read_json::<ModelConfig>("config.json")?
        {
            config.eos_token_id = model.eos_token_id;
        }
        Ok(config)
    }
}
