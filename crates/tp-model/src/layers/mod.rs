//! The parts of a decoder. A layer does not know how its weight is stored nor on which device it
//! runs: [`Linear`] hides the former, [`Ops`] the latter.

#[cfg(feature = "cuda")]
mod cuda;
mod linear;
mod ops;
mod packed;
mod rotary;

pub use linear::{DenseBuilder, DenseLinear, Linear, LinearBuilder};
pub use ops::Ops;
pub(crate) use ops::computed;
pub use packed::{PackedBuilder, PackedLinear};
pub use rotary::{RopeRows, RopeSpan, Rotary};
use tch::Tensor;

/// What a product gets that stands behind a norm of the residual.
#[derive(Debug)]
pub enum NormInput {
    /// To be added to the residual, if there is something; then the norm is to be taken.
    Added(Option<Tensor>),
    /// The norm itself; the addition is done.
    Normed(Tensor),
    /// The same, less a factor for each row.
    #[cfg(feature = "cuda")]
    Deferred(torch_ext::cuda::DeferredNorm),
}

impl NormInput {
    /// What is yet to be added to the residual.
    pub fn into_addend(self) -> Option<Tensor> {
        match self {
            NormInput::Added(x) => x,
            _ => None,
        }
    }
}

/// Root-mean-square normalization over the last dimension, times a weight.
#[derive(Debug)]
pub struct RmsNorm {
    /// One factor for each dimension.
    pub weight: Tensor,
    /// Added to the mean square.
    pub eps: f64,
    /// Which implementation computes it.
    pub ops: Ops,
}

impl RmsNorm {
    /// `x / sqrt(mean(x^2) + eps) * weight`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        self.ops.rms_norm(x, &self.weight, self.eps)
    }

    /// Adds `x` to `residual` in place, and returns the norm of the sum.
    pub fn add_forward(&self, x: &Tensor, residual: &mut Tensor) -> Tensor {
        self.ops.add_rms_norm(x, residual, &self.weight, self.eps)
    }

    /// What is still to be done.
    pub fn finish(&self, input: &NormInput, residual: &mut Tensor) -> Tensor {
        match input {
            NormInput::Added(x) => self.maybe_add_forward(x.as_ref(), residual),
            NormInput::Normed(x) => x.shallow_clone(),
            #[cfg(feature = "cuda")]
            NormInput::Deferred(x) => x.finish(),
        }
    }

    /// [`RmsNorm::add_forward`], or [`RmsNorm::forward`] if there is nothing to add.
    pub fn maybe_add_forward(&self, x: Option<&Tensor>, residual: &mut Tensor) -> Tensor {
        match x {
            Some(x) => self.add_forward(x, residual),
            None => self.forward(residual),
        }
    }
}
