//! Prints what the CPU kernels reach at the shapes of Qwen3-0.6B beside what the machine can do,
//! measured in the same run: `cargo run --release -p torch-ext --example roofline [threads]`.

use std::time::Instant;

use tch::{Device, Kind, Tensor};
use torch_ext::cpu::{
    AttentionParams, Dtype, PackedWeight, new_cache, num_threads, paged_attention, rms_norm,
    roofline, set_num_threads, silu_mul,
};

const SHAPES: [(&str, usize, usize); 5] = [
    ("qkv", 4096, 1024),
    ("o", 1024, 2048),
    ("gate_up", 6144, 1024),
    ("down", 1024, 3072),
    ("lm_head", 151_936, 1024),
];

fn random(shape: &[i64]) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu))
}

/// Median and best of the seconds that `f` takes, after one call that is not counted.
fn time(rounds: usize, mut f: impl FnMut(usize)) -> (f64, f64) {
    f(0);
    let mut seconds: Vec<f64> = (0..rounds)
        .map(|i| {
            let start = Instant::now();
            f(i);
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    (seconds[rounds / 2], seconds[0])
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if let Some(threads) = std::env::args().nth(1) {
        set_num_threads(threads.parse()?);
    }
    println!(
        "{} threads, {:?}",
        num_threads(),
        torch_ext::cpu::InstructionSet::detect()
    );
    let buffer = vec![1f32; 64 << 20];
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
        println!("\n{dtype:?}     rows   median        best          ceiling in this minute");
        for (name, n, k) in SHAPES {
            let w = random(&[n as i64, k as i64]);
            let start = Instant::now();
            let first = PackedWeight::from_tensor(&w, dtype)?;
            let packing = start.elapsed().as_secs_f64();
            // Enough copies that no weight is still in the cache when it comes round again.
            let copies = (256 << 20) / first.bytes() + 1;
            let mut weights = vec![first];
            while weights.len() < copies {
                weights.push(PackedWeight::from_tensor(&w, dtype)?);
            }
            let gb = (w.numel() * 4 + weights[0].bytes()) as f64 / 1e9;
            println!("{name:8} pack   {:6.1} GB/s read + written", gb / packing);
            for m in [1, 2, 4, 8, 16, 64, 512] {
                if name == "lm_head" && m > 16 {
                    continue;
                }
                let x = random(&[m, k as i64]);
                let rounds = if m == 512 { 9 } else { 3 * copies.max(4) };
                let streams = m <= 16;
                let roof = if streams {
                    roofline::read_bandwidth(&buffer, 8)
                } else {
                    roofline::fma_peak(20)
                };
                let run = |i: usize| drop(weights[i % copies].linear(&x, None).expect("shapes"));
                let (median, best) = time(rounds, run);
                let work = if streams {
                    weights[0].bytes() as f64
                } else {
                    2.0 * (m as usize * n * k) as f64
                };
                let unit = if streams { "GB/s" } else { "GFLOP/s" };
                println!(
                    "{name:8} {m:4} {:8.1} {:3.0}% {:8.1} {:3.0}% {:8.1} {unit}  ({:.1} GFLOP/s)",
                    work / median / 1e9,
                    work / median / roof * 100.0,
                    work / best / 1e9,
                    work / best / roof * 100.0,
                    roof / 1e9,
                    2.0 * (m as usize * n * k) as f64 / best / 1e9,
                );
            }
        }
    }
    attention();
    let (x, w) = (random(&[512, 1024]), random(&[1024]));
    let (norm, _) = time(50, |_| drop(rms_norm(&x, &w, 1e-6).expect("shapes")));
    let x = random(&[512, 6144]);
    let (silu, _) = time(50, |_| drop(silu_mul(&x).expect("shapes")));
    println!(
        "\n512 rows: rms_norm {:.0} us, silu_mul {:.0} us",
        norm * 1e6,
        silu * 1e6
    );
    Ok(())
}

/// (queries, context) of each of `seqs` equal sequences.
fn attention() {
    println!("\nattention, 16/8 heads of 128, block 16   median       best");
    let (hq, hkv, d, block) = (16, 8usize, 128, 16);
    for kind in [Kind::Float, Kind::BFloat16] {
        for (seqs, queries, context) in [
            (1, 512, 512),
            (1, 2048, 2048),
            (1, 512, 4096),
            (1, 1, 128),
            (1, 1, 8192),
            (64, 1, 1024),
        ] {
            let per_seq = context / block;
            let dtype = Dtype::from_kind(kind).expect("a cache type");
            let blocks = (seqs * per_seq) as usize;
            let [k, v] = [0, 1].map(|_| {
                let mut cache =
                    new_cache(blocks, hkv, block as usize, d as usize, dtype).expect("memory");
                let _ = cache.normal_(0.0, 1.0);
                cache
            });
            let q = random(&[seqs * queries, hq, d]);
            let tables =
                Tensor::arange(seqs * per_seq, (Kind::Int, Device::Cpu)).view([seqs, per_seq]);
            let starts = Tensor::arange(seqs + 1, (Kind::Int64, Device::Cpu)) * queries;
            let lens = Tensor::full([seqs], context, (Kind::Int64, Device::Cpu));
            let params = AttentionParams {
                scale: 0.1,
                sliding_window: None,
                soft_cap: None,
            };
            let (median, best) = time(15, |_| {
                drop(
                    paged_attention(&q, &k, &v, &tables, &starts, &lens, &params).expect("shapes"),
                );
            });
            let seen = (context - queries) * queries + queries * (queries + 1) / 2;
            let flop = (seqs * hq * seen * d * 4) as f64;
            let bytes = (k.numel() + v.numel()) as f64 * k.kind().elt_size_in_bytes() as f64;
            println!(
                "{kind:8?} {seqs:3} x {queries:4} of {context:5}: {:8.1} us {:8.1} us {:6.1} GFLOP/s {:6.1} GB/s",
                median * 1e6,
                best * 1e6,
                flop / best / 1e9,
                bytes / best / 1e9,
            );
        }
    }
}
