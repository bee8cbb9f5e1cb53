//! Which part of a model a rank holds.

use std::ops::Range;

use crate::config::ModelConfig;
use crate::error::ModelError;

/// A rank's share of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Which share, `0..world_size`.
    pub rank: usize,
    /// How many shares there are.
    pub world_size: usize,
}

impl Shard {
    /// All of the model.
    pub const WHOLE: Shard = Shard {
        rank: 0,
        world_size: 1,
    };

    /// This rank's range of a dimension, which `world_size` must divide.
    pub(crate) fn range(self, len: usize) -> Range<usize> {
        let share = len / self.world_size;
        self.rank * share..(self.rank + 1) * share
    }

    /// The share where `replicas` neighbouring ranks hold the same.
    pub(crate) fn replicated(self, replicas: usize) -> Shard {
        Shard {
            rank: self.rank / replicas,
            world_size: self.world_size / replicas,
        }
    }

    /// Rows of the vocabulary on each rank, those that pad the last ranks' included.
    pub(crate) fn vocab_rows(self, vocab: usize) -> usize {
        vocab.div_ceil(self.world_size)
    }

    /// This rank's range of the vocabulary: of any size, because the last ranks may have less.
    pub(crate) fn vocab_range(self, vocab: usize) -> Range<usize> {
        let share = self.vocab_rows(vocab);
        (self.rank * share).min(vocab)..((self.rank + 1) * share).min(vocab)
    }

    /// Key and value heads of each rank, and how many ranks hold the same ones: 1 unless there
    /// are more ranks than heads.
    pub(crate) fn kv_heads(self, kv_heads: usize) -> (usize, usize) {
        match self.world_size.checked_div(kv_heads) {
            Some(replicas) if replicas > 1 => (1, replicas),
            _ => (kv_heads / self.world_size, 1),
        }
    }

    /// Fails unless the model can be divided so.
    pub(crate) fn check(self, config: &ModelConfig) -> Result<(), ModelError> {
        let (rank, size) = (self.rank, self.world_size);
        if size == 0 || rank >= size {
            return Err(ModelError::Options(format!(
                "tensor parallelism: rank {rank} of {size} does not exist"
            )));
        }
        let Some(obstacle) = obstacle(size, config) else {
            return Ok(());
        };
        let sizes: Vec<String> = (1..=config.num_heads)
            .filter(|size| obstacle_free(*size, config))
            .map(|size| size.to_string())
            .collect();
        Err(ModelError::Options(format!(
            "tensor_parallel_size {size} does not fit this model: {obstacle}; sizes that do: {}",
            sizes.join(", ")
        )))
    }
}

fn obstacle_free(size: usize, config: &ModelConfig) -> bool {
    obstacle(size, config).is_none()
}

/// Why the model cannot be divided by `size`.
fn obstacle(size: usize, config: &ModelConfig) -> Option<String> {
    let dimensions = [
        ("num_attention_heads", config.num_heads),
        ("intermediate_size", config.intermediate_size),
    ];
    for (name, value) in dimensions {
        if value % size != 0 {
            return Some(format!("{name} ({value}) is not a multiple of it"));
        }
    }
    let kv_heads = config.num_kv_heads;
    match kv_heads.is_multiple_of(size) || size.is_multiple_of(kv_heads) {
        true => None,
        false => Some(format!(
            "num_key_value_heads ({kv_heads}) is neither a multiple nor a divisor of it"
        )),
    }
}
