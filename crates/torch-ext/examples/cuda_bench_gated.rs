//! SiLU of a gate times up, of many rows, as one kernel and as cuBLAS followed by `silu_mul`:
//! `cargo run --release -p torch-ext --features cuda --example cuda_bench_gated [rows...]`.
//!
//! Each time is that of one layer's within a CUDA graph of several; those of a line were taken in turn. TFLOP/s counts the
//! product.

mod timing;

use std::error::Error;

use tch::{Kind, Tensor};
use torch_ext::cuda::{Kernels, Stream};

use timing::times;

const ROUNDS: usize = 7;
const LAYERS: usize = 8;

fn main() -> Result<(), Box<dyn Error>> {
    let mut rows: Vec<i64> = Vec::new();
    for argument in std::env::args().skip(1) {
        rows.push(argument.parse()?);
    }
    if rows.is_empty() {
        rows = vec![1024, 1280, 1536, 1792, 2048, 4096, 6624, 8192];
    }
    let kernels = Kernels::new(0)?;
    Stream::new(0)?.make_current()?;
    let device = kernels.device();
    println!("rows  weight | cuBLAS alone us TFLOP/s |    and SiLU us |  one kernel us | ratio");
    for (name, n, k) in [("8B", 28_672, 4096), ("0.6B", 6144, 1024)] {
        let random = |shape: [i64; 2]| Tensor::randn(shape, (Kind::BFloat16, device));
        let weights: Vec<Tensor> = (0..LAYERS)
            .map(|_| random([n, k]) * (k as f64).powf(-0.5))
            .collect();
        for &m in &rows {
            let x = random([m, k]);
            let each = |layer: &dyn Fn(&Tensor)| weights.iter().for_each(layer);
            let cublas = |w: &Tensor| x.linear::<&Tensor>(w, None);
            let [alone, two, one] = times(
                ROUNDS,
                [
                    &|| each(&|w| drop(cublas(w))),
                    &|| each(&|w| drop(kernels.silu_mul(&cublas(w)).expect("fits"))),
                    &|| each(&|w| drop(kernels.gated_product(&x, w).expect("fits"))),
                ],
            )?
            .map(|us| us / LAYERS as f64);
            let rate = 2e-6 * (m * n * k) as f64 / alone;
            let used = kernels.prefers_gated_product(m as usize, n as usize, k as usize);
            println!(
                "{m:5} {name:6} | {alone:15.1} {rate:7.0} | {two:14.1} | {one:14.1} | {:.3}{}",
                two / one,
                if used { "" } else { " (not used)" }
            );
        }
    }
    Ok(())
}
