//! Attention over the paged cache.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod eager;
mod reference;
mod sdpa;

pub use cpu::Cpu;
#[cfg(feature = "cuda")]
pub use cuda::{Paged, PagedWork};
pub use reference::Reference;
pub use sdpa::Sdpa;
use tch::Tensor;

use crate::kv_cache::LayerKv;
use crate::layers::{RmsNorm, RopeRows};

/// What attention must know of one layer.
#[derive(Debug)]
pub struct AttentionLayer {
    /// Query heads of this rank.
    pub num_heads: usize,
    /// Key and value heads of this rank.
    pub num_kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// How many of the latest tokens a query attends to, itself included; `None` for all.
    pub window: Option<usize>,
    /// Norms on each head of Q and of K, before rotation.
    pub qk_norm: Option<(RmsNorm, RmsNorm)>,
}

impl AttentionLayer {
    /// Factor on the scores.
    pub fn scale(&self) -> f64 {
        (self.head_dim as f64).powf(-0.5)
    }
}

/// What attention must know of one step: which tokens belong to which sequence, and where their
/// keys and values are. Sequences follow one another in the flat list of tokens.
#[derive(Debug)]
pub struct AttentionBatch {
    /// The three tensors below, on the host.
    pub host: HostBatch,
    /// `[sequences + 1]` int32: where each sequence's tokens begin, and the end.
    pub query_start: Tensor,
    /// `[sequences]` int32: tokens that a sequence has in the cache once this step's are written.
    pub context_len: Tensor,
    /// `[sequences, width]` int32, padded with 0.
    pub block_tables: Tensor,
    /// `[tokens]` int64: where each token's key and value go, `block * block_size + offset`.
    pub slots: Tensor,
    /// Rotary angles of the tokens.
    pub rope: RopeRows,
    /// Who does what in our CUDA kernels; `None` for the other backends.
    #[cfg(feature = "cuda")]
    pub work: Option<PagedWork>,
}

/// [`AttentionBatch`]'s integers where a loop over sequences can read them.
#[derive(Debug, Default)]
pub struct HostBatch {
    /// As [`AttentionBatch::query_start`].
    pub query_start: Vec<i32>,
    /// As [`AttentionBatch::context_len`].
    pub context_len: Vec<i32>,
    /// As [`AttentionBatch::block_tables`], row by row.
    pub block_tables: Vec<i32>,
    /// Entries in a row of `block_tables`.
    pub table_width: usize,
}

impl HostBatch {
    /// Number of sequences.
    pub fn num_seqs(&self) -> usize {
        self.context_len.len()
    }

    /// The block table of a sequence.
    pub fn block_table(&self, seq: usize) -> &[i32] {
        &self.block_tables[seq * self.table_width..(seq + 1) * self.table_width]
    }
}

/// Computes attention on one kind of device with one kind of kernel. Prefill and decode are one
/// case: a sequence has any number of new tokens at the end of its context.
pub trait AttentionBackend: Send + std::fmt::Debug {
    /// Takes `qkv`, `[tokens, (heads + 2 kv_heads) * head_dim]`: normalizes heads if the layer
    /// asks for it, rotates Q and K, writes K and V to the cache, and returns Q,
    /// `[tokens, heads, head_dim]`.
    fn write_kv(
        &self,
        qkv: &Tensor,
        layer: &AttentionLayer,
        kv: &LayerKv,
        batch: &AttentionBatch,
    ) -> Tensor;

    /// Both of the following in one, `[tokens, heads * head_dim]`, if this backend can for such a step;
    /// the result is the same.
    fn write_and_attend(
        &self,
        _qkv: &Tensor,
        _layer: &AttentionLayer,
        _kv: &LayerKv,
        _batch: &AttentionBatch,
    ) -> Option<Tensor> {
        None
    }

    /// Attends with Q (as returned by [`AttentionBackend::write_kv`]) to the cache. Returns
    /// `[tokens, heads * head_dim]`.
    fn attend(
        &self,
        q: &Tensor,
        layer: &AttentionLayer,
        kv: &LayerKv,
        batch: &AttentionBatch,
    ) -> Tensor;
}
