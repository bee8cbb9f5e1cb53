//! Matrix products on the CPU, on weights packed for our own kernels.

use std::ops::Range;

use tch::{Kind, Tensor};
use torch_ext::cpu::{Dtype, PackedWeight};

use super::linear::{Linear, LinearBuilder};
use super::ops::computed;
use crate::error::ModelError;
use crate::weights::Matrix;

/// A weight in float32, bfloat16 or float16, multiplied with float32 activations.
#[derive(Debug)]
pub struct PackedLinear {
    weight: PackedWeight,
    bias: Option<Tensor>,
}

impl Linear for PackedLinear {
    fn forward(&self, x: &Tensor) -> Tensor {
        computed(self.weight.linear(x, self.bias.as_ref()))
    }

    fn rows(&self, ids: &Tensor) -> Tensor {
        computed(self.weight.embedding(ids))
    }

    fn bytes(&self) -> usize {
        self.weight.bytes()
    }
}

/// Builds a [`PackedLinear`], packing each block as it comes.
#[derive(Debug)]
pub struct PackedBuilder(PackedWeight);

impl PackedBuilder {
    /// A weight of `[out, in]`, not yet filled. `kind` is float32, bfloat16 or float16.
    pub fn new(out_features: usize, in_features: usize, kind: Kind) -> Result<Self, ModelError> {
        let weight = PackedWeight::zeros(out_features, in_features, dtype(kind)?)?;
        Ok(Self(weight))
    }
}

impl LinearBuilder for PackedBuilder {
    fn put(
        &mut self,
        row: usize,
        block: &Matrix<'_>,
        cols: Range<usize>,
    ) -> Result<(), ModelError> {
        let source = dtype(block.kind())?;
        Ok(self
            .0
            .pack_columns(row, block.bytes(), source, block.cols(), cols)?)
    }

    fn finish(
        self: Box<Self>,
        bias: Option<Tensor>,
        _activations: Kind,
    ) -> Result<Box<dyn Linear>, ModelError> {
        Ok(Box::new(PackedLinear {
            weight: self.0,
            bias,
        }))
    }
}

fn dtype(kind: Kind) -> Result<Dtype, ModelError> {
    Dtype::from_kind(kind)
        .ok_or_else(|| ModelError::Options(format!("no CPU kernels for weights of {kind:?}")))
}
