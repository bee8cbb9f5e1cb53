//! Elementwise operations, and the one place that decides who computes what.

#[cfg(feature = "cuda")]
use std::sync::Arc;

use tch::{Device, Kind, Tensor};
use torch_ext::cpu;

#[cfg(feature = "cuda")]
use super::cuda::CudaBuilder;
use super::linear::{DenseBuilder, LinearBuilder};
use super::packed::PackedBuilder;
use crate::error::ModelError;

/// Who computes matrix products, norms and activations.
#[derive(Clone, Debug)]
pub enum Ops {
    /// libtorch, on any device.
    Torch,
    /// Our own CPU kernels, on float32 activations.
    Cpu,
    /// Our own CUDA kernels, on bfloat16 or float16 weights and activations.
    #[cfg(feature = "cuda")]
    Cuda {
        /// The kernels.
        kernels: Arc<torch_ext::cuda::Kernels>,
        /// Whether a row's result must not depend on the others: no product is left to cuBLAS.
        deterministic: bool,
    },
}

/// The result of a kernel. Like `tch` itself it panics on arguments that do not fit: they are
/// made here, so that would be a defect of this crate, and the runner turns it into an error.
#[track_caller]
pub(crate) fn computed<T>(result: Result<T, torch_ext::Error>) -> T {
    result.unwrap_or_else(|e| panic!("{e}"))
}

impl Ops {
    /// RMS norm over the last dimension, computed in float32.
    pub fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
        match self {
            Ops::Torch => {
                let wide = x.to_kind(Kind::Float);
                let mean_square = wide.square().mean_dim(-1, true, Kind::Float);
                (wide * (mean_square + eps).rsqrt()).to_kind(x.kind()) * weight
            }
            Ops::Cpu => computed(cpu::rms_norm(x, weight, eps)),
            #[cfg(feature = "cuda")]
            Ops::Cuda { kernels, .. } => computed(kernels.rms_norm(x, weight, eps)),
        }
    }

    /// `residual += x`, then the RMS norm of `residual`.
    pub fn add_rms_norm(
        &self,
        x: &Tensor,
        residual: &mut Tensor,
        weight: &Tensor,
        eps: f64,
    ) -> Tensor {
        match self {
            Ops::Torch => {
                let _ = residual.g_add_(x);
                self.rms_norm(residual, weight, eps)
            }
            Ops::Cpu => computed(cpu::add_rms_norm(residual, x, weight, eps)),
            #[cfg(feature = "cuda")]
            Ops::Cuda { kernels, .. } => computed(kernels.add_rms_norm(residual, x, weight, eps)),
        }
    }

    /// `silu(gate) * up` of `[tokens, 2 * width]`, gate first.
    pub fn silu_mul(&self, gate_up: &Tensor) -> Tensor {
        match self {
            Ops::Torch => {
                let halves = gate_up.chunk(2, -1);
                halves[0].silu() * &halves[1]
            }
            Ops::Cpu => computed(cpu::silu_mul(gate_up)),
            #[cfg(feature = "cuda")]
            Ops::Cuda { kernels, .. } => computed(kernels.silu_mul(gate_up)),
        }
    }

    /// Storage for a weight of `[out, in]`.
    pub fn linear_builder(
        &self,
        out_features: usize,
        in_features: usize,
        kind: Kind,
        device: Device,
    ) -> Result<Box<dyn LinearBuilder>, ModelError> {
        Ok(match self {
            Ops::Torch => Box::new(DenseBuilder::new(out_features, in_features, kind, device)?),
            Ops::Cpu => Box::new(PackedBuilder::new(out_features, in_features, kind)?),
            #[cfg(feature = "cuda")]
            Ops::Cuda {
                kernels,
                deterministic: true,
            } if kernels.invariant_rows(out_features, in_features) == 0 => {
                return Err(ModelError::Options(format!(
                    "deterministic: no kernel multiplies a weight of [{out_features}, {in_features}] with equal bits \
                     for any number of rows (its columns must be a multiple of 8)"
                )));
            }
            #[cfg(feature = "cuda")]
            Ops::Cuda {
                kernels,
                deterministic,
            } => Box::new(CudaBuilder::new(
                kernels.clone(),
                *deterministic,
                DenseBuilder::new(out_features, in_features, kind, device)?,
            )),
        })
    }
}
