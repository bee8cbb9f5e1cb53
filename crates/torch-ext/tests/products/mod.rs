//! What the tests of products on a GPU compare with.

use tch::{Kind, Tensor};
use torch_ext::cuda::{self, Kernels};

pub const EPS: f64 = 1e-6;

/// `None` where the kernel does not run.
pub fn kernels() -> Option<Kernels> {
    if !cuda::is_available() {
        println!("skipped: no CUDA device");
        return None;
    }
    let kernels = Kernels::new(0).unwrap();
    if kernels.capability() != (9, 0) {
        println!("skipped: not a Hopper GPU");
        return None;
    }
    Some(kernels)
}

/// On the device.
pub fn random(kernels: &Kernels, shape: &[usize], kind: Kind, scale: f64) -> Tensor {
    let shape: Vec<i64> = shape.iter().map(|n| *n as i64).collect();
    (Tensor::randn(shape, (Kind::Float, kernels.device())) * scale).to_kind(kind)
}

/// Small whole numbers: every sum is exact, so is every wrong index seen.
pub fn whole(kernels: &Kernels, shape: &[usize], kind: Kind) -> Tensor {
    let shape: Vec<i64> = shape.iter().map(|n| *n as i64).collect();
    Tensor::randint_low(-2, 3, shape, (Kind::Float, kernels.device())).to_kind(kind)
}

pub fn wide(x: &Tensor) -> Tensor {
    x.to_kind(Kind::Double)
}

pub fn product(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Tensor {
    wide(x).linear(&wide(w), bias.map(wide).as_ref())
}

/// |got - want| / |want|
pub fn distance(got: &Tensor, want: &Tensor) -> f64 {
    let want = wide(want);
    ((wide(got) - &want).norm() / want.norm()).double_value(&[])
}

pub fn rounding(kind: Kind) -> f64 {
    match kind {
        Kind::BFloat16 => 2f64.powi(-8),
        _ => 2f64.powi(-11),
    }
}

pub fn close(got: &Tensor, want: &Tensor, kind: Kind, what: &str) {
    assert_eq!(got.size(), want.size(), "{what}");
    let distance = distance(got, want);
    // NaN is not close.
    assert!(
        distance <= 1.5 * rounding(kind),
        "{what}: {distance:.2e} away"
    );
}

/// silu(gate) * up, rounded where the kernel rounds.
pub fn gated(product: &Tensor, kind: Kind) -> Tensor {
    let halves = product.to_kind(kind).chunk(2, -1);
    wide(&halves[0]).silu().to_kind(kind) * &halves[1]
}
