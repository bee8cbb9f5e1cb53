//! Matrix products with a weight, and look-up of its rows.

use std::fmt;
use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::{NormInput, RmsNorm};
use crate::error::ModelError;
use crate::weights::Matrix;

/// A weight of `out_features x in_features`, in whatever form it is stored.
pub trait Linear: Send + fmt::Debug {
    /// `x W^T + bias` for `x` of `[tokens, in_features]`.
    fn forward(&self, x: &Tensor) -> Tensor;

    /// This layer of the residual's norm, `norm`, as far as `input` says that it is still to be taken.
    /// Kernels that do all of it at once override this.
    fn forward_normed(&self, input: &NormInput, residual: &mut Tensor, norm: &RmsNorm) -> Tensor {
        self.forward(&norm.finish(input, residual))
    }

    /// As [`Linear::forward_normed`], for a weight of gates followed by as many others:
    /// `silu(gate) * up` of the result.
    fn forward_gated(&self, input: &NormInput, residual: &mut Tensor, norm: &RmsNorm) -> Tensor {
        norm.ops
            .silu_mul(&self.forward_normed(input, residual, norm))
    }

    /// [`Linear::forward`], to be added to `residual`, whose norm `next` then takes: what to give it, with as
    /// much of that done as kernels of both can do better.
    fn forward_adding(
        &self,
        x: &Tensor,
        _residual: &mut Tensor,
        _norm: &RmsNorm,
        _next: &dyn Linear,
    ) -> NormInput {
        NormInput::Added(Some(self.forward(x)))
    }

    /// Whether a norm that lacks its last factor (`NormInput::Deferred`, on CUDA) is no detour for so many rows.
    fn takes_deferred(&self, _rows: usize) -> bool {
        false
    }

    /// Rows of the weight, `[ids, in_features]`, in the dtype of activations: the embedding,
    /// which may share its storage with the output projection. `ids` are int64.
    fn rows(&self, ids: &Tensor) -> Tensor;

    /// Bytes that the weight takes.
    fn bytes(&self) -> usize;
}

/// Fills a weight block by block while its file is read.
pub trait LinearBuilder {
    /// Rows of the weight, beginning at `row`, converted to its dtype: of each row of `block` the
    /// columns `cols`, as many as the weight has.
    fn put(&mut self, row: usize, block: &Matrix<'_>, cols: Range<usize>)
    -> Result<(), ModelError>;

    /// The layer, once all rows are there. Inputs and outputs have the dtype `activations`.
    fn finish(
        self: Box<Self>,
        bias: Option<Tensor>,
        activations: Kind,
    ) -> Result<Box<dyn Linear>, ModelError>;
}

/// A plain matrix, multiplied by libtorch.
#[derive(Debug)]
pub struct DenseLinear {
    weight: Tensor,
    bias: Option<Tensor>,
    activations: Kind,
}

impl DenseLinear {
    /// A layer of `weight` (`[out, in]`) and `bias` (`[out]`), whose inputs and outputs have the
    /// dtype `activations`. Where that differs from the weight's, the weight is converted in
    /// each call: right, but slow.
    pub fn new(weight: Tensor, bias: Option<Tensor>, activations: Kind) -> Self {
        Self {
            weight,
            bias: bias.map(|b| b.to_kind(activations)),
            activations,
        }
    }
}

impl Linear for DenseLinear {
    fn forward(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight.to_kind(self.activations), self.bias.as_ref())
    }

    fn rows(&self, ids: &Tensor) -> Tensor {
        self.weight.index_select(0, ids).to_kind(self.activations)
    }

    fn bytes(&self) -> usize {
        self.weight.numel() * self.weight.kind().elt_size_in_bytes()
    }
}

/// Builds a [`DenseLinear`].
#[derive(Debug)]
pub struct DenseBuilder(Tensor);

impl DenseBuilder {
    /// A weight of `[out, in]` on `device`, not yet filled.
    pub fn new(
        out_features: usize,
        in_features: usize,
        kind: Kind,
        device: Device,
    ) -> Result<Self, tch::TchError> {
        let shape = [out_features as i64, in_features as i64];
        Tensor::f_empty(shape, (kind, device)).map(Self)
    }

    /// The weight, to fill it in another way than [`LinearBuilder::put`] does.
    #[cfg(feature = "cuda")]
    pub(super) fn weight(&self) -> &Tensor {
        &self.0
    }

    /// The weight as it stands.
    #[cfg(feature = "cuda")]
    pub(super) fn into_weight(self) -> Tensor {
        self.0
    }
}

impl LinearBuilder for DenseBuilder {
    fn put(
        &mut self,
        row: usize,
        block: &Matrix<'_>,
        cols: Range<usize>,
    ) -> Result<(), ModelError> {
        let mut rows = self.0.narrow(0, row as i64, block.rows() as i64);
        let columns = block
            .to_tensor()
            .narrow(1, cols.start as i64, cols.len() as i64);
        rows.copy_(&columns);
        Ok(())
    }

    fn finish(
        self: Box<Self>,
        bias: Option<Tensor>,
        activations: Kind,
    ) -> Result<Box<dyn Linear>, ModelError> {
        Ok(Box::new(DenseLinear::new(self.0, bias, activations)))
    }
}
