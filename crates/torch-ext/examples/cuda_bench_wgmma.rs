//! Single products of 1 to 256 rows, of our kernels and of cuBLAS:
//! `cargo run --release -p torch-ext --features cuda --example cuda_bench_wgmma [rows...] [plans] [fresh] [name]`.
//!
//! Each time is that of one product within a CUDA graph over copies of the weight that together are
//! far larger than the L2 cache. TB/s counts the weight. `small` is `linear_small` where it takes the
//! rows. For a gate and up, cuBLAS and `small` are followed by `silu_mul`; `wgmma` has it inside. With
//! `plans` all ways to launch `wgmma` are timed, and the twelve that are fastest printed. With `fresh` a kernel writes x
//! before each product, as in a step, and its time is part of every figure. Anything else is the end of the names of the
//! weights that are timed: `head`, `"8B o"`.

mod timing;

use std::error::Error;

use tch::{Kind, Tensor};
use torch_ext::cuda::{Kernels, Stream};

use timing::time;

const ROUNDS: usize = 9;
/// Bytes of weights that one graph reads at least.
const COLD: usize = 512 << 20;

const SHAPES: [(&str, usize, usize, bool); 10] = [
    ("8B qkv", 6144, 4096, false),
    ("8B o", 4096, 4096, false),
    ("8B gate_up", 28_672, 4096, true),
    ("8B down", 4096, 14_336, false),
    ("8B head", 128_256, 4096, false),
    ("0.6B qkv", 4096, 1024, false),
    ("0.6B o", 1024, 2048, false),
    ("0.6B gate_up", 6144, 1024, true),
    ("0.6B down", 1024, 3072, false),
    ("0.6B head", 151_936, 1024, false),
];

fn main() -> Result<(), Box<dyn Error>> {
    let mut rows: Vec<usize> = Vec::new();
    let (mut all_plans, mut fresh, mut only) = (false, false, String::new());
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "plans" => all_plans = true,
            "fresh" => fresh = true,
            other => match other.parse() {
                Ok(number) => rows.push(number),
                Err(_) => only = other.to_owned(),
            },
        }
    }
    if rows.is_empty() {
        rows = vec![17, 32, 64, 96, 128, 160, 192, 224, 256];
    }
    if !SHAPES.iter().any(|shape| shape.0.ends_with(&only)) {
        return Err(format!("no weight's name ends with `{only}`").into());
    }
    let kernels = Kernels::new(0)?;
    Stream::new(0)?.make_current()?;
    let device = kernels.device();
    println!("rows  weight         MB |   cuBLAS us TB/s |    small us TB/s |    wgmma us TB/s");
    for (name, n, k, gated) in SHAPES.into_iter().filter(|s| s.0.ends_with(&only)) {
        let bytes = n * k * 2;
        let copies = COLD.div_ceil(bytes).max(2);
        let shape = [n as i64, k as i64];
        let scale = (k as f64).powf(-0.5);
        let weights: Vec<Tensor> = (0..copies)
            .map(|_| Tensor::randn(shape, (Kind::BFloat16, device)) * scale)
            .collect();
        for &m in &rows {
            let input = Tensor::randn([m as i64, k as i64], (Kind::BFloat16, device));
            let each =
                |product: &dyn Fn(&Tensor, &Tensor) -> Tensor| -> Result<f64, Box<dyn Error>> {
                    let total = time(ROUNDS, || {
                        for w in &weights {
                            match fresh {
                                true => drop(product(&input.abs(), w)),
                                false => drop(product(&input, w)),
                            }
                        }
                    })?;
                    Ok(total / copies as f64)
                };
            let activated = |y: Tensor| match gated {
                true => kernels.silu_mul(&y).expect("fits"),
                false => y,
            };
            let cell = |us: f64| format!("{us:9.2} {:6.2}", bytes as f64 / us / 1e6);
            let cublas = each(&|x, w| activated(x.linear::<&Tensor>(w, None)))?;
            print!(
                "{m:4}  {name:12} {:5.0} | {}",
                bytes as f64 / 1e6,
                cell(cublas)
            );
            match m <= kernels.linear_small_rows(n, k) {
                true => {
                    let small =
                        each(&|x, w| activated(kernels.linear_small(x, w, None).expect("fits")))?;
                    print!(" | {}", cell(small));
                }
                false => print!(" | {:>16}", "-"),
            }
            let plans = kernels.linear_wgmma_plans(m, n, k, gated);
            let by = |plan| {
                each(&|x, w| {
                    kernels
                        .linear_wgmma_by(plan, x, w, None, gated)
                        .expect("a plan of this problem")
                })
            };
            let wgmma = each(&|x, w| {
                let product = match gated {
                    true => kernels.linear_wgmma_gated(x, w),
                    false => kernels.linear_wgmma(x, w, None),
                };
                product.expect("fits")
            })?;
            let mark = match kernels.prefers_wgmma(m, n, k) {
                true => "",
                false => " (not used)",
            };
            println!(" | {}{mark}", cell(wgmma));
            if all_plans {
                let mut timed = Vec::new();
                for plan in plans {
                    timed.push((by(plan)?, plan));
                }
                timed.sort_by(|a, b| a.0.total_cmp(&b.0));
                for (us, plan) in timed.into_iter().take(12) {
                    println!("      {} {plan:?}", cell(us));
                }
            }
        }
    }
    Ok(())
}
