//! What an RMS norm between two products costs, as a kernel of its own and divided between them:
//! `cargo run --release -p torch-ext --features cuda --example cuda_bench_norms [rows...]`.
//!
//! Microseconds of one pair of products within a CUDA graph over copies of the weights that together are far larger than
//! the L2 cache: without a norm, with `add_rms_norm`, with the norm deferred (the addition in the first product, the
//! last factor in the second), and with half of that.

mod timing;

use std::error::Error;

use tch::{Kind, Tensor};
use torch_ext::cuda::{DeferredNorm, Kernels, Stream};

use timing::time;

const EPS: f64 = 1e-6;
const ROUNDS: usize = 9;
/// Bytes of weights that one graph reads at least.
const COLD: usize = 512 << 20;

/// Name; columns of the first product, of the residual, of the second product; whether that is gate and up.
const PAIRS: [(&str, i64, i64, i64, bool); 4] = [
    ("8B o, gate_up", 4096, 4096, 28_672, true),
    ("8B down, qkv", 14_336, 4096, 6144, false),
    ("0.6B o, gate_up", 2048, 1024, 6144, true),
    ("0.6B down, qkv", 3072, 1024, 4096, false),
];

fn main() -> Result<(), Box<dyn Error>> {
    let mut rows: Vec<i64> = Vec::new();
    for argument in std::env::args().skip(1) {
        rows.push(argument.parse()?);
    }
    if rows.is_empty() {
        rows = vec![17, 32, 64, 128];
    }
    let kernels = Kernels::new(0)?;
    Stream::new(0)?.make_current()?;
    let device = kernels.device();
    println!("rows  pair             | no norm | a kernel | deferred | added alone | scaled alone");
    for (name, k, hidden, n, gated) in PAIRS {
        let copies = COLD.div_ceil(((k + n) * hidden * 2) as usize).max(2);
        let weights = |shape: [i64; 2]| -> Vec<Tensor> {
            let scale = (shape[1] as f64).powf(-0.5);
            let weight = |_| Tensor::randn(shape, (Kind::BFloat16, device)) * scale;
            (0..copies).map(weight).collect()
        };
        let (first, second) = (weights([hidden, k]), weights([n, hidden]));
        let gain = Tensor::ones([hidden], (Kind::BFloat16, device));
        for &m in &rows {
            let random = |columns: i64| Tensor::randn([m, columns], (Kind::BFloat16, device));
            let (x, h) = (random(k), random(hidden));
            let residual = std::cell::RefCell::new(random(hidden));
            let plain = |x: &Tensor, w: &Tensor| {
                let y = match gated {
                    true => kernels.linear_wgmma_gated(x, w),
                    false => kernels.linear_wgmma(x, w, None),
                };
                y.expect("fits")
            };
            let scaled = |x: &DeferredNorm, w: &Tensor| {
                let y = match gated {
                    true => kernels.linear_wgmma_gated_deferred(x, w),
                    false => kernels.linear_wgmma_deferred(x, w, None),
                };
                y.expect("fits")
            };
            let product = |w: &Tensor| kernels.linear_wgmma(&x, w, None).expect("fits");
            let added = |w: &Tensor| {
                let residual = &mut residual.borrow_mut();
                kernels
                    .linear_wgmma_add(&x, w, None, residual, &gain, EPS)
                    .expect("fits")
            };
            let each = |pair: &dyn Fn(&Tensor, &Tensor) -> Tensor| -> Result<f64, Box<dyn Error>> {
                let total = time(ROUNDS, || {
                    for (first, second) in first.iter().zip(&second) {
                        drop(pair(first, second));
                    }
                })?;
                Ok(total / copies as f64)
            };
            let apart = each(&|first, second| {
                drop(product(first));
                plain(&h, second)
            })?;
            let kernel = each(&|first, second| {
                let y = product(first);
                let residual = &mut residual.borrow_mut();
                let x = kernels.add_rms_norm(residual, &y, &gain, EPS);
                plain(&x.expect("fits"), second)
            })?;
            let deferred = each(&|first, second| scaled(&added(first), second))?;
            let only_added = each(&|first, second| {
                drop(added(first));
                plain(&h, second)
            })?;
            let norm = added(&first[0]);
            let only_scaled = each(&|first, second| {
                drop(product(first));
                scaled(&norm, second)
            })?;
            println!(
                "{m:4}  {name:16} | {apart:7.2} | {kernel:8.2} | {deferred:8.2} | {only_added:11.2} | {only_scaled:12.2}"
            );
        }
    }
    Ok(())
}
