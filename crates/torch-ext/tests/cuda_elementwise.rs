//! Norms, SiLU, block copies and embedding rows on the GPU, against the CPU.
#![cfg(feature = "cuda")]

use rand::{Rng, SeedableRng, rngs::StdRng};
use tch::{Device, Kind, Tensor};
use torch_ext::cuda::{self, Kernels};

const EPS: f64 = 1e-5;

fn kernels() -> Option<Kernels> {
    if !cuda::is_available() {
        println!("skipped: no CUDA device");
        return None;
    }
    Some(Kernels::new(0).unwrap())
}

fn random(shape: &[i64], kind: Kind, scale: f64) -> Tensor {
    (Tensor::randn(shape, (Kind::Float, Device::Cpu)) * scale).to_kind(kind)
}

/// Equal but for a few elements whose float32 value lies between two neighbours.
fn nearly_equal(got: &Tensor, want: &Tensor, what: &str) {
    let wide = |x: &Tensor| x.to_device(Device::Cpu).to_kind(Kind::Double);
    let (got, want) = (wide(got), wide(want));
    let step = 2f64.powi(-7);
    let far = (&got - &want).abs().le_tensor(&(want.abs() * step + 1e-6));
    assert!(bool::try_from(far.all()).unwrap(), "{what}: too far");
    let differ = got
        .not_equal_tensor(&want)
        .sum(Kind::Int64)
        .int64_value(&[]);
    assert!(
        differ <= 2 + want.numel() as i64 / 100,
        "{what}: {differ} of {} differ",
        want.numel()
    );
}

#[test]
fn norms() {
    let Some(kernels) = kernels() else { return };
    let on = |x: &Tensor| x.to_device(kernels.device());
    let reference = |x: &Tensor, weight: &Tensor| {
        let wide = x.to_kind(Kind::Float);
        let mean_square = wide.square().mean_dim(-1, true, Kind::Float);
        (wide * (mean_square + EPS).rsqrt()).to_kind(x.kind()) * weight
    };
    for kind in [Kind::BFloat16, Kind::Half] {
        for (tokens, width) in [
            (1, 8),
            (3, 128),
            (65, 576),
            (2, 1024),
            (7, 4096),
            (5, 9000),
            (2, 32_768),
        ] {
            let what = format!("{tokens} x {width} {kind:?}");
            let (x, residual) = (
                random(&[tokens, width], kind, 3.0),
                random(&[tokens, width], kind, 1.0),
            );
            let weight = random(&[width], kind, 1.0);
            let got = kernels.rms_norm(&on(&x), &on(&weight), EPS).unwrap();
            nearly_equal(&got, &reference(&x, &weight), &what);
            let sum = &residual + &x;
            let mut residual = on(&residual);
            let got = kernels
                .add_rms_norm(&mut residual, &on(&x), &on(&weight), EPS)
                .unwrap();
            nearly_equal(&got, &reference(&sum, &weight), &what);
            assert!(residual.to_device(Device::Cpu).equal(&sum), "{what}");
        }
    }
    let x = on(&random(&[2, 33], Kind::Half, 1.0));
    assert!(kernels.rms_norm(&x, &x.get(0), EPS).is_err());
}

#[test]
fn silu() {
    let Some(kernels) = kernels() else { return };
    for kind in [Kind::BFloat16, Kind::Half] {
        for (tokens, width) in [(1, 8), (7, 1544), (33, 3072), (130, 14_336)] {
            let x = random(&[tokens, 2 * width], kind, 4.0);
            let halves = x.chunk(2, -1);
            let gate = halves[0].to_kind(Kind::Float);
            let want = (&gate * gate.sigmoid()).to_kind(kind) * &halves[1];
            let got = kernels.silu_mul(&x.to_device(kernels.device())).unwrap();
            nearly_equal(&got, &want, &format!("{tokens} x {width} {kind:?}"));
        }
    }
    let x = Tensor::zeros([2, 24], (Kind::Half, kernels.device()));
    assert!(kernels.silu_mul(&x).is_err());
}

#[test]
fn block_copies() {
    let Some(kernels) = kernels() else { return };
    let mut rng = StdRng::seed_from_u64(5);
    for (blocks, heads, size, dim) in [(37, 2, 16, 80), (5, 1, 1, 8), (64, 8, 64, 128)] {
        let caches: Vec<Tensor> = (0..6)
            .map(|_| random(&[blocks, heads, size, dim], Kind::BFloat16, 1.0))
            .collect();
        let on: Vec<Tensor> = caches
            .iter()
            .map(|c| c.to_device(kernels.device()))
            .collect();
        let set = kernels.cache_set(&on).unwrap();
        // The lower half of the blocks is read, the upper half written, each at most once.
        let half = blocks / 2;
        let mut pairs = vec![-1, -1, blocks, 0, 0, blocks, i64::MIN, i64::MAX];
        let mut want = caches;
        for to in half..blocks {
            let from = rng.random_range(0..half);
            if rng.random() {
                pairs.extend([from, to]);
                for cache in &mut want {
                    let source = cache.get(from).copy();
                    cache.get(to).copy_(&source);
                }
            }
        }
        let pairs = Tensor::from_slice(&pairs)
            .view([-1, 2])
            .to_device(kernels.device());
        kernels.copy_blocks(&set, &pairs).unwrap();
        for (got, want) in on.iter().zip(&want) {
            assert!(got.to_device(Device::Cpu).equal(want));
        }
    }
    let odd = Tensor::zeros([4, 1, 1, 4], (Kind::Half, kernels.device()));
    assert!(kernels.cache_set([&odd]).is_err());
    let other = Tensor::zeros([5, 1, 1, 8], (Kind::Half, kernels.device()));
    let one = Tensor::zeros([4, 1, 1, 8], (Kind::Half, kernels.device()));
    assert!(kernels.cache_set([&one, &other]).is_err());
}

#[test]
fn embedding_rows() {
    let Some(kernels) = kernels() else { return };
    let mut rng = StdRng::seed_from_u64(6);
    for (kind, ids_kind) in [(Kind::BFloat16, Kind::Int), (Kind::Half, Kind::Int64)] {
        for (rows, width, tokens) in [(1, 8, 3), (1003, 136, 77), (500, 4096, 130)] {
            let table = random(&[rows, width], kind, 1.0);
            let mut ids: Vec<i64> = (0..tokens).map(|_| rng.random_range(0..rows)).collect();
            (ids[0], ids[1]) = (-3, rows + 7);
            let inside: Vec<i64> = ids.iter().map(|id| (*id).clamp(0, rows - 1)).collect();
            let want = table.index_select(0, &Tensor::from_slice(&inside));
            let on = |x: Tensor| x.to_device(kernels.device());
            let ids = on(Tensor::from_slice(&ids).to_kind(ids_kind));
            let got = kernels.gather_rows(&on(table), &ids).unwrap();
            assert!(got.to_device(Device::Cpu).equal(&want));
        }
    }
}
