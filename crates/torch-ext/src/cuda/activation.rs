//! SiLU of one half times the other.

use tch::Tensor;

use super::check::{HALVES, Operand};
use super::compile::Source;
use super::kernels::{Arg, Kernels, Launch};
use super::rope::element;
use crate::Error;

pub(crate) static SOURCE: Source = Source {
    name: "activation",
    text: include_str!("../../csrc/cuda/activation.cu"),
    variants: &[&["T_BF16=1"], &["T_HALF=1"]],
};

const THREADS: usize = 256;

impl Kernels {
    /// `silu(gate) * up` (`[tokens, width]`) of `gate_up` (`[tokens, 2 * width]`, gate first,
    /// bfloat16 or float16). `width` must be a multiple of 8. Computed in float32; the SiLU is
    /// rounded before it is multiplied. A row does not depend on the others.
    pub fn silu_mul(&self, gate_up: &Tensor) -> Result<Tensor, Error> {
        let operand = Operand {
            op: "silu_mul",
            name: "gate_up",
            tensor: gate_up,
            device: self.device(),
        };
        let [tokens, both] = operand.vectors(HALVES, [None, None])?;
        if both % 16 != 0 || both > i32::MAX as usize {
            return Err(operand.argument("a multiple of 16 columns", both));
        }
        let width = both / 2;
        let out = self.empty(&[tokens, width], gate_up.kind())?;
        let blocks = (tokens * (width / 8)).div_ceil(THREADS);
        if blocks == 0 {
            return Ok(out);
        }
        let defines = [(element(gate_up.kind()), 1)];
        let function = self.function(&SOURCE, "silu_mul", &defines)?;
        let launch = Launch::new([grid(operand, blocks)?, 1, 1], THREADS as u32).pdl();
        let args = [
            (&out).into(),
            gate_up.into(),
            Arg::from(tokens as i64),
            Arg::from(width as i32),
        ];
        // SAFETY: the shapes were checked above; threads past the end do nothing.
        unsafe { self.launch(function, &launch, &args)? };
        Ok(out)
    }
}

/// A number of thread blocks that CUDA takes.
pub(super) fn grid(operand: Operand, blocks: usize) -> Result<u32, Error> {
    i32::try_from(blocks)
        .map(|blocks| blocks as u32)
        .map_err(|_| operand.argument("a tensor that 2^31 thread blocks can cover", blocks))
}
