//! Embedding, layers, final norm and output projection.

use std::collections::BTreeSet;

use tch::{Kind, Tensor};

use super::layer::{DecoderLayer, StepContext};
use crate::attention::{AttentionBackend, AttentionBatch};
use crate::comm::{Collective, CommError};
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::kv_cache::KvCache;
use crate::layers::{Linear, RmsNorm};
use crate::weights::{LoadContext, Loader, Part, Split, in_parallel};

/// A decoder-only transformer in the manner of Llama.
#[derive(Debug)]
pub struct Decoder {
    embedding: Box<dyn Linear>,
    layers: Vec<DecoderLayer>,
    norm: RmsNorm,
    /// `None` if the embedding serves.
    lm_head: Option<Box<dyn Linear>>,
}

/// What one job of loading yields.
enum Piece {
    Vocabulary(Box<dyn Linear>),
    Layer(DecoderLayer),
}

impl Decoder {
    /// Loads all parts, several at a time.
    pub(crate) fn load(
        context: &LoadContext<'_>,
        config: &ModelConfig,
    ) -> Result<(Self, BTreeSet<String>), ModelError> {
        let vocabularies = if config.tie_word_embeddings { 1 } else { 2 };
        // The vocabulary's matrices are the largest: they come first, the layers fill the gaps.
        let pieces = in_parallel(vocabularies + config.num_layers, |index| {
            let mut loader = Loader::new(context);
            let piece = match index.checked_sub(vocabularies) {
                Some(layer) => Piece::Layer(DecoderLayer::load(&mut loader, config, layer)?),
                None => {
                    let part = Part {
                        name: ["model.embed_tokens", "lm_head"][index],
                        out_features: config.vocab_size,
                    };
                    let width = config.hidden_size;
                    Piece::Vocabulary(loader.linear(&[part], width, Split::Whole, false)?)
                }
            };
            Ok((piece, loader.into_used()))
        })?;
        let (mut tables, mut layers) = (Vec::new(), Vec::with_capacity(config.num_layers));
        let mut loader = Loader::new(context);
        let norm = loader.norm("model.norm", config.hidden_size, config.rms_norm_eps)?;
        let mut used = loader.into_used();
        for (piece, names) in pieces {
            used.extend(names);
            match piece {
                Piece::Vocabulary(table) => tables.push(table),
                Piece::Layer(layer) => layers.push(layer),
            }
        }
        let mut tables = tables.into_iter();
        let (Some(embedding), lm_head) = (tables.next(), tables.next()) else {
            unreachable!("the embedding is the first piece");
        };
        let decoder = Self {
            embedding,
            layers,
            norm,
            lm_head,
        };
        Ok((decoder, used))
    }

    /// Bytes of all matrices.
    pub fn weight_bytes(&self) -> usize {
        let layers: usize = self.layers.iter().map(DecoderLayer::weight_bytes).sum();
        let head = self.lm_head.as_ref().map_or(0, |head| head.bytes());
        self.embedding.bytes() + layers + head
    }

    /// Runs the tokens `ids` (int64), writes their keys and values, and returns the final hidden
    /// states of those at `rows` (int64; `None`: of all): what [`Decoder::logits`] takes.
    pub fn forward(
        &self,
        ids: &Tensor,
        rows: Option<&Tensor>,
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
        if let Some(rows) = rows {
            residual = residual.index_select(0, rows);
            x = x.map(|x| x.index_select(0, rows));
        }
        Ok(self.norm.maybe_add_forward(x.as_ref(), &mut residual))
    }

    /// Logits, float32 `[rows, vocab]`.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        self.raw_logits(hidden).to_kind(Kind::Float)
    }

    /// Logits as they were computed, in the dtype of activations.
    pub fn raw_logits(&self, hidden: &Tensor) -> Tensor {
        let head = self.lm_head.as_ref().unwrap_or(&self.embedding);
        head.forward(hidden)
    }
}
