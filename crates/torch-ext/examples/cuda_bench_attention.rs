//! Attention on the GPU against its ceilings: `cargo run --release -p torch-ext --features cuda
//! --example cuda_bench_attention`.
//!
//! Decode reads keys and values once: TB/s of them, against a pass over memory that reads and
//! writes (what "copy" means here). Layers have caches of their own and run as one CUDA graph, so
//! they come from memory, not from the L2 cache. Prefill: TFLOP/s of the products that causality
//! leaves. Medians of CUDA events.

use std::error::Error;

use tch::{Device, Kind, Tensor};
use torch_ext::cuda::{
    Event, Graph, GraphPool, Heads, Kernels, PagedKv, Scores, Stream, WriteKv, synchronize,
};

const ON: Device = Device::Cuda(0);
const BLOCK: i64 = 16;
const ROUNDS: usize = 15;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Median microseconds of a replay of what `record` records.
fn time(mut record: impl FnMut() -> Result<(), torch_ext::Error>) -> Outcome<f64> {
    record()?; // compiles
    synchronize(0)?;
    let (mut graph, recorded) = Graph::capture(GraphPool::new()?, &mut record)?;
    recorded?;
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let (start, end) = (Event::new(0, true)?, Event::new(0, true)?);
        start.record()?;
        graph.replay()?;
        end.record()?;
        end.synchronize()?;
        times.push(f64::from(end.since(&start)?) * 1e3);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[ROUNDS / 2])
}

/// Sequences whose blocks are spread over the caches of a few layers.
struct Setup {
    q: Tensor,
    out: Tensor,
    layers: Vec<[Tensor; 2]>,
    block_tables: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    scores: Scores,
}

impl Setup {
    /// `count` sequences of `context` tokens, the last `new` of which are queries.
    fn new(heads: Heads, count: i64, new: i64, context: i64, layers: usize) -> Self {
        let width = (context + BLOCK - 1) / BLOCK;
        let (h, kv, dim) = (
            heads.heads as i64,
            heads.kv_heads as i64,
            heads.head_dim as i64,
        );
        let half = (Kind::BFloat16, ON);
        let cache = || Tensor::randn([count * width, kv, BLOCK, dim], half);
        let blocks = Tensor::randperm(count * width, (Kind::Int64, ON));
        Self {
            q: Tensor::randn([count * new, h, dim], half),
            out: Tensor::empty([count * new, h * dim], half),
            layers: (0..layers).map(|_| [cache(), cache()]).collect(),
            block_tables: blocks.to_kind(Kind::Int).view([count, width]),
            query_start: Tensor::arange(count + 1, (Kind::Int, ON)) * new,
            context_len: Tensor::full([count], context, (Kind::Int, ON)),
            scores: Scores {
                scale: (dim as f64).powf(-0.5),
                window: None,
                soft_cap: None,
            },
        }
    }

    fn kv(&self, layer: usize) -> PagedKv<'_> {
        let [k, v] = &self.layers[layer];
        PagedKv {
            k,
            v,
            block_tables: &self.block_tables,
            query_start: &self.query_start,
            context_len: &self.context_len,
        }
    }
}

fn decode(kernels: &Kernels, copy: f64) -> Outcome<()> {
    for (count, context, heads, kv_heads, head_dim, layers) in [
        (32, 8192, 32, 8, 128, 1),
        (128, 1024, 32, 8, 128, 1),
        (128, 1024, 32, 8, 64, 1),
        (64, 1024, 16, 8, 256, 1),
        (256, 600, 16, 8, 128, 1),
        (100, 400, 32, 8, 128, 1),
        (40, 1000, 32, 8, 128, 2),
        (128, 250, 16, 8, 128, 4),
        (256, 250, 16, 8, 128, 4),
        (48, 300, 16, 8, 128, 16),
        (8, 300, 16, 8, 128, 28),
        (1, 128, 16, 8, 128, 28),
        (1, 1024, 16, 8, 128, 28),
        (1, 32768, 32, 8, 128, 2),
    ] {
        let heads = Heads {
            heads,
            kv_heads,
            head_dim,
        };
        let setup = Setup::new(heads, count, 1, context, layers);
        // As a graph that serves long contexts too.
        let longest = 32768;
        let seqs = Tensor::arange(count, (Kind::Int, ON));
        let with = |invariant| -> Outcome<f64> {
            let workspace = kernels.decode_workspace(heads, count as usize, longest, invariant)?;
            let us = time(|| {
                (0..layers).try_for_each(|layer| {
                    let (q, kv, out) = (&setup.q, setup.kv(layer), &setup.out);
                    let scores = &setup.scores;
                    kernels.attention_decode(q, &kv, &seqs, out, scores, longest, 1, &workspace)
                })
            })?;
            Ok(us / layers as f64)
        };
        let (us, invariant) = (with(false)?, with(true)?);
        let bytes = (count * context) as f64 * (kv_heads * head_dim * 4) as f64;
        let rate = bytes / us / 1e6;
        let share = 100.0 * rate / copy;
        println!(
            "decode {count:>3} x {context:>5}, {heads:?}: {us:8.2} us {rate:5.2} TB/s, {share:.0} % of copy; \
             invariant {invariant:.2} us"
        );
    }
    Ok(())
}

/// A layer's write and its attention, as two kernels and as one. From `least` tokens on contexts are of any
/// length, and the last ones are empty, as the padding of a captured step is.
fn fused(kernels: &Kernels, copy: f64) -> Outcome<()> {
    for (count, empty, least, context, ratio) in [
        (1, 0, 250, 250, 4),
        (32, 0, 250, 250, 4),
        (128, 0, 250, 250, 4),
        (128, 0, 250, 250, 2),
        (128, 0, 100, 1700, 2),
        (256, 0, 100, 1100, 2),
        (256, 7, 100, 1100, 2),
        (256, 0, 100, 1700, 2),
        (256, 0, 100, 1700, 4),
    ] {
        let (kv_heads, head_dim, layers) = (8, 128, if count < 128 { 28 } else { 4 });
        let heads = Heads {
            heads: kv_heads * ratio,
            kv_heads,
            head_dim,
        };
        let lens = Tensor::randint_low(least, context + 1, [count], (Kind::Int, ON));
        let _ = lens.narrow(0, count - empty, empty).zero_();
        let setup = Setup {
            context_len: lens,
            ..Setup::new(heads, count, 1, context, layers)
        };
        let seqs = Tensor::arange(count, (Kind::Int, ON));
        let width = ((heads.heads + 2 * kv_heads) * head_dim) as i64;
        let qkv = Tensor::randn([count, width], (Kind::BFloat16, ON));
        let weight = Tensor::ones([head_dim as i64], (Kind::BFloat16, ON));
        let angles = Tensor::randn([count, head_dim as i64 / 2], (Kind::Float, ON));
        let index = Tensor::arange(count, (Kind::Int64, ON));
        let last = (setup.context_len.to_kind(Kind::Int64) - 1).clamp_min(0);
        let entry = last.divide_scalar_mode(BLOCK, "floor").unsqueeze(1);
        let newest = setup.block_tables.gather(1, &entry, false).squeeze_dim(1);
        let slots = newest.to_kind(Kind::Int64) * BLOCK + last.remainder(BLOCK);
        let each = |fused: bool, invariant: bool| -> Outcome<f64> {
            let workspace = kernels.decode_workspace(heads, count as usize, 4096, invariant)?;
            let us = time(|| {
                (0..layers).try_for_each(|layer| {
                    let kv = setup.kv(layer);
                    let write = WriteKv {
                        qkv: &qkv,
                        qk_norm: Some((&weight, &weight)),
                        eps: 1e-6,
                        cos: &angles,
                        sin: &angles,
                        rope_index: &index,
                        slots: &slots,
                        k_cache: kv.k,
                        v_cache: kv.v,
                    };
                    let (out, scores) = (&setup.out, &setup.scores);
                    if fused {
                        return kernels
                            .attention_decode_fused(&write, &kv, out, scores, 4096, &workspace);
                    }
                    let q = kernels.write_kv(&write)?;
                    kernels.attention_decode(&q, &kv, &seqs, out, scores, 4096, 1, &workspace)
                })
            })?;
            Ok(us / layers as f64)
        };
        let (apart, one, invariant) = (each(false, false)?, each(true, false)?, each(true, true)?);
        let tokens = setup.context_len.sum(Kind::Int64).int64_value(&[]);
        let rate = (tokens as usize * kv_heads * head_dim * 4) as f64 / one / 1e6;
        println!(
            "write and decode {count:>3} ({empty} empty) x {least} to {context}, {heads:?}: two kernels {apart:6.2} us, one \
             {one:6.2} us ({:.0} % of copy), invariant {invariant:6.2} us",
            100.0 * rate / copy
        );
    }
    Ok(())
}

fn write_kv(kernels: &Kernels) -> Outcome<()> {
    for (tokens, heads, kv_heads) in [(1i64, 16, 8), (128, 32, 8), (16384, 32, 8)] {
        let dim = 128;
        let setup = Setup::new(
            Heads {
                heads: heads as usize,
                kv_heads: kv_heads as usize,
                head_dim: dim as usize,
            },
            1,
            1,
            tokens,
            4,
        );
        let qkv = Tensor::randn([tokens, (heads + 2 * kv_heads) * dim], (Kind::BFloat16, ON));
        let weight = Tensor::ones([dim], (Kind::BFloat16, ON));
        let angles = Tensor::randn([tokens, dim / 2], (Kind::Float, ON));
        let index = Tensor::arange(tokens, (Kind::Int64, ON));
        let us = time(|| {
            setup.layers.iter().try_for_each(|[k_cache, v_cache]| {
                kernels
                    .write_kv(&WriteKv {
                        qkv: &qkv,
                        qk_norm: Some((&weight, &weight)),
                        eps: 1e-6,
                        cos: &angles,
                        sin: &angles,
                        rope_index: &index,
                        slots: &index,
                        k_cache,
                        v_cache,
                    })
                    .map(drop)
            })
        })? / 4.0;
        let rate = 2.0 * (qkv.numel() * 2) as f64 / us / 1e6;
        println!(
            "write_kv {tokens:>5} tokens, {heads}/{kv_heads} heads: {us:8.2} us {rate:5.2} TB/s"
        );
    }
    Ok(())
}

fn prefill(kernels: &Kernels) -> Outcome<()> {
    for (count, new, prefix, heads, kv_heads, head_dim) in [
        (16, 1024, 0, 32, 8, 128),
        (4, 4096, 0, 32, 8, 128),
        (1, 16384, 0, 32, 8, 128),
        (8, 3900, 0, 16, 8, 128),
        (4, 512, 8192, 32, 8, 128),
        (4, 4096, 0, 32, 8, 64),
        (2, 4096, 0, 16, 8, 256),
    ] {
        let heads = Heads {
            heads,
            kv_heads,
            head_dim,
        };
        let setup = Setup::new(heads, count, new, new + prefix, 1);
        let chunks: Vec<_> = (0..count as usize)
            .map(|seq| (seq, new as usize, (new + prefix) as usize))
            .collect();
        let flat = kernels.prefill_tiles(heads, BLOCK as usize, &chunks);
        let tiles = Tensor::from_slice(&flat).view([-1, 3]).to_device(ON);
        let us = time(|| {
            kernels.attention_prefill(&setup.q, &setup.kv(0), &tiles, &setup.out, &setup.scores)
        })?;
        let (len, before) = (new as f64, prefix as f64);
        let pairs = count as f64 * (len * before + len * (len + 1.0) / 2.0);
        let rate = 4.0 * pairs * (heads.heads * head_dim) as f64 / us / 1e6;
        println!(
            "prefill {count:>2} x {new:>5} after {prefix:>4}, {heads:?}: {us:8.0} us {rate:4.0} TFLOP/s"
        );
    }
    Ok(())
}

fn main() -> Outcome<()> {
    let kernels = Kernels::new(0)?;
    let stream = Stream::new(0)?;
    stream.make_current()?;
    let mut x = Tensor::randn([1 << 29], (Kind::Float, ON));
    let us = time(|| {
        let _ = x.g_add_scalar_(1.0);
        Ok(())
    })?;
    let copy = 2.0 * (x.numel() * 4) as f64 / us / 1e6;
    println!("copy: {copy:.2} TB/s");
    drop(x);
    decode(&kernels, copy)?;
    fused(&kernels, copy)?;
    write_kv(&kernels)?;
    prefill(&kernels)
}
