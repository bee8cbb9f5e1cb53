//! What sampling costs on a GPU: `cargo run --release -p sampler --features cuda --example
//! cuda_bench_sample [rows...] [how a name begins]`.
//!
//! Each figure is the median of CUDA graphs with a few samplings in a row, for one of them. `cold`
//! samples from logits that lie in memory, `warm` from the same logits again (up to 50 MB of them
//! stay in an H100's L2 cache, as they do after the LM head wrote them). GB/s are the logits' bytes
//! by the time.

use std::error::Error;
use std::sync::Arc;

use sampler::SamplingParams;
use sampler::cuda::CudaSampler;
use tch::{Device, Kind, Tensor};
use torch_ext::cuda::{Event, Graph, GraphPool, Kernels, Stream, synchronize};

const VOCAB: i64 = 151_936;
const REPLAYS: usize = 15;
const DEVICE: Device = Device::Cuda(0);

/// Milliseconds of a replay, the median.
fn time(graph: &mut Graph) -> Result<f64, Box<dyn Error>> {
    let mut times = Vec::new();
    for _ in 0..REPLAYS + 2 {
        let (start, end) = (Event::new(0, true)?, Event::new(0, true)?);
        start.record()?;
        graph.replay()?;
        end.record()?;
        end.synchronize()?;
        times.push(f64::from(end.since(&start)?));
    }
    times.drain(..2);
    times.sort_by(f64::total_cmp);
    Ok(times[REPLAYS / 2])
}

fn copy_bandwidth() -> Result<f64, Box<dyn Error>> {
    let from = Tensor::zeros([1 << 28], (Kind::Float, DEVICE));
    let mut to = from.empty_like();
    let (mut graph, ()) = Graph::capture(GraphPool::new()?, || {
        to.copy_(&from);
    })?;
    Ok(2.0 * (4u64 << 28) as f64 / time(&mut graph)? / 1e6)
}

fn main() -> Result<(), Box<dyn Error>> {
    let (mut rows, mut only) = (Vec::<i64>::new(), None);
    for arg in std::env::args().skip(1) {
        match arg.parse() {
            Ok(count) => rows.push(count),
            Err(_) => only = Some(arg),
        }
    }
    let rows = if rows.is_empty() {
        vec![1, 8, 32, 128]
    } else {
        rows
    };
    let kernels = Arc::new(Kernels::new(0)?);
    Stream::new(0)?.make_current()?;
    println!("copy: {:.0} GB/s (read and write)", copy_bandwidth()?);
    println!(
        "{:34} {:>5} {:>9} {:>9} {:>9}",
        "us", "rows", "cold", "warm", "cold GB/s"
    );
    let d = SamplingParams::default;
    let table = [
        ("greedy", 3.0, SamplingParams::greedy()),
        (
            "greedy, 5 logprobs",
            3.0,
            SamplingParams {
                logprobs: Some(5),
                ..SamplingParams::greedy()
            },
        ),
        ("temperature 1", 3.0, d()),
        (
            "temperature 1, repetition 1.1",
            3.0,
            SamplingParams {
                repetition_penalty: 1.1,
                ..d()
            },
        ),
        ("top-k 50", 3.0, SamplingParams { top_k: 50, ..d() }),
        ("top-p 0.9", 3.0, SamplingParams { top_p: 0.9, ..d() }),
        (
            "top-p 0.9, flat (deviation 1)",
            1.0,
            SamplingParams { top_p: 0.9, ..d() },
        ),
        (
            "top-k 50, top-p 0.9",
            3.0,
            SamplingParams {
                top_k: 50,
                top_p: 0.9,
                ..d()
            },
        ),
        (
            "top-p 0.9, temperature 0.3",
            3.0,
            SamplingParams {
                temperature: 0.3,
                top_p: 0.9,
                ..d()
            },
        ),
        (
            "t 0.6, top-k 20, top-p 0.95",
            3.0,
            SamplingParams {
                temperature: 0.6,
                top_k: 20,
                top_p: 0.95,
                ..d()
            },
        ),
        ("min-p 0.05", 3.0, SamplingParams { min_p: 0.05, ..d() }),
        (
            "top-k 20000",
            3.0,
            SamplingParams {
                top_k: 20_000,
                ..d()
            },
        ),
    ];
    let wanted = |name: &str| only.as_ref().is_none_or(|only| name.starts_with(only));
    for (name, scale, params) in table.into_iter().filter(|(name, ..)| wanted(name)) {
        for &rows in &rows {
            // Enough buffers that none is in the cache when its turn comes.
            let buffers = (400_000_000 / (rows * VOCAB * 2)).clamp(4, 64) as usize;
            let logits: Vec<Tensor> = (0..buffers)
                .map(|_| {
                    let x = Tensor::randn([rows, VOCAB], (Kind::Float, DEVICE)) * scale;
                    x.to_kind(Kind::BFloat16)
                })
                .collect();
            let mut sampler = CudaSampler::new(kernels.clone(), VOCAB as usize, rows as usize)?;
            let host: Vec<u32> = (0..rows as u32).collect();
            for &slot in &host {
                let seed = u64::from(slot);
                sampler.admit(slot, Arc::new(params.clone()), seed, &[1, 2, 3], 3, &[])?;
            }
            let needs = sampler.prepare(&host)?;
            let slots = Tensor::arange(rows, (Kind::Int, DEVICE));
            let positions = Tensor::full([rows], 3, (Kind::Int, DEVICE));
            let sample = |logits: &Tensor| -> Result<(), torch_ext::Error> {
                let tokens = sampler.launch(logits, &slots, &positions, needs.mode)?;
                if needs.logprobs.is_some() {
                    sampler.logprobs(logits, &slots, &positions, &tokens, needs)?;
                }
                Ok(())
            };
            sample(&logits[0])?;
            synchronize(0)?;
            let mut us = [0.0; 2];
            for (i, us) in us.iter_mut().enumerate() {
                let (mut graph, done) = Graph::capture(GraphPool::new()?, || {
                    (0..buffers).try_for_each(|b| sample(&logits[if i == 0 { b } else { 0 }]))
                })?;
                done?;
                *us = 1e3 * time(&mut graph)? / buffers as f64;
            }
            let bandwidth = (rows * VOCAB * 2) as f64 / us[0] / 1e3;
            println!(
                "{name:34} {rows:>5} {:>9.1} {:>9.1} {bandwidth:>9.0}",
                us[0], us[1]
            );
        }
    }
    Ok(())
}
