//! Splitting, rotating and writing with plain tensor operations, for the backends on libtorch.

use tch::{Kind, Tensor};

use super::{AttentionBatch, AttentionLayer};
use crate::kv_cache::LayerKv;
use crate::layers::RopeRows;

/// [`super::AttentionBackend::write_kv`] on any device.
pub(super) fn write_kv(
    qkv: &Tensor,
    layer: &AttentionLayer,
    kv: &LayerKv,
    batch: &AttentionBatch,
) -> Tensor {
    let (heads, kv_heads) = (layer.num_heads as i64, layer.num_kv_heads as i64);
    let parts = qkv
        .view([-1, heads + 2 * kv_heads, layer.head_dim as i64])
        .split_with_sizes([heads, kv_heads, kv_heads], 1);
    let (mut q, mut k) = (parts[0].shallow_clone(), parts[1].shallow_clone());
    if let Some((q_norm, k_norm)) = &layer.qk_norm {
        (q, k) = (q_norm.forward(&q), k_norm.forward(&k));
    }
    let q = rotate(&q, &batch.rope);
    let k = rotate(&k, &batch.rope);
    kv.write(&batch.slots, &k, &parts[2]);
    q
}

/// Rotates the first dimensions of every head of `x` (`[tokens, heads, head_dim]`): dimension `i`
/// pairs with dimension `i + rotary_dim / 2`.
fn rotate(x: &Tensor, rope: &RopeRows) -> Tensor {
    let half = rope.cos.size()[1];
    let rest = x.size()[2] - 2 * half;
    let rows = |table: &Tensor| table.index_select(0, &rope.index).unsqueeze(1);
    let (cos, sin) = (rows(&rope.cos), rows(&rope.sin));
    let parts = x.split_with_sizes([half, half, rest], 2);
    let (a, b) = (parts[0].to_kind(Kind::Float), parts[1].to_kind(Kind::Float));
    let turned = [&a * &cos - &b * &sin, &b * &cos + &a * &sin].map(|part| part.to_kind(x.kind()));
    Tensor::cat(&[&turned[0], &turned[1], &parts[2]], 2)
}
