//! One decoder layer: attention and MLP, each behind a norm.

use tch::Tensor;

use crate::attention::{AttentionBackend, AttentionBatch, AttentionLayer};
use crate::comm::{Collective, CommError};
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::kv_cache::LayerKv;
use crate::layers::{Linear, NormInput, RmsNorm};
use crate::weights::{Loader, Part, Split};

/// A layer of the decoder.
#[derive(Debug)]
pub struct DecoderLayer {
    input_norm: RmsNorm,
    qkv: Box<dyn Linear>,
    attention: AttentionLayer,
    o: Box<dyn Linear>,
    post_norm: RmsNorm,
    gate_up: Box<dyn Linear>,
    down: Box<dyn Linear>,
}

/// What every layer of a step needs.
pub(super) struct StepContext<'a> {
    pub(super) attention: &'a dyn AttentionBackend,
    pub(super) comm: &'a dyn Collective,
    pub(super) batch: &'a AttentionBatch,
}

impl StepContext<'_> {
    /// Takes the sum of all ranks' `x`, if it is yet to be added, with the addition and the norm that follow if one kernel
    /// does all of it.
    pub(super) fn sum_normed(
        &self,
        x: NormInput,
        residual: &mut Tensor,
        norm: &RmsNorm,
    ) -> Result<NormInput, CommError> {
        let NormInput::Added(Some(x)) = x else {
            return Ok(x);
        };
        let fused = self
            .comm
            .all_reduce_norm(&x, residual, &norm.weight, norm.eps)?;
        Ok(match fused {
            Some(normed) => NormInput::Normed(normed),
            None => NormInput::Added(Some(self.comm.all_reduce_sum(x)?)),
        })
    }

    /// `linear` of x, of which this rank has a part, for `next` behind `norm`.
    fn forward_adding(
        &self,
        linear: &dyn Linear,
        x: &Tensor,
        residual: &mut Tensor,
        next: Option<BehindNorm<'_>>,
    ) -> NormInput {
        match next {
            // Nothing can be added before the sum over ranks is taken.
            Some((norm, next)) if self.comm.world_size() == 1 => {
                linear.forward_adding(x, residual, norm, next)
            }
            _ => NormInput::Added(Some(linear.forward(x))),
        }
    }
}

/// A norm of the residual, and the product that takes it.
pub(super) type BehindNorm<'a> = (&'a RmsNorm, &'a dyn Linear);

impl DecoderLayer {
    pub(super) fn load(
        loader: &mut Loader<'_>,
        config: &ModelConfig,
        index: usize,
    ) -> Result<Self, ModelError> {
        let shard = loader.shard();
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let (hidden, width) = (config.hidden_size, config.intermediate_size);
        let (heads, kv_heads) = (config.num_heads, config.num_kv_heads);
        let (local_kv_heads, replicas) = shard.kv_heads(kv_heads);
        let (q_features, kv_features) = (heads * config.head_dim, kv_heads * config.head_dim);
        let eps = config.rms_norm_eps;
        let [q, k, v, o] = ["q", "k", "v", "o"].map(|p| name(&format!("self_attn.{p}_proj")));
        let [gate, up, down] = ["gate", "up", "down"].map(|p| name(&format!("mlp.{p}_proj")));
        let part = Part::new;
        let kv_part = |name| Part {
            replicas,
            ..Part::new(name, kv_features)
        };

        let input_norm = loader.norm(&name("input_layernorm"), hidden, eps)?;
        let qkv_parts = [part(&q, q_features), kv_part(&k), kv_part(&v)];
        let qkv = loader.linear(&qkv_parts, hidden, Split::Out, config.qkv_bias)?;
        let qk_norm = match config.qk_norm {
            true => Some((
                loader.norm(&name("self_attn.q_norm"), config.head_dim, eps)?,
                loader.norm(&name("self_attn.k_norm"), config.head_dim, eps)?,
            )),
            false => None,
        };
        let o = loader.linear(&[part(&o, hidden)], q_features, Split::In, config.o_bias)?;
        let post_norm = loader.norm(&name("post_attention_layernorm"), hidden, eps)?;
        let mlp_parts = [part(&gate, width), part(&up, width)];
        let gate_up = loader.linear(&mlp_parts, hidden, Split::Out, config.mlp_bias)?;
        let down = loader.linear(&[part(&down, hidden)], width, Split::In, config.mlp_bias)?;
        Ok(Self {
            input_norm,
            qkv,
            attention: AttentionLayer {
                num_heads: heads / shard.world_size,
                num_kv_heads: local_kv_heads,
                head_dim: config.head_dim,
                window: config.windows[index],
                qk_norm,
            },
            o,
            post_norm,
            gate_up,
            down,
        })
    }

    pub(super) fn weight_bytes(&self) -> usize {
        let weights = [&self.qkv, &self.o, &self.gate_up, &self.down];
        weights.iter().map(|weight| weight.bytes()).sum()
    }

    /// What takes the residual first.
    pub(super) fn entry(&self) -> BehindNorm<'_> {
        (&self.input_norm, self.qkv.as_ref())
    }

    /// Adds the output of the layer before (`x`; nothing in the first layer, whose input is the
    /// residual itself) to `residual`, and returns this layer's, as the next layer's entry, if there is one, takes
    /// it. What is not yet added, this rank has a part of: the sum over ranks is taken when it is.
    ///
    /// With `rows` (int64), both are of these tokens alone afterwards: all tokens' keys and values
    /// are written, but what comes after attention is computed for these.
    pub(super) fn forward(
        &self,
        x: NormInput,
        residual: &mut Tensor,
        kv: &LayerKv,
        step: &StepContext<'_>,
        rows: Option<&Tensor>,
        next: Option<BehindNorm<'_>>,
    ) -> Result<NormInput, CommError> {
        let x = step.sum_normed(x, residual, &self.input_norm)?;
        let qkv = self.qkv.forward_normed(&x, residual, &self.input_norm);
        let (attention, layer, batch) = (step.attention, &self.attention, step.batch);
        let mut attended = attention
            .write_and_attend(&qkv, layer, kv, batch)
            .unwrap_or_else(|| {
                let q = attention.write_kv(&qkv, layer, kv, batch);
                attention.attend(&q, layer, kv, batch)
            });
        if let Some(rows) = rows {
            *residual = residual.index_select(0, rows);
            if rows.size()[0] == 0 {
                return Ok(NormInput::Added(None));
            }
            attended = attended.index_select(0, rows);
        }
        let mlp = Some((&self.post_norm, self.gate_up.as_ref()));
        let o = step.forward_adding(self.o.as_ref(), &attended, residual, mlp);
        let o = step.sum_normed(o, residual, &self.post_norm)?;
        let h = self.gate_up.forward_gated(&o, residual, &self.post_norm);
        Ok(step.forward_adding(self.down.as_ref(), &h, residual, next))
    }
}
