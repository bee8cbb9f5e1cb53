use std::ptr;

use tch::Tensor;

use super::check::{empty, finite, operand};
use super::{ffi, threads_for};
use crate::Error;

/// `x / sqrt(mean(x^2) + eps) * weight` over the last dimension (Zhang and Sennrich, 2019).
/// `x` is float32 `[T, H]`, `weight` float32 `[H]`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor, Error> {
    norm("rms_norm", None, x, weight, eps)
}

/// `residual += x`, then [`rms_norm`] of the sum. All float32 `[T, H]`.
pub fn add_rms_norm(
    residual: &mut Tensor,
    x: &Tensor,
    weight: &Tensor,
    eps: f64,
) -> Result<Tensor, Error> {
    norm("add_rms_norm", Some(residual), x, weight, eps)
}

fn norm(
    op: &'static str,
    residual: Option<&mut Tensor>,
    x: &Tensor,
    weight: &Tensor,
    eps: f64,
) -> Result<Tensor, Error> {
    let ([rows, dim], x) = operand(op, "x", x).f32([None, None])?;
    let (_, weight) = operand(op, "weight", weight).f32([Some(dim)])?;
    let eps = finite(op, "eps", eps)?;
    let residual = match residual {
        Some(r) => operand(op, "residual", r).f32([Some(rows), Some(dim)])?.1,
        None => ptr::null_mut(),
    };
    let y = empty(&[rows, dim]);
    let args = ffi::RmsNorm {
        residual,
        x,
        weight,
        y: y.data_ptr().cast(),
        rows,
        dim,
        eps,
        threads: threads_for(8 * rows * dim, 0),
    };
    // SAFETY: x, residual (or null) and y are [rows, dim], weight is [dim].
    unsafe { (ffi::kernels().rms_norm)(&args) };
    Ok(y)
}

/// `silu(gate) * up` with `silu(x) = x / (1 + e^-x)`: float32 `[T, 2 I]` to `[T, I]`, the gate in
/// the first `I` columns.
pub fn silu_mul(gate_up: &Tensor) -> Result<Tensor, Error> {
    let operand = operand("silu_mul", "gate_up", gate_up);
    let ([rows, width], gate_up) = operand.f32([None, None])?;
    if width % 2 != 0 {
        return Err(operand.argument("an even number of columns", width));
    }
    let dim = width / 2;
    let y = empty(&[rows, dim]);
    let args = ffi::SiluMul {
        gate_up,
        y: y.data_ptr().cast(),
        rows,
        dim,
        // An exponential costs about as much as 40 products.
        threads: threads_for(12 * rows * dim, 40 * rows * dim),
    };
    // SAFETY: gate_up is [rows, 2 dim] and y [rows, dim].
    unsafe { (ffi::kernels().silu_mul)(&args) };
    Ok(y)
}

#[cfg(test)]
mod tests {
    use super::ffi::{self, under_test::with_each_set};

    fn exp(x: &[f32]) -> Vec<f32> {
        let mut y = vec![f32::NAN; x.len()];
        // SAFETY: both have the same length.
        unsafe { (ffi::kernels().exp)(x.as_ptr(), y.as_mut_ptr(), x.len()) };
        y
    }

    #[test]
    fn exp_is_within_two_ulp_wherever_the_result_is_normal() {
        // Every 257th float of the range in which e^x is a normal number.
        let x: Vec<f32> = (0..=u32::MAX / 257)
            .map(|i| f32::from_bits(i * 257))
            .filter(|x| (-87.33..=88.72).contains(x))
            .collect();
        let mut worst: f64 = 0.0;
        let sets = with_each_set(|| exp(&x));
        for (x, y) in sets.iter().flat_map(|(_, y)| x.iter().zip(y)) {
            let exact = f64::from(*x).exp();
            let rounded = exact as f32;
            let ulp = f64::from(f32::from_bits(rounded.to_bits() + 1)) - f64::from(rounded);
            worst = worst.max((f64::from(*y) - exact).abs() / ulp);
        }
        assert!(x.len() > 1_000_000);
        assert!(worst <= 2.0, "off by {worst} ulp");
    }

    #[test]
    fn exp_at_the_edges() {
        let inf = f32::INFINITY;
        assert_eq!(
            exp(&[0.0, -0.0, inf, -inf, 89.0, -88.0, -1e30]),
            [1.0, 1.0, inf, 0.0, inf, 0.0, 0.0]
        );
        assert!(exp(&[f32::NAN])[0].is_nan());
    }
}
