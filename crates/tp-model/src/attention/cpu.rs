//! Our own CPU kernels: rotation, norms and the write in one pass, then attention straight from
//! the blocks. The same bits for a token whatever it is batched with and however it is chunked.

use tch::Tensor;
use torch_ext::cpu::{AttentionParams, RopeParams, paged_attention, rope_and_cache};

use super::{AttentionBackend, AttentionBatch, AttentionLayer};
use crate::kv_cache::LayerKv;
use crate::layers::computed;

/// Attention by `torch_ext::cpu`.
#[derive(Clone, Copy, Debug)]
pub struct Cpu;

impl AttentionBackend for Cpu {
    fn write_kv(
        &self,
        qkv: &Tensor,
        layer: &AttentionLayer,
        kv: &LayerKv,
        batch: &AttentionBatch,
    ) -> Tensor {
        let norms = layer.qk_norm.as_ref();
        let params = RopeParams {
            num_q_heads: layer.num_heads,
            q_norm: norms.map(|(q, _)| &q.weight),
            k_norm: norms.map(|(_, k)| &k.weight),
            eps: norms.map_or(0.0, |(q, _)| q.eps),
            cos: &batch.rope.cos,
            sin: &batch.rope.sin,
        };
        computed(rope_and_cache(
            qkv,
            &params,
            &batch.rope.index,
            &batch.slots,
            &mut kv.k.shallow_clone(),
            &mut kv.v.shallow_clone(),
        ))
    }

    fn attend(
        &self,
        q: &Tensor,
        layer: &AttentionLayer,
        kv: &LayerKv,
        batch: &AttentionBatch,
    ) -> Tensor {
        let params = AttentionParams {
            scale: layer.scale(),
            sliding_window: layer.window,
            soft_cap: None,
        };
        computed(paged_attention(
            q,
            &kv.k,
            &kv.v,
            &batch.block_tables,
            &batch.query_start,
            &batch.context_len,
            &params,
        ))
    }
}
