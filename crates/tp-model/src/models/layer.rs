//! One decoder layer: attention and MLP, each behind a norm.

use tch::Tensor;

use crate::attention::{AttentionBackend, AttentionBatch, AttentionLayer};
use crate::comm::{Collective, CommError};
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::kv_cache::LayerKv;
use crate::layers::{Linear, RmsNorm};
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

/// A sum over ranks, and what was done with it.
pub(super) enum Summed {
    /// It was added to the residual: the norm of that.
    Normed(Tensor),
    /// It is yet to be added, if there is something to add.
    Sum(Option<Tensor>),
}

impl StepContext<'_> {
    /// Takes the sum of all ranks' `x`, with the addition and the norm that follow if one kernel
    /// does all of it.
    pub(super) fn sum_normed(
        &self,
        x: Option<Tensor>,
        residual: &mut Tensor,
        norm: &RmsNorm,
    ) -> Result<Summed, CommError> {
        let Some(x) = x else {
            return Ok(Summed::Sum(None));
        };
        let fused = self
            .comm
            .all_reduce_norm(&x, residual, &norm.weight, norm.eps)?;
        Ok(match fused {
            Some(normed) => Summed::Normed(normed),
            None => Summed::Sum(Some(self.comm.all_reduce_sum(x)?)),
        })
    }
}

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

    /// Adds the output of the layer before (`x`; `None` in the first layer, whose input is the
    /// residual itself) to `residual`, and returns this layer's output, not yet added. Of both, this
    /// rank has a part: they are the sums over ranks, which are not taken before they are added.
    pub(super) fn forward(
        &self,
        x: Option<Tensor>,
        residual: &mut Tensor,
        kv: &LayerKv,
        step: &StepContext<'_>,
    ) -> Result<Tensor, CommError> {
        let qkv = match step.sum_normed(x, residual, &self.input_norm)? {
            Summed::Normed(normed) => self.qkv.forward(&normed),
            Summed::Sum(x) => self
                .qkv
                .forward_normed(x.as_ref(), residual, &self.input_norm),
        };
        let (attention, layer, batch) = (step.attention, &self.attention, step.batch);
        let attended = attention
            .write_and_attend(&qkv, layer, kv, batch)
            .unwrap_or_else(|| {
                let q = attention.write_kv(&qkv, layer, kv, batch);
                attention.attend(&q, layer, kv, batch)
            });
        let o = Some(self.o.forward(&attended));
        let h = match step.sum_normed(o, residual, &self.post_norm)? {
            Summed::Normed(normed) => self.post_norm.ops.silu_mul(&self.gate_up.forward(&normed)),
            Summed::Sum(o) => self
                .gate_up
                .forward_gated(o.as_ref(), residual, &self.post_norm),
        };
        Ok(self.down.forward(&h))
    }
}
