//! Our own CUDA kernels, which read and write the paged cache in place.

use std::sync::Arc;

use tch::Tensor;
use torch_ext::cuda::Kernels;

use super::{AttentionBackend, AttentionBatch, AttentionLayer};
use crate::kv_cache::LayerKv;
use crate::layers::computed;

/// Which kernel computes which sequence of a step.
#[derive(Debug)]
pub struct PagedWork {
    /// `[n]` int32: sequences with one query, for the decode kernel.
    pub decode: Option<Tensor>,
    /// Tiles of queries of the others, for the prefill kernel.
    pub prefill: Option<Tensor>,
    /// No sequence of the step has a longer context; of a captured one, none ever will.
    pub max_context: usize,
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
