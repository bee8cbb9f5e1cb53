//! Random inputs and float64 references shared by the kernel tests.
#![allow(dead_code)] // each test binary uses its part

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tch::{Device, Kind, Tensor};
use torch_ext::cpu::Dtype;

pub const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::Bf16, Dtype::F16];

/// A generator with a fresh seed, which a failing test prints.
pub fn rng() -> StdRng {
    let seed: u64 = rand::rng().random();
    println!("seed {seed:#x}");
    StdRng::seed_from_u64(seed)
}

/// Standard-normal-like float32 values.
pub fn random(rng: &mut StdRng, shape: &[i64]) -> Tensor {
    let n: i64 = shape.iter().product();
    let values: Vec<f32> = (0..n)
        .map(|_| (0..4).map(|_| rng.random_range(-1.0f32..1.0)).sum::<f32>() * 0.87)
        .collect();
    Tensor::from_slice(&values).view(shape)
}

pub fn f64(t: &Tensor) -> Tensor {
    t.to_kind(Kind::Double)
}

/// Leaves memory full of NaN for the next allocation of this shape to find.
pub fn poison(shape: &[i64]) {
    drop(Tensor::full(shape, f64::NAN, (Kind::Float, Device::Cpu)));
}

pub fn bits(t: &Tensor) -> Vec<u32> {
    let n = t.numel();
    let mut values = vec![0f32; n];
    t.to_kind(Kind::Float)
        .contiguous()
        .view(-1)
        .copy_data(&mut values, n);
    values.into_iter().map(f32::to_bits).collect()
}

#[track_caller]
pub fn assert_same_bits(a: &Tensor, b: &Tensor, what: &str) {
    assert_eq!(a.size(), b.size(), "{what}");
    if let Some(at) = bits(a).iter().zip(bits(b)).position(|(a, b)| *a != b) {
        panic!("{what}: element {at} differs");
    }
}

/// `|a - b| <= bound` everywhere; a NaN fails.
#[track_caller]
pub fn assert_within(a: &Tensor, b: &Tensor, bound: &Tensor, what: &str) {
    assert_eq!(a.size(), b.size(), "{what}");
    let excess = (f64(a) - f64(b)).abs() / f64(bound);
    let worst = if excess.numel() == 0 {
        0.0
    } else {
        excess.max().double_value(&[])
    };
    assert!(worst <= 1.0, "{what}: error is {worst} of the bound");
}

#[track_caller]
pub fn assert_close(a: &Tensor, b: &Tensor, tolerance: f64, what: &str) {
    let bound = (f64(b).abs() + 1.0) * tolerance;
    assert_within(a, b, &bound, what);
}
