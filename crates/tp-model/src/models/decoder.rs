//! Embedding, layers, final norm and output projection.

use tch::{Kind, Tensor};

use super::layer::{DecoderLayer, StepContext};
use crate::attention::{AttentionBackend, AttentionBatch};
use crate::comm::{Collective, CommError};
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::kv_cache::KvCache;
use crate::layers::{Linear, Ops, RmsNorm};
use crate::weights::{Loader, Part, Shard, Split};

/// A decoder-only transformer in the manner of Llama.
#[derive(Debug)]
pub struct Decoder {
    embedding: Box<dyn Linear>,
    layers: Vec<DecoderLayer>,
    norm: RmsNorm,
    /// `None` if the embedding serves.
    lm_head: Option<Box<dyn Linear>>,
}

impl Decoder {
    pub(crate) fn load(
        loader: &mut Loader<'_>,
        config: &ModelConfig,
        shard: Shard,
        ops: Ops,
    ) -> Result<Self, ModelError> {
        let mut vocabulary = |name| {
            let part = Part {
                name,
                out_features: config.vocab_size,
            };
            loader.linear(&[part], config.hidden_size, Split::Whole, false)
        };
        let embedding = vocabulary("model.embed_tokens")?;
        let lm_head = match config.tie_word_embeddings {
            true => None,
            false => Some(vocabulary("lm_head")?),
        };
        let layers = (0..config.num_layers)
            .map(|index| DecoderLayer::load(loader, config, index, shard, ops))
            .collect::<Result<_, _>>()?;
        let norm = loader.norm("model.norm", config.hidden_size, config.rms_norm_eps)?;
        Ok(Self {
            embedding,
            layers,
            norm,
            lm_head,
        })
    }

    /// Bytes of all matrices.
    pub fn weight_bytes(&self) -> usize {
        let layers: usize = self.layers.iter().map(DecoderLayer::weight_bytes).sum();
        let head = self.lm_head.as_ref().map_or(0, |head| head.bytes());
        self.embedding.bytes() + layers + head
    }

    /// Runs the tokens `ids` (int64), writes their keys and values, and returns the final hidden
    /// states of those at `rows` (int64): what [`Decoder::logits`] takes.
    pub fn forward(
        &self,
        ids: &Tensor,
        rows: &Tensor,
        cache: &KvCache,
        batch: &AttentionBatch,
        attention: &dyn AttentionBackend,
        comm: &dyn Collective,
    ) -> Result<Tensor, CommError> {
        let step = StepContext {
            attention,
            comm,
            batch,
        };
        let mut residual = self.embedding.rows(ids);
        let mut x = None;
        for (layer, kv) in self.layers.iter().zip(&cache.layers) {
            x = Some(layer.forward(x, &mut residual, kv, &step)?);
        }
        // The norm works row by row: only those that become logits.
        let mut residual = residual.index_select(0, rows);
        Ok(match x {
            Some(x) => self
                .norm
                .add_forward(&x.index_select(0, rows), &mut residual),
            None => self.norm.forward(&residual),
        })
    }

    /// Logits, float32 `[rows, vocab]`.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        let head = self.lm_head.as_ref().unwrap_or(&self.embedding);
        head.forward(hidden).to_kind(Kind::Float)
    }
}
