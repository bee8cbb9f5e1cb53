//! libtorch's fused attention, one call a sequence: runs on any device.

use tch::Tensor;

use super::reference::{sequence, visible};
use super::{AttentionBackend, AttentionBatch, AttentionLayer, eager};
use crate::kv_cache::LayerKv;

/// `scaled_dot_product_attention` over gathered keys and values.
#[derive(Clone, Copy, Debug)]
pub struct Sdpa;

impl AttentionBackend for Sdpa {
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
        let mut outputs = Vec::with_capacity(batch.host.num_seqs());
        for seq in 0..batch.host.num_seqs() {
            let (q, k, v) = sequence(q, kv, &batch.host, seq);
            let (new, context) = (q.size()[1], k.size()[1]);
            let slides = layer.window.is_some_and(|window| (window as i64) < context);
            // Without a mask libtorch may take its fastest kernel, so give one only when
            // neither "all keys" (one query) nor "causal from the start" describes the case.
            let mask = (slides || (new > 1 && new < context))
                .then(|| visible(new, context, layer.window, q.device()));
            let causal = mask.is_none() && new > 1;
            let out = Tensor::scaled_dot_product_attention(
                &q.unsqueeze(0),
                &k.to_kind(q.kind()).unsqueeze(0),
                &v.to_kind(q.kind()).unsqueeze(0),
                mask,
                0.0,
                causal,
                layer.scale(),
                layer.num_heads != layer.num_kv_heads,
            );
            outputs.push(out.squeeze_dim(0).transpose(0, 1).reshape([new, -1]));
        }
        Tensor::cat(&outputs, 0)
    }
}
