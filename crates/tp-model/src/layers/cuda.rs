//! Matrix products on a GPU: our own kernels for the few rows of a decode step, cuBLAS for more.

use std::ops::Range;
use std::sync::Arc;

use tch::{Kind, Tensor};
use torch_ext::cuda::{Kernels, Staging};

use super::linear::{DenseBuilder, Linear, LinearBuilder};
use super::ops::computed;
use super::{NormInput, RmsNorm};
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

    fn forward_normed(&self, input: &NormInput, residual: &mut Tensor, norm: &RmsNorm) -> Tensor {
        let (weight, bias) = (&self.weight, self.bias.as_ref());
        match input {
            NormInput::Deferred(x) if self.takes_deferred(x.num_rows()) => {
                computed(self.kernels.linear_wgmma_deferred(x, weight, bias))
            }
            NormInput::Added(x) if self.fuses(Self::rows_of(residual)) => {
                let (x, gain) = (x.as_ref(), &norm.weight);
                let (y, sum) = computed(
                    self.kernels
                        .add_norm_linear(residual, x, gain, norm.eps, weight, bias),
                );
                *residual = sum;
                y
            }
            _ => self.forward(&norm.finish(input, residual)),
        }
    }

    fn forward_gated(&self, input: &NormInput, residual: &mut Tensor, norm: &RmsNorm) -> Tensor {
        let (kernels, weight) = (&self.kernels, &self.weight);
        let rows = Self::rows_of(residual);
        let by_wgmma = self.takes_some(rows) && self.shape().0.is_multiple_of(16);
        let (out_features, in_features) = self.shape();
        let large =
            !self.deterministic && kernels.prefers_gated_product(rows, out_features, in_features);
        match input {
            _ if self.bias.is_some() => {}
            NormInput::Deferred(x) if by_wgmma => {
                return computed(kernels.linear_wgmma_gated_deferred(x, weight));
            }
            NormInput::Added(x) if self.fuses(rows) => {
                let (x, gain) = (x.as_ref(), &norm.weight);
                let (y, sum) =
                    computed(kernels.add_norm_gated(residual, x, gain, norm.eps, weight));
                *residual = sum;
                return y;
            }
            _ if by_wgmma => {
                let x = norm.finish(input, residual);
                return computed(kernels.linear_wgmma_gated(&x, weight));
            }
            _ if large => {
                let x = norm.finish(input, residual);
                return computed(kernels.gated_product(&x, weight));
            }
            _ => {}
        }
        norm.ops
            .silu_mul(&self.forward_normed(input, residual, norm))
    }

    fn forward_adding(
        &self,
        x: &Tensor,
        residual: &mut Tensor,
        norm: &RmsNorm,
        next: &dyn Linear,
    ) -> NormInput {
        let (rows, (out_features, in_features)) = (Self::rows_of(x), self.shape());
        let both = !self.deterministic
            && next.takes_deferred(rows)
            && self
                .kernels
                .prefers_wgmma_add(rows, out_features, in_features);
        if !both {
            return NormInput::Added(Some(self.forward(x)));
        }
        let (bias, gain) = (self.bias.as_ref(), &norm.weight);
        NormInput::Deferred(computed(self.kernels.linear_wgmma_add(
            x,
            &self.weight,
            bias,
            residual,
            gain,
            norm.eps,
        )))
    }

    fn takes_deferred(&self, rows: usize) -> bool {
        self.takes_some(rows)
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
    staging: Staging,
}

impl CudaBuilder {
    pub(super) fn new(kernels: Arc<Kernels>, deterministic: bool, dense: DenseBuilder) -> Self {
        Self {
            staging: Staging::new(kernels.device_index()),
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
        if block.kind() != self.dense.weight().kind() {
            return self.dense.put(row, block, cols);
        }
        let rows = block.rows();
        let to = self.dense.weight().narrow(0, row as i64, rows as i64);
        let size = block.kind().elt_size_in_bytes();
        let (pitch, part) = (block.cols() * size, cols.start * size..cols.end * size);
        let sent = match part.len() == pitch {
            true => self.staging.send(&to, [block.bytes()]),
            false => {
                let rows = block.bytes().chunks_exact(pitch.max(1));
                self.staging.send(&to, rows.map(|row| &row[part.clone()]))
            }
        };
        sent.map_err(|e| ModelError::Options(e.to_string()))
    }

    fn finish(
        self: Box<Self>,
        bias: Option<Tensor>,
        activations: Kind,
    ) -> Result<Box<dyn Linear>, ModelError> {
        let sent = self.staging.finish();
        sent.map_err(|e| ModelError::Options(e.to_string()))?;
        Ok(Box::new(CudaLinear {
            kernels: self.kernels,
            deterministic: self.deterministic,
            weight: self.dense.into_weight(),
            bias: bias.map(|b| b.to_kind(activations)),
        }))
    }
}
