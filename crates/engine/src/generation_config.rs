//! `generation_config.json`: a checkpoint's own end tokens and sampling defaults.

use serde::Deserialize;

use crate::checkpoint::{Checkpoint, CheckpointError};

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
