//! Embedding, layers, final norm and output projection.

use std::collections::BTreeSet;
use std::ops::Range;

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
    vocab_size: usize,
    /// This rank's part of the vocabulary: of the embedding's rows and of the logits.
    vocab: Range<usize>,
}

/// What one job of loading yields.
enum Piece {
    Vocabulary(Box<dyn Linear>),
    Layer(Box<DecoderLayer>),
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
                Some(layer) => {
                    Piece::Layer(Box::new(DecoderLayer::load(&mut loader, config, layer)?))
                }
                None => {
                    let name = ["model.embed_tokens", "lm_head"][index];
                    let part = Part::new(name, config.vocab_size);
                    let width = config.hidden_size;
                    Piece::Vocabulary(loader.linear(&[part], width, Split::Vocabulary, false)?)
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
                Piece::Layer(layer) => layers.push(*layer),
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
            vocab_size: config.vocab_size,
            vocab: context.shard.vocab_range(config.vocab_size),
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
        let mut residual = self.embed(ids, comm)?;
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

    /// Embeddings of `ids`, of which each rank knows those in its part of the vocabulary.
    fn embed(&self, ids: &Tensor, comm: &dyn Collective) -> Result<Tensor, CommError> {
        if comm.world_size() == 1 {
            return Ok(self.embedding.rows(ids));
        }
        let (start, end) = (self.vocab.start as i64, self.vocab.end as i64);
        let elsewhere = ids.lt(start).logical_or(&ids.ge(end));
        let local = (ids - start).masked_fill(&elsewhere, 0);
        let rows = self.embedding.rows(&local);
        comm.all_reduce_sum(rows.masked_fill(&elsewhere.unsqueeze(-1), 0.0))
    }

    /// Logits, float32 `[rows, vocab]`, on rank 0; `None` on the others, which must call this too.
    pub fn logits(
        &self,
        hidden: &Tensor,
        comm: &dyn Collective,
    ) -> Result<Option<Tensor>, CommError> {
        let logits = self.raw_logits(hidden);
        if comm.world_size() == 1 {
            return Ok(Some(logits.to_kind(Kind::Float)));
        }
        let gathered = comm.gather(logits, 0)?;
        // What pads the last ranks' parts comes last.
        Ok(gathered.map(|all| {
            let logits = all.narrow(-1, 0, self.vocab_size as i64);
            logits.to_kind(Kind::Float).contiguous()
        }))
    }

    /// Logits of this rank's part of the vocabulary as they were computed, in the dtype of
    /// activations; with several ranks, of what pads it too.
    pub fn raw_logits(&self, hidden: &Tensor) -> Tensor {
        let head = self.lm_head.as_ref().unwrap_or(&self.embedding);
        head.forward(hidden)
    }
}
