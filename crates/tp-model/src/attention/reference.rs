//! The oracle: attention as the formula says it, one sequence at a time, in float32.

use tch::{Kind, Tensor};

use super::{AttentionBackend, AttentionBatch, AttentionLayer, HostBatch, eager};
use crate::kv_cache::LayerKv;

/// Gathers keys and values through the block table, then computes
/// `softmax(Q K^T / sqrt(d) + mask) V`. Readable rather than fast; for tests.
#[derive(Clone, Copy, Debug)]
pub struct Reference;

impl AttentionBackend for Reference {
    fn write_kv(
        &self,
        qkv: &Tensor,
        layer: &AttentionLayer,
        kv: &LayerKv,
        batch: &AttentionBatch,
    ) -> Tensor {
        eager::write_kv(qkv, layer, kv, batch)
    }

    fn attend(
        &self,
        q: &Tensor,
        layer: &AttentionLayer,
        kv: &LayerKv,
        batch: &AttentionBatch,
    ) -> Tensor {
        let group = (layer.num_heads / layer.num_kv_heads) as i64;
        let mut outputs = Vec::with_capacity(batch.host.num_seqs());
        for seq in 0..batch.host.num_seqs() {
            let (q, k, v) = sequence(q, kv, &batch.host, seq);
            let [q, k, v] = [q, k, v].map(|x| x.to_kind(Kind::Float));
            // Every key and value head serves `group` query heads in a row.
            let k = k.repeat_interleave_self_int(group, 0, None);
            let v = v.repeat_interleave_self_int(group, 0, None);
            let scores = q.matmul(&k.transpose(1, 2)) * layer.scale();
            let visible = visible(q.size()[1], k.size()[1], layer.window, scores.device());
            let scores = scores.masked_fill(&visible.logical_not(), f64::NEG_INFINITY);
            let out = scores.softmax(-1, Kind::Float).matmul(&v);
            outputs.push(out.transpose(0, 1).reshape([q.size()[1], -1]));
        }
        Tensor::cat(&outputs, 0).to_kind(q.kind())
    }
}

/// Q (`[heads, new, head_dim]`), K and V (`[kv_heads, context, head_dim]`) of one sequence.
pub(super) fn sequence(
    q: &Tensor,
    kv: &LayerKv,
    batch: &HostBatch,
    seq: usize,
) -> (Tensor, Tensor, Tensor) {
    let start = i64::from(batch.query_start[seq]);
    let new = i64::from(batch.query_start[seq + 1]) - start;
    let context = i64::from(batch.context_len[seq]);
    let blocks = (context as u64).div_ceil(kv.block_size() as u64) as usize;
    let table: Vec<i64> = batch.block_table(seq)[..blocks]
        .iter()
        .map(|block| i64::from(*block))
        .collect();
    let (k, v) = kv.gather(&Tensor::from_slice(&table).to_device(q.device()), context);
    let q = q.narrow(0, start, new).transpose(0, 1);
    (q, k, v)
}

/// `[new, context]`: whether the query at the end of the context sees the key. A query sees
/// itself and what came before, at most `window` tokens in all.
pub(super) fn visible(
    new: i64,
    context: i64,
    window: Option<usize>,
    device: tch::Device,
) -> Tensor {
    let positions = |from: i64| Tensor::arange_start(from, context, (Kind::Int64, device));
    let distance = positions(context - new).unsqueeze(1) - positions(0).unsqueeze(0);
    let causal = distance.ge(0);
    match window {
        None => causal,
        Some(window) => causal.logical_and(&distance.lt(window as i64)),
    }
}
