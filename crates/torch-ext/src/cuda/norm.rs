//! RMS norm, with and without the residual addition before it.

use tch::Tensor;

use super::check::{HALVES, Operand};
use super::compile::Source;
use super::kernels::{Arg, Kernels, Launch};
use super::rope::{element, same_kind};
use crate::Error;

pub(crate) static SOURCE: Source = Source {
    name: "norm",
    text: include_str!("../../csrc/cuda/norm.cu"),
    variants: &[
        &["T_BF16=1", "VECS=1", "ADD=1"],
        &["T_HALF=1", "VECS=2", "ADD=0"],
        &["T_BF16=1", "VECS=4", "ADD=1"],
    ],
};

/// Columns of the widest row: 1,024 threads with four vectors of eight.
const MAX_WIDTH: usize = 1024 * 4 * 8;

impl Kernels {
    /// RMS norm over the last dimension of `x` (`[tokens, width]`, bfloat16 or float16) times
    /// `weight` (`[width]`, the same type). Computed in float32; the normalized value is rounded
    /// before the weight multiplies it. `width` must be a multiple of 8 and at most 32,768.
    ///
    /// The result for a row does not depend on the others.
    pub fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor, Error> {
        self.norm("rms_norm", x, None, weight, eps)
    }

    /// `residual += x` in place, then the RMS norm of `residual`. All as in
    /// [`rms_norm`](Self::rms_norm); the sum is rounded before it is normalized.
    pub fn add_rms_norm(
        &self,
        residual: &mut Tensor,
        x: &Tensor,
        weight: &Tensor,
        eps: f64,
    ) -> Result<Tensor, Error> {
        let add = Some((&*residual, &*residual));
        self.norm("add_rms_norm", x, add, weight, eps)
    }

    /// The norm of `x`, or of `residual.0 + x`, which is then written to `residual.1`.
    pub(super) fn norm(
        &self,
        op: &'static str,
        x: &Tensor,
        residual: Option<(&Tensor, &Tensor)>,
        weight: &Tensor,
        eps: f64,
    ) -> Result<Tensor, Error> {
        let device = self.device();
        let operand = |name, tensor| Operand {
            op,
            name,
            tensor,
            device,
        };
        let [tokens, width] = operand("x", x).vectors(HALVES, [None, None])?;
        let kind = same_kind(x.kind());
        if let Some((from, to)) = residual {
            operand("residual", from).vectors(kind, [Some(tokens), Some(width)])?;
            operand("residual", to).vectors(kind, [Some(tokens), Some(width)])?;
        }
        operand("weight", weight).vectors(kind, [Some(width)])?;
        if width > MAX_WIDTH {
            let expected = format!("at most {MAX_WIDTH} columns");
            return Err(operand("x", x).argument(expected, width));
        }
        let out = self.empty(&[tokens, width], x.kind())?;
        if tokens == 0 || width == 0 {
            return Ok(out);
        }
        // By the width alone: a row's sum must not depend on how many rows there are.
        let vecs = match width {
            0..=4096 => 1,
            4097..=8192 => 2,
            _ => 4,
        };
        let defines = [
            (element(x.kind()), 1),
            ("VECS", vecs as i64),
            ("ADD", i64::from(residual.is_some())),
        ];
        let function = self.function(&SOURCE, "rms_norm", &defines)?;
        let threads = (width / 8).div_ceil(vecs).next_multiple_of(32);
        let launch = Launch::new([tokens as u32, 1, 1], threads as u32).pdl();
        let args = [
            (&out).into(),
            x.into(),
            residual.map(|r| r.0).into(),
            residual.map(|r| r.1).into(),
            weight.into(),
            Arg::from(eps as f32),
            Arg::from(width as i32),
        ];
        // SAFETY: the shapes were checked above; the threads cover `width`, and no more of it.
        unsafe { self.launch(function, &launch, &args)? };
        Ok(out)
    }
}
