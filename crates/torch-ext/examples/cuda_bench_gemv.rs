//! The matrix products of a decode step, of our kernels and of cuBLAS, as one CUDA graph over the
//! weights of all layers: `cargo run --release -p torch-ext --features cuda --example
//! cuda_bench_gemv [rows...]`.
//!
//! Every layer has weights of its own, so they come from memory, not from the L2 cache. `products`
//! are the four products of each layer and the LM head; `step` has the norms, residual additions
//! and activations between them as well. `ours` takes cuBLAS where `linear_small_rows` says so.
//! GB/s counts the weights.

mod timing;

use std::error::Error;

use tch::{Device, Kind, Tensor};
use torch_ext::cuda::{DeferredNorm, Kernels, Stream};

use timing::time;

const EPS: f64 = 1e-6;
const ROUNDS: usize = 11;

struct Dims {
    name: &'static str,
    hidden: i64,
    qkv: i64,
    heads: i64,
    intermediate: i64,
    layers: usize,
    vocab: i64,
}

const MODELS: [Dims; 2] = [
    Dims {
        name: "0.6B",
        hidden: 1024,
        qkv: 4096,
        heads: 2048,
        intermediate: 3072,
        layers: 28,
        vocab: 151_936,
    },
    Dims {
        name: "8B",
        hidden: 4096,
        qkv: 6144,
        heads: 4096,
        intermediate: 14_336,
        layers: 32,
        vocab: 128_256,
    },
];

struct Layer {
    norms: [Tensor; 2],
    qkv: Tensor,
    o: Tensor,
    gate_up: Tensor,
    down: Tensor,
}

struct Model {
    dims: Dims,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Tensor,
}

fn random(shape: &[i64], device: Device) -> Tensor {
    let scale = (shape[shape.len() - 1] as f64).powf(-0.5);
    Tensor::randn(shape, (Kind::BFloat16, device)) * scale
}

impl Model {
    fn new(dims: Dims, device: Device) -> Self {
        let Dims {
            hidden,
            qkv,
            heads,
            intermediate,
            vocab,
            ..
        } = dims;
        let norm = || Tensor::ones([hidden], (Kind::BFloat16, device));
        let layer = |_| Layer {
            norms: [norm(), norm()],
            qkv: random(&[qkv, hidden], device),
            o: random(&[hidden, heads], device),
            gate_up: random(&[2 * intermediate, hidden], device),
            down: random(&[hidden, intermediate], device),
        };
        Self {
            layers: (0..dims.layers).map(layer).collect(),
            norm: norm(),
            head: random(&[vocab, hidden], device),
            dims,
        }
    }

    fn bytes(&self) -> f64 {
        let layer = |l: &Layer| l.qkv.numel() + l.o.numel() + l.gate_up.numel() + l.down.numel();
        2.0 * (self.head.numel() + self.layers.iter().map(layer).sum::<usize>()) as f64
    }

    /// The products alone, on inputs of their own.
    fn products(&self, inputs: &[Tensor; 3], linear: impl Fn(&Tensor, &Tensor) -> Tensor) {
        let [hidden, heads, intermediate] = inputs;
        for layer in &self.layers {
            let _ = linear(hidden, &layer.qkv);
            let _ = linear(heads, &layer.o);
            let _ = linear(hidden, &layer.gate_up);
            let _ = linear(intermediate, &layer.down);
        }
        let _ = linear(hidden, &self.head);
    }

    /// A step without its attention: the first columns of Q, K and V stand for its result.
    fn step(&self, kernels: &Kernels, input: &Tensor, fused: bool) -> Tensor {
        let attention = |qkv: &Tensor, heads: &Tensor| {
            let _ = qkv;
            heads.shallow_clone()
        };
        let device = kernels.device();
        let rows = input.size()[0];
        let heads = Tensor::ones([rows, self.dims.heads], (Kind::BFloat16, device));
        let small = |x: &Tensor, w: &Tensor| match fused {
            true => linear(kernels, x, w),
            false => x.linear::<&Tensor>(w, None),
        };
        // As `tp-model` decides.
        let fits = |w: &Tensor| {
            fused
                && !wgmma(kernels, rows as usize, w)
                && rows as usize <= kernels.fused_rows(w.size()[0] as usize, w.size()[1] as usize)
        };
        let fuse = |x: Option<&Tensor>, residual: &mut Tensor, norm, w| {
            let (y, sum) = kernels
                .add_norm_linear(residual, x, norm, EPS, w, None)
                .expect("fits");
            *residual = sum;
            y
        };
        let apart = |x: Option<&Tensor>, residual: &mut Tensor, norm: &Tensor| match x {
            Some(x) => kernels.add_rms_norm(residual, x, norm, EPS).expect("fits"),
            None => kernels.rms_norm(residual, norm, EPS).expect("fits"),
        };
        // The residual's addition in the product before, the norm in the one after.
        let adding =
            |x: &Tensor, w: &Tensor, residual: &mut Tensor, norm, next: Option<&Tensor>| {
                let (n, k) = (w.size()[0] as usize, w.size()[1] as usize);
                let defers = fused
                    && next.is_some_and(|next| wgmma(kernels, rows as usize, next))
                    && kernels.prefers_wgmma_add(rows as usize, n, k);
                match defers {
                    true => Pending::Deferred(
                        kernels
                            .linear_wgmma_add(x, w, None, residual, norm, EPS)
                            .expect("fits"),
                    ),
                    false => Pending::Add(Some(small(x, w))),
                }
            };
        let mut residual = input.copy();
        let mut x = Pending::Add(None);
        for (i, layer) in self.layers.iter().enumerate() {
            let [norm1, norm2] = &layer.norms;
            let qkv = match &x {
                Pending::Deferred(x) => {
                    let y = kernels.linear_wgmma_deferred(x, &layer.qkv, None);
                    y.expect("fits")
                }
                Pending::Add(x) if fits(&layer.qkv) => {
                    fuse(x.as_ref(), &mut residual, norm1, &layer.qkv)
                }
                Pending::Add(x) => small(&apart(x.as_ref(), &mut residual, norm1), &layer.qkv),
            };
            let attended = attention(&qkv, &heads);
            let w = &layer.gate_up;
            let gated = match adding(&attended, &layer.o, &mut residual, norm2, Some(w)) {
                Pending::Deferred(o) => kernels.linear_wgmma_gated_deferred(&o, w),
                Pending::Add(o) if fits(w) => kernels
                    .add_norm_gated(&residual, o.as_ref(), norm2, EPS, w)
                    .map(|(y, sum)| {
                        residual = sum;
                        y
                    }),
                Pending::Add(o) => {
                    let normed = apart(o.as_ref(), &mut residual, norm2);
                    match fused && wgmma(kernels, rows as usize, w) {
                        true => kernels.linear_wgmma_gated(&normed, w),
                        false => kernels.silu_mul(&small(&normed, w)),
                    }
                }
            }
            .expect("fits");
            let next = self.layers.get(i + 1);
            let norm = next.map_or(&self.norm, |next| &next.norms[0]);
            let next = next.map(|next| &next.qkv);
            x = adding(&gated, &layer.down, &mut residual, norm, next);
        }
        let Pending::Add(Some(x)) = x else {
            unreachable!("nothing is behind the last layer");
        };
        if fits(&self.head) {
            let (logits, _) = kernels
                .add_norm_linear(&residual, Some(&x), &self.norm, EPS, &self.head, None)
                .expect("fits");
            return logits;
        }
        let normed = kernels
            .add_rms_norm(&mut residual, &x, &self.norm, EPS)
            .expect("fits");
        small(&normed, &self.head)
    }
}

/// What a product gets that stands behind a norm.
enum Pending {
    Add(Option<Tensor>),
    Deferred(DeferredNorm),
}

/// Whether the kernel for some rows is the one to take.
fn wgmma(kernels: &Kernels, rows: usize, w: &Tensor) -> bool {
    let (n, k) = (w.size()[0] as usize, w.size()[1] as usize);
    kernels.prefers_wgmma(rows, n, k)
}

/// Our kernel, or cuBLAS where that is faster.
fn linear(kernels: &Kernels, x: &Tensor, w: &Tensor) -> Tensor {
    let (n, k) = (w.size()[0] as usize, w.size()[1] as usize);
    if wgmma(kernels, x.size()[0] as usize, w) {
        return kernels.linear_wgmma(x, w, None).expect("fits");
    }
    match x.size()[0] as usize <= kernels.linear_small_rows(n, k) {
        true => kernels.linear_small(x, w, None).expect("fits"),
        false => x.linear::<&Tensor>(w, None),
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut rows: Vec<i64> = std::env::args()
        .skip(1)
        .map(|a| a.parse())
        .collect::<Result<_, _>>()?;
    if rows.is_empty() {
        rows = vec![1, 2, 4, 8, 16, 32, 64, 128];
    }
    let kernels = Kernels::new(0)?;
    Stream::new(0)?.make_current()?;
    let device = kernels.device();
    let (from, mut to) = (
        Tensor::zeros([1 << 30], (Kind::Uint8, device)),
        Tensor::zeros([1 << 30], (Kind::Uint8, device)),
    );
    let copy = time(ROUNDS, || to.shallow_clone().copy_(&from))?;
    let _ = to.zero_();
    println!(
        "copy: {:.0} GB/s, read and written\n",
        2.0 * (1u64 << 30) as f64 / copy / 1e3
    );
    drop((from, to));
    println!("model  rows |  products: cuBLAS          ours |      step: cuBLAS          ours");
    for dims in MODELS {
        let model = Model::new(dims, device);
        let gb = |us: f64| format!("{us:8.1} us {:4.0}", model.bytes() / us / 1e3);
        for m in &rows {
            let d = &model.dims;
            let inputs = [d.hidden, d.heads, d.intermediate]
                .map(|k| Tensor::randn([*m, k], (Kind::BFloat16, device)));
            let cublas = time(ROUNDS, || {
                model.products(&inputs, |x, w| x.linear::<&Tensor>(w, None))
            })?;
            let step = time(ROUNDS, || model.step(&kernels, &inputs[0], false))?;
            print!("{:5} {m:5} | {}", d.name, gb(cublas));
            let ours = time(ROUNDS, || {
                model.products(&inputs, |x, w| linear(&kernels, x, w))
            })?;
            let fused = time(ROUNDS, || model.step(&kernels, &inputs[0], true))?;
            println!(" {} | {} {}", gb(ours), gb(step), gb(fused));
        }
    }
    Ok(())
}
