//! The product with the SiLU of a gate in its end, against float64.
#![cfg(feature = "cuda")]

mod products;

use rand::{Rng, SeedableRng, rngs::StdRng};
use tch::{Device, Kind, Tensor};
use torch_ext::cuda::{Graph, GraphPool, Stream, synchronize};

use products::{EPS, close, distance, gated, kernels, product, random, whole};

/// Every tile, cluster and edge has its place: the products of small whole numbers are exact, so each result is known to
/// within its roundings.
#[test]
fn each_result_of_odd_shapes() {
    let Some(kernels) = kernels() else { return };
    let mut rng = StdRng::seed_from_u64(3);
    for kind in [Kind::BFloat16, Kind::Half] {
        for i in 0..40 {
            let m = match i {
                0 => 1,
                _ => rng.random_range(1..3000),
            };
            let n = 16 * rng.random_range(1..150);
            let k = 8 * rng.random_range(1..80);
            let what = format!("{m} x {k} x {n} {kind:?}");
            let (x, w) = (
                whole(&kernels, &[m, k], kind),
                whole(&kernels, &[n, k], kind) / 4,
            );
            let want = gated(&product(&x, &w, None), kind).to_kind(Kind::Double);
            let got = kernels.gated_product(&x, &w).unwrap();
            assert_eq!(got.size(), want.size(), "{what}");
            let off = (got.to_kind(Kind::Double) - &want).abs() - want.abs() / 64 - 1e-6;
            // NaN is too far off as well.
            let within = off.le(0.0).all().int64_value(&[]) == 1;
            assert!(within, "{what}: off by {:.2e}", off.max().double_value(&[]));
        }
    }
}

#[test]
fn shapes_of_models() {
    let Some(kernels) = kernels() else { return };
    let mut rng = StdRng::seed_from_u64(5);
    for (n, k) in [(6144, 1024), (28_672, 4096), (7168, 4096)] {
        let kind = if n == 7168 {
            Kind::Half
        } else {
            Kind::BFloat16
        };
        let w = random(&kernels, &[n, k], kind, (k as f64).powf(-0.5));
        for m in [129, rng.random_range(200..1000), 4099] {
            let x = random(&kernels, &[m, k], kind, 1.0);
            let what = format!("{m} x {k} x {n} {kind:?}");
            let want = gated(&product(&x, &w, None), kind);
            let got = kernels.gated_product(&x, &w).unwrap();
            // Two more roundings than in a plain product.
            close(&(&got / 2), &(want / 2), kind, &what);
            // Timing decides nothing.
            let again = kernels.gated_product(&x, &w).unwrap();
            assert!(got.equal(&again), "{what}: not the same twice");
            // A row's result does not depend on the others, not even on NaN.
            let mates = x.full_like(f64::NAN);
            mates.narrow(0, 125, 4).copy_(&x.narrow(0, 125, 4));
            let some = kernels.gated_product(&mates, &w).unwrap();
            assert!(
                some.narrow(0, 125, 4).equal(&got.narrow(0, 125, 4)),
                "{what}: mates"
            );
        }
    }
}

/// Kernels of a chain start before the one before them has finished.
#[test]
fn a_chain_in_a_graph_keeps_its_order() {
    let Some(kernels) = kernels() else { return };
    Stream::new(0).unwrap().make_current().unwrap();
    let kind = Kind::BFloat16;
    const LAYERS: usize = 8;
    let (m, k, n) = (1100, 512, 1536);
    let norm = random(&kernels, &[k], kind, 1.0);
    let up: Vec<Tensor> = (0..LAYERS)
        .map(|_| random(&kernels, &[2 * n, k], kind, 0.06))
        .collect();
    let down: Vec<Tensor> = (0..LAYERS)
        .map(|_| random(&kernels, &[k, n], kind, 0.03))
        .collect();
    let mut input = random(&kernels, &[m, k], kind, 1.0);
    let run = |input: &Tensor, one_kernel: bool| {
        let mut residual = input.copy();
        let mut x = kernels.rms_norm(&residual, &norm, EPS).unwrap();
        for (up, down) in up.iter().zip(&down) {
            let y = match one_kernel {
                true => kernels.gated_product(&x, up).unwrap(),
                false => gated(&x.linear::<&Tensor>(up, None), kind),
            };
            let y = y.linear::<&Tensor>(down, None);
            x = kernels.add_rms_norm(&mut residual, &y, &norm, EPS).unwrap();
        }
        x
    };
    drop(run(&input, true)); // compiles
    let pool = GraphPool::new().unwrap();
    let (mut graph, out) = Graph::capture(pool, || run(&input, true)).unwrap();
    for _ in 0..20 {
        input.copy_(&random(&kernels, &[m, k], kind, 1.0));
        graph.replay().unwrap();
        synchronize(0).unwrap();
        let error = distance(&out, &run(&input, false));
        assert!(error < 0.03, "{error:.2e} away");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some(kernels) = kernels() else { return };
    let of = |shape: &[i64], kind| Tensor::zeros(shape, (kind, kernels.device()));
    let (b, h) = (Kind::BFloat16, Kind::Half);
    let w = of(&[32, 64], b);
    assert!(kernels.gated_product(&of(&[20, 64], h), &w).is_err());
    assert!(kernels.gated_product(&of(&[20, 72], b), &w).is_err());
    let x = of(&[20, 64], b);
    assert!(kernels.gated_product(&x, &of(&[40, 64], b)).is_err());
    assert!(kernels.gated_product(&x, &of(&[64, 32], b).tr()).is_err());
    assert!(
        kernels
            .gated_product(&of(&[20, 60], b), &of(&[32, 60], b))
            .is_err()
    );
    let cpu = Tensor::zeros([20, 64], (b, Device::Cpu));
    assert!(kernels.gated_product(&cpu, &w).is_err());
    let empty = kernels.gated_product(&of(&[0, 64], b), &w).unwrap();
    assert_eq!(empty.size(), [0, 16]);
}
