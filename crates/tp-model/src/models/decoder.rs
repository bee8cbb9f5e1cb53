//! Embedding, layers, final norm and output projection: those of one stage.

use std::collections::BTreeSet;
use std::ops::Range;

use tch::{Kind, Tensor};

use super::layer::{DecoderLayer, StepContext};
use crate::attention::{AttentionBackend, AttentionBatch};
use crate::comm::{Collective, CommError};
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::kv_cache::KvCache;
use crate::layers::{Linear, NormInput, RmsNorm};
use crate::parallel::Stage;
use crate::weights::{LoadContext, Loader, Part, Split, in_parallel};

/// A decoder-only transformer in the manner of Llama, or the stage of one that a rank has.
#[derive(Debug)]
pub struct Decoder {
    /// The first stage's; and the last one's, if it is the output projection, too.
    embedding: Option<Box<dyn Linear>>,
    layers: Vec<DecoderLayer>,
    /// The last stage's.
    norm: Option<RmsNorm>,
    /// The last stage's; `None` if the embedding serves.
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
    /// Loads all parts of a stage, several at a time.
    pub(crate) fn load(
        context: &LoadContext<'_>,
        config: &ModelConfig,
        stage: &Stage,
    ) -> Result<(Self, BTreeSet<String>), ModelError> {
        let tied = config.tie_word_embeddings;
        let mut vocabularies = Vec::new();
        if stage.is_first() || (stage.is_last() && tied) {
            vocabularies.push("model.embed_tokens");
        }
        if stage.is_last() && !tied {
            vocabularies.push("lm_head");
        }
        let first_layer = stage.layers().start;
        // The vocabulary's matrices are the largest: they come first, the layers fill the gaps.
        let pieces = in_parallel(vocabularies.len() + stage.layers().len(), |index| {
            let mut loader = Loader::new(context);
            let piece = match index.checked_sub(vocabularies.len()) {
                Some(layer) => {
                    let layer = first_layer + layer;
                    Piece::Layer(Box::new(DecoderLayer::load(&mut loader, config, layer)?))
                }
                None => {
                    let part = Part::new(vocabularies[index], config.vocab_size);
                    let width = config.hidden_size;
                    Piece::Vocabulary(loader.linear(&[part], width, Split::Vocabulary, false)?)
                }
            };
            Ok((piece, loader.into_used()))
        })?;
        let (mut tables, mut layers) = (Vec::new(), Vec::with_capacity(stage.layers().len()));
        let mut loader = Loader::new(context);
        let norm = match stage.is_last() {
            true => Some(loader.norm("model.norm", config.hidden_size, config.rms_norm_eps)?),
            false => None,
        };
        let mut used = loader.into_used();
        for (piece, names) in pieces {
            used.extend(names);
            match piece {
                Piece::Vocabulary(table) => tables.push(table),
                Piece::Layer(layer) => layers.push(*layer),
            }
        }
        let lm_head = match vocabularies.last() {
            Some(&"lm_head") => tables.pop(),
            _ => None,
        };
        let decoder = Self {
            embedding: tables.pop(),
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
        let tables = self.embedding.iter().chain(&self.lm_head);
        layers + tables.map(|table| table.bytes()).sum::<usize>()
    }

    /// Runs the tokens `ids` (int64) and writes their keys and values. `input` is what the stage
    /// before this one returned; the first has none.
    ///
    /// The last stage returns the final hidden states of the tokens at `rows` (int64; `None`: of
    /// all), what [`Decoder::logits`] takes; the others their output for all tokens, `[tokens,
    /// hidden]` in the dtype of activations.
    #[allow(clippy::too_many_arguments, reason = "what a step consists of")]
    pub fn forward(
        &self,
        ids: &Tensor,
        input: Option<Tensor>,
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
        let mut residual = match input {
            Some(input) => input,
            None => self.embed(ids, comm)?,
        };
        let mut x = NormInput::Added(None);
        for (i, (layer, kv)) in self.layers.iter().zip(&cache.layers).enumerate() {
            let next = self.layers.get(i + 1).map(DecoderLayer::entry);
            // What follows the model's last attention is needed of those rows alone that become logits.
            let rows = rows.filter(|_| next.is_none() && self.norm.is_some());
            x = layer.forward(x, &mut residual, kv, &step, rows, next)?;
        }
        let x = x.into_addend();
        let Some(norm) = &self.norm else {
            // One tensor travels instead of two; the next layer's norm would add them, too.
            return Ok(match x {
                Some(x) => residual + comm.all_reduce_sum(x)?,
                None => residual,
            });
        };
        let x = step.sum_normed(NormInput::Added(x), &mut residual, norm)?;
        Ok(norm.finish(&x, &mut residual))
    }

    /// Embeddings of `ids`, of which each rank knows those in its part of the vocabulary.
    fn embed(&self, ids: &Tensor, comm: &dyn Collective) -> Result<Tensor, CommError> {
        let embedding = part(&self.embedding, "embedding", comm)?;
        if comm.world_size() == 1 {
            return Ok(embedding.rows(ids));
        }
        let (start, end) = (self.vocab.start as i64, self.vocab.end as i64);
        let elsewhere = ids.lt(start).logical_or(&ids.ge(end));
        let local = (ids - start).masked_fill(&elsewhere, 0);
        let rows = embedding.rows(&local);
        comm.all_reduce_sum(rows.masked_fill(&elsewhere.unsqueeze(-1), 0.0))
    }

    /// Logits, float32 `[rows, vocab]`, on the stage's rank 0; `None` on its others, which must
    /// call this too. Of the last stage only.
    pub fn logits(
        &self,
        hidden: &Tensor,
        comm: &dyn Collective,
    ) -> Result<Option<Tensor>, CommError> {
        let logits = self.raw_logits(hidden, comm)?;
        Ok(logits.map(|logits| logits.to_kind(Kind::Float)))
    }

    /// As [`Decoder::logits`], in the dtype of activations.
    pub fn raw_logits(
        &self,
        hidden: &Tensor,
        comm: &dyn Collective,
    ) -> Result<Option<Tensor>, CommError> {
        let head = match &self.lm_head {
            Some(head) => head.as_ref(),
            None => part(&self.embedding, "output projection", comm)?,
        };
        let logits = head.forward(hidden);
        if comm.world_size() == 1 {
            return Ok(Some(logits));
        }
        let gathered = comm.gather(logits, 0)?;
        // What pads the last ranks' parts comes last.
        Ok(gathered.map(|all| all.narrow(-1, 0, self.vocab_size as i64).contiguous()))
    }
}

/// A part that only some stages have.
fn part<'a>(
    part: &'a Option<Box<dyn Linear>>,
    what: &str,
    comm: &dyn Collective,
) -> Result<&'a dyn Linear, CommError> {
    part.as_deref().ok_or_else(|| CommError {
        rank: comm.rank(),
        world_size: comm.world_size(),
        what: format!("is asked for the {what}, which another stage has"),
    })
}
