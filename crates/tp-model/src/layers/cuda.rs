//! Matrix products on a GPU: our own kernels for the few rows of a decode step, cuBLAS for more.

use std::ops::Range;
use std::sync::Arc;

use tch::{Kind, Tensor};
use torch_ext::cuda::Kernels;

use super::RmsNorm;
use super::linear::{DenseBuilder, Linear, LinearBuilder};
use super::ops::computed;
use crate::error::ModelError;
use crate::weights::Matrix;

/// A weight in bfloat16 or float16, multiplied with activations of the same dtype.
#[derive(Debug)]
pub struct CudaLinear {
    kernels: Arc<Kernels>,
    /// See [`super::Ops::Cuda`].
    deterministic: bool,
    weight: Tensor,
    bias: Option<Tensor>,
}

impl CudaLinear {
    fn rows_of(x: &Tensor) -> usize {
        x.size()[0] as usize
    }

    /// Whether norm and product are one kernel for this many rows.
    fn fuses(&self, rows: usize) -> bool {
        let (out_features, in_features) = self.shape();
        !self.deterministic
            && !self.takes_some(rows)
            && rows <= self.kernels.fused_rows(out_features, in_features)
    }

    /// Whether the kernel for some rows, more than few, is the one to take.
    fn takes_some(&self, rows: usize) -> bool {
        let (out_features, in_features) = self.shape();
        !self.deterministic && self.kernels.prefers_wgmma(rows, out_features, in_features)
    }

    /// The product by one kernel whose sums do not depend on the number of rows, however many they
    /// are: a few at a time.
    fn in_pieces(&self, x: &Tensor) -> Tensor {
        let (out_features, in_features) = self.shape();
        // The builder made sure that there are some.
        let most = self.kernels.invariant_rows(out_features, in_features) as i64;
        let rows = Self::rows_of(x) as i64;
        let piece = |x: &Tensor| {
            let bias = self.bias.as_ref();
            computed(self.kernels.linear_small(x, &self.weight, bias))
        };
        if rows <= most {
            return piece(x);
        }
        let pieces: Vec<Tensor> = (0..rows)
            .step_by(most as usize)
            .map(|at| piece(&x.narrow(0, at, most.min(rows - at))))
            .collect();
        Tensor::cat(&pieces, 0)
    }

    fn shape(&self) -> (usize, usize) {
        let size = self.weight.size();
        (size[0] as usize, size[1] as usize)
    }
}

impl Linear for CudaLinear {
    fn forward(&self, x: &Tensor) -> Tensor {
        if self.deterministic {
            return self.in_pieces(x);
        }
        let (out_features, in_features) = self.shape();
        if self.takes_some(Self::rows_of(x)) {
            return computed(
                self.kernels
                    .linear_wgmma(x, &self.weight, self.bias.as_ref()),
            );
        }
        if Self::rows_of(x) <= self.kernels.linear_small_rows(out_features, in_features) {
            return computed(
                self.kernels
                    .linear_small(x, &self.weight, self.bias.as_ref()),
            );
        }
        x.linear(&self.weight, self.bias.as_ref())
    }

    fn forward_normed(&self, x: Option<&Tensor>, residual: &mut Tensor, norm: &RmsNorm) -> Tensor {
        if self.fuses(Self::rows_of(residual)) {
            let (y, sum) = computed(self.kernels.add_norm_linear(
                residual,
                x,
                &norm.weight,
                norm.eps,
                &self.weight,
                self.bias.as_ref(),
            ));
            *residual = sum;
            return y;
        }
        self.forward(&norm.maybe_add_forward(x, residual))
    }

    fn forward_gated(&self, x: Option<&Tensor>, residual: &mut Tensor, norm: &RmsNorm) -> Tensor {
        if self.bias.is_none() && self.fuses(Self::rows_of(residual)) {
            let (y, sum) = computed(self.kernels.add_norm_gated(
                residual,
                x,
                &norm.weight,
                norm.eps,
                &self.weight,
            ));
            *residual = sum;
            return y;
        }
        if self.bias.is_none()
            && self.takes_some(Self::rows_of(residual))
            && self.shape().0.is_multiple_of(16)
        {
            let x = norm.maybe_add_forward(x, residual);
            return computed(self.kernels.linear_wgmma_gated(&x, &self.weight));
        }
        norm.ops.silu_mul(&self.forward_normed(x, residual, norm))
    }

    fn rows(&self, ids: &Tensor) -> Tensor {
        computed(self.kernels.gather_rows(&self.weight, ids))
    }

    fn bytes(&self) -> usize {
        self.weight.numel() * self.weight.kind().elt_size_in_bytes()
    }
}

/// Builds a [`CudaLinear`].
#[derive(Debug)]
pub(super) struct CudaBuilder {
    kernels: Arc<Kernels>,
    deterministic: bool,
    dense: DenseBuilder,
}

impl CudaBuilder {
    pub(super) fn new(kernels: Arc<Kernels>, deterministic: bool, dense: DenseBuilder) -> Self {
        Self {
            kernels,
            deterministic,
            dense,
        }
    }
}

impl LinearBuilder for CudaBuilder {
    fn put(
        &mut self,
        row: usize,
        block: &Matrix<'_>,
        cols: Range<usize>,
    ) -> Result<(), ModelError> {
        self.dense.put(row, block, cols)
    }

    fn finish(self: Box<Self>, bias: Option<Tensor>, activations: Kind) -> Box<dyn Linear> {
        Box::new(CudaLinear {
            kernels: self.kernels,
            deterministic: self.deterministic,
            weight: self.dense.into_weight(),
            bias: bias.map(|b| b.to_kind(activations)),
        })
    }
}
