//! Our own CUDA kernels, which read and write the paged cache in place.

use std::sync::Arc;

use tch::Tensor;
use torch_ext::cuda::{DecodeWorkspace, Heads, Kernels, PagedKv, Scores, WriteKv};

use super::{AttentionBackend, AttentionBatch, AttentionLayer, HostBatch};
use crate::kv_cache::LayerKv;
use crate::layers::computed;

/// Which kernel computes which sequence of a step.
#[derive(Debug)]
pub struct PagedWork {
    /// `[n]` int32: sequences with one query, for the decode kernel.
    pub decode: Option<Tensor>,
    /// Tiles of the other sequences' queries ([`Kernels::prefill_tiles`]).
    pub prefill: Option<Tensor>,
    /// No sequence of the step has a longer context; of a captured one, none ever will.
    pub max_context: usize,
    /// How many of a context's newest tokens `decode` reads that this step writes: 1, or more if a
    /// sequence has several rows.
    pub fresh: usize,
    /// Where decoding keeps partial results.
    pub workspace: Option<DecodeWorkspace>,
}

impl PagedWork {
    /// Every sequence by the prefill kernel, which can do all: for callers without a runner.
    fn of_host(kernels: &Kernels, heads: Heads, block_size: usize, host: &HostBatch) -> Self {
        let chunk = |seq: usize| {
            let len = host.query_start[seq + 1] - host.query_start[seq];
            (seq, len as usize, host.context_len[seq] as usize)
        };
        let chunks: Vec<_> = (0..host.num_seqs()).map(chunk).collect();
        let tiles = kernels.prefill_tiles(heads, block_size, &chunks);
        Self {
            decode: None,
            prefill: (!tiles.is_empty()).then(|| {
                let tiles = Tensor::from_slice(&tiles).view([-1, 3]);
                tiles.to_device(kernels.device())
            }),
            max_context: 0,
            fresh: 1,
            workspace: None,
        }
    }
}

impl AttentionLayer {
    /// The heads, as the kernels want them said.
    pub(crate) fn heads(&self) -> Heads {
        Heads {
            heads: self.num_heads,
            kv_heads: self.num_kv_heads,
            head_dim: self.head_dim,
        }
    }
}

/// Paged attention on a GPU.
#[derive(Debug)]
pub struct Paged {
    kernels: Arc<Kernels>,
}

impl Paged {
    /// Attention by `kernels`.
    pub fn new(kernels: Arc<Kernels>) -> Self {
        Self { kernels }
    }
}

impl AttentionBackend for Paged {
    fn write_kv(
        &self,
        qkv: &Tensor,
        layer: &AttentionLayer,
        kv: &LayerKv,
        batch: &AttentionBatch,
    ) -> Tensor {
        computed(self.kernels.write_kv(&written(qkv, layer, kv, batch)))
    }

    fn write_and_attend(
        &self,
        qkv: &Tensor,
        layer: &AttentionLayer,
        kv: &LayerKv,
        batch: &AttentionBatch,
    ) -> Option<Tensor> {
        let work = batch.work.as_ref()?;
        let (seqs, workspace) = (work.decode.as_ref()?, work.workspace.as_ref()?);
        // Every sequence has one token, its newest.
        let tokens = qkv.size()[0];
        let one_each = [seqs, &batch.context_len]
            .iter()
            .all(|x| x.size()[0] == tokens);
        if work.prefill.is_some() || work.fresh != 1 || !one_each {
            return None;
        }
        let out = output(tokens, layer, qkv);
        computed(self.kernels.attention_decode_fused(
            &written(qkv, layer, kv, batch),
            &paged(kv, batch),
            &out,
            &scores(layer),
            work.max_context,
            workspace,
        ));
        Some(out)
    }

    fn attend(
        &self,
        q: &Tensor,
        layer: &AttentionLayer,
        kv: &LayerKv,
        batch: &AttentionBatch,
    ) -> Tensor {
        let made;
        let work = match &batch.work {
            Some(work) => work,
            None => {
                // [blocks, heads, block size, head size]
                let block_size = kv.k.size()[2] as usize;
                made = PagedWork::of_host(&self.kernels, layer.heads(), block_size, &batch.host);
                &made
            }
        };
        let out = output(q.size()[0], layer, q);
        let paged = paged(kv, batch);
        let scores = scores(layer);
        if let (Some(seqs), Some(workspace)) = (&work.decode, &work.workspace) {
            computed(self.kernels.attention_decode(
                q,
                &paged,
                seqs,
                &out,
                &scores,
                work.max_context,
                work.fresh,
                workspace,
            ));
        }
        if let Some(tiles) = &work.prefill {
            computed(
                self.kernels
                    .attention_prefill(q, &paged, tiles, &out, &scores),
            );
        }
        out
    }
}

fn written<'a>(
    qkv: &'a Tensor,
    layer: &'a AttentionLayer,
    kv: &'a LayerKv,
    batch: &'a AttentionBatch,
) -> WriteKv<'a> {
    let norms = layer.qk_norm.as_ref();
    WriteKv {
        qkv,
        qk_norm: norms.map(|(q, k)| (&q.weight, &k.weight)),
        eps: norms.map_or(0.0, |(q, _)| q.eps),
        cos: &batch.rope.cos,
        sin: &batch.rope.sin,
        rope_index: &batch.rope.index,
        slots: &batch.slots,
        k_cache: &kv.k,
        v_cache: &kv.v,
    }
}

fn paged<'a>(kv: &'a LayerKv, batch: &'a AttentionBatch) -> PagedKv<'a> {
    PagedKv {
        k: &kv.k,
        v: &kv.v,
        block_tables: &batch.block_tables,
        query_start: &batch.query_start,
        context_len: &batch.context_len,
    }
}

fn scores(layer: &AttentionLayer) -> Scores {
    Scores {
        scale: layer.scale(),
        window: layer.window,
        soft_cap: None,
    }
}

fn output(tokens: i64, layer: &AttentionLayer, like: &Tensor) -> Tensor {
    let width = (layer.num_heads * layer.head_dim) as i64;
    Tensor::empty([tokens, width], (like.kind(), like.device()))
}
