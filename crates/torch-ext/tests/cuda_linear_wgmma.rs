//! Products of up to 512 rows on warpgroup instructions, against float64.
#![cfg(feature = "cuda")]

mod products;

use rand::{Rng, SeedableRng, rngs::StdRng};
use tch::{Device, Kind, Tensor};
use torch_ext::cuda::{Graph, GraphPool, Stream, synchronize};

use products::{EPS, close, distance, gated, kernels, product, random, rounding, whole, wide};

const MOST: usize = 512;

#[test]
fn every_number_of_rows() {
    let Some(kernels) = kernels() else { return };
    for kind in [Kind::BFloat16, Kind::Half] {
        let (n, k) = (200, 328);
        let w = whole(&kernels, &[n, k], kind);
        for m in 1..=MOST {
            let x = whole(&kernels, &[m, k], kind);
            let want = product(&x, &w, None);
            let got = kernels.linear_wgmma(&x, &w, None).unwrap();
            assert!(got.equal(&want.to_kind(kind)), "{m} rows, {kind:?}");
        }
        let x = whole(&kernels, &[MOST + 1, k], kind);
        assert!(kernels.linear_wgmma(&x, &w, None).is_err());
    }
}

#[test]
fn shapes_of_models_and_odd_ones() {
    let Some(kernels) = kernels() else { return };
    let mut rng = StdRng::seed_from_u64(5);
    let shapes = [
        (1, 8),
        (17, 72),
        (1000, 1000),
        (264, 14_336),
        (40_008, 200),
        (4096, 1024),
        (1024, 2048),
        (1024, 3072),
        (6144, 4096),
        (4096, 4096),
        (4096, 14_336),
        (28_672, 4096),
        (151_936, 1024),
    ];
    for (n, k) in shapes {
        let kind = if n % 3 == 0 {
            Kind::Half
        } else {
            Kind::BFloat16
        };
        let w = random(&kernels, &[n, k], kind, (k as f64).powf(-0.5));
        for m in [
            1,
            8,
            rng.random_range(2..32),
            32,
            rng.random_range(33..64),
            64,
            rng.random_range(65..128),
            rng.random_range(129..160),
            rng.random_range(161..192),
            rng.random_range(193..224),
            rng.random_range(225..256),
            rng.random_range(257..512),
            MOST,
        ] {
            let x = random(&kernels, &[m, k], kind, 1.0);
            let bias = (m % 2 == 1).then(|| random(&kernels, &[n], kind, 1.0));
            let want = product(&x, &w, bias.as_ref());
            let what = format!("{m} x {k} x {n} {kind:?}");
            let got = kernels.linear_wgmma(&x, &w, bias.as_ref()).unwrap();
            close(&got, &want, kind, &what);
            // Timing decides nothing.
            let again = kernels.linear_wgmma(&x, &w, bias.as_ref()).unwrap();
            assert!(got.equal(&again), "{what}: not the same twice");
            if n % 16 == 0 {
                let want = gated(&product(&x, &w, None), kind);
                let got = kernels.linear_wgmma_gated(&x, &w).unwrap();
                // Two more roundings than in a plain product.
                close(&(got / 2), &(want / 2), kind, &format!("gated {what}"));
            }
        }
    }
}

/// Every way to divide the work gives the same exact sums.
#[test]
fn all_plans() {
    let Some(kernels) = kernels() else { return };
    let kind = Kind::BFloat16;
    for (m, n, k, gate) in [
        (3, 1000, 1064, false),
        (21, 1000, 1064, false),
        (100, 1216, 648, false),
        (50, 1232, 1032, true),
        (140, 1232, 1032, true),
        (150, 1000, 648, false),
        (233, 1216, 1064, false),
        (300, 1216, 648, false),
    ] {
        let w = whole(&kernels, &[n, k], kind);
        let x = whole(&kernels, &[m, k], kind);
        let bias = whole(&kernels, &[n], kind);
        let bias = (!gate).then_some(&bias);
        let sums = product(&x, &w, bias);
        let plans = kernels.linear_wgmma_plans(m, n, k, gate);
        assert!(plans.len() > 10);
        for plan in plans {
            let got = kernels.linear_wgmma_by(plan, &x, &w, bias, gate).unwrap();
            let what = format!("{m} x {k} x {n} {plan:?}");
            match gate {
                // silu in float32 against float64.
                true => close(&(got / 2), &(gated(&sums, kind) / 2), kind, &what),
                false => assert!(got.equal(&sums.to_kind(kind)), "{what}"),
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_the_others() {
    let Some(kernels) = kernels() else { return };
    let kind = Kind::BFloat16;
    for (n, k) in [(1024, 2048), (6144, 1024), (4096, 4096)] {
        let w = random(&kernels, &[n, k], kind, 0.05);
        for m in [8, 32, 64, 128, 160] {
            let x = random(&kernels, &[m, k], kind, 1.0);
            let all = kernels.linear_wgmma(&x, &w, None).unwrap();
            // Others that could spoil everything they touch.
            let mut mates = Tensor::full([m as i64, k as i64], f64::NAN, (kind, kernels.device()));
            mates.narrow(0, 5, 3).copy_(&x.narrow(0, 5, 3));
            let some = kernels.linear_wgmma(&mates, &w, None).unwrap();
            assert!(some.narrow(0, 5, 3).equal(&all.narrow(0, 5, 3)));
            mates = x.flip([0]).contiguous();
            let turned = kernels.linear_wgmma(&mates, &w, None).unwrap();
            assert!(turned.flip([0]).equal(&all));
        }
    }
}

/// A residual addition and an RMS norm, half in the product before and half in the one after.
#[test]
fn a_norm_between_two_products() {
    let Some(kernels) = kernels() else { return };
    let mut rng = StdRng::seed_from_u64(11);
    for (n, k, next) in [
        (64, 72, 40),
        (200, 328, 104),
        (1024, 3072, 4096),
        (1000, 2048, 320),
        (4096, 4096, 6144),
        (5120, 2560, 1000),
        (8192, 1024, 512),
    ] {
        let kind = if n == 200 { Kind::Half } else { Kind::BFloat16 };
        let w = random(&kernels, &[n, k], kind, (k as f64).powf(-0.5));
        let after = random(&kernels, &[2 * next, n], kind, (n as f64).powf(-0.5));
        let gain = random(&kernels, &[n], kind, 1.0);
        for m in [
            1,
            8,
            rng.random_range(2..32),
            32,
            rng.random_range(33..64),
            64,
            rng.random_range(65..128),
            128,
        ] {
            let what = format!("{m} x {k} x {n} x {next} {kind:?}");
            let x = random(&kernels, &[m, k], kind, 1.0);
            let bias = (m % 2 == 1).then(|| random(&kernels, &[n], kind, 1.0));
            let bias = bias.as_ref();
            let before = random(&kernels, &[m, n], kind, 3.0);
            let run = || {
                let mut residual = before.copy();
                let norm = kernels
                    .linear_wgmma_add(&x, &w, bias, &mut residual, &gain, EPS)
                    .unwrap();
                let plain = kernels.linear_wgmma_deferred(&norm, &after, None).unwrap();
                let gated = kernels.linear_wgmma_gated_deferred(&norm, &after).unwrap();
                (residual, norm.finish(), plain, gated)
            };
            let (residual, norm, plain, pair) = run();
            // The sum is what the kernels apart make of it, to the bit.
            let y = kernels.linear_wgmma(&x, &w, bias).unwrap();
            let mut sum = before.copy();
            let _ = kernels.add_rms_norm(&mut sum, &y, &gain, EPS).unwrap();
            assert!(residual.equal(&sum), "{what}: residual");
            let sum = wide(&sum);
            let mean_square = sum.square().mean_dim(-1, true, Kind::Double);
            let want = &sum * wide(&gain) / (mean_square + EPS).sqrt();
            close(&norm, &want, kind, &format!("norm {what}"));
            let products = product(&want, &after, None);
            close(&plain, &products, kind, &format!("product {what}"));
            let want = gated(&products, kind);
            // Five roundings where a plain product has two: of few outputs they may make up twice as much.
            let off = distance(&pair, &want);
            assert!(off <= 3.0 * rounding(kind), "gated {what}: {off:.2e} away");
            let again = run();
            assert!(
                plain.equal(&again.2) && pair.equal(&again.3),
                "{what}: not the same twice"
            );
        }
        // A row's result does not depend on the others, not even on NaN.
        let x = random(&kernels, &[100, k], kind, 1.0);
        let before = random(&kernels, &[100, n], kind, 3.0);
        let run = |x: &Tensor| {
            let norm = kernels
                .linear_wgmma_add(x, &w, None, &mut before.copy(), &gain, EPS)
                .unwrap();
            kernels.linear_wgmma_deferred(&norm, &after, None).unwrap()
        };
        let mates = x.full_like(f64::NAN);
        mates.narrow(0, 5, 3).copy_(&x.narrow(0, 5, 3));
        let (all, some) = (run(&x).narrow(0, 5, 3), run(&mates).narrow(0, 5, 3));
        assert!(all.equal(&some), "{k} x {n}");
    }
}

/// Kernels of a chain start before the one before them has finished.
#[test]
fn a_chain_in_a_graph_keeps_its_order() {
    let Some(kernels) = kernels() else { return };
    Stream::new(0).unwrap().make_current().unwrap();
    let kind = Kind::BFloat16;
    const LAYERS: usize = 12;
    for m in [2, 17, 33, 60, 100, 128] {
        let (k, n) = (512, 1536);
        let norm = random(&kernels, &[k], kind, 1.0);
        let up: Vec<Tensor> = (0..LAYERS)
            .map(|_| random(&kernels, &[2 * n, k], kind, 0.06))
            .collect();
        let down: Vec<Tensor> = (0..LAYERS)
            .map(|_| random(&kernels, &[k, n], kind, 0.03))
            .collect();
        let mut input = random(&kernels, &[m, k], kind, 1.0);
        let fused = || {
            let mut residual = input.copy();
            let mut x = kernels.rms_norm(&residual, &norm, EPS).unwrap();
            for (up, down) in up.iter().zip(&down) {
                let y = kernels.linear_wgmma_gated(&x, up).unwrap();
                let y = kernels.linear_wgmma(&y, down, None).unwrap();
                x = kernels.add_rms_norm(&mut residual, &y, &norm, EPS).unwrap();
            }
            x
        };
        let plain = |input: &Tensor| {
            let mut residual = input.copy();
            let mut x = kernels.rms_norm(&residual, &norm, EPS).unwrap();
            for (up, down) in up.iter().zip(&down) {
                let y = gated(&x.linear::<&Tensor>(up, None), kind);
                let y = y.linear::<&Tensor>(down, None);
                x = kernels.add_rms_norm(&mut residual, &y, &norm, EPS).unwrap();
            }
            x
        };
        let deferred = || {
            let mut residual = input.copy();
            let x = kernels.rms_norm(&residual, &norm, EPS).unwrap();
            let mut y = kernels.linear_wgmma_gated(&x, &up[0]).unwrap();
            for (up, down) in up[1..].iter().zip(&down) {
                let x = kernels
                    .linear_wgmma_add(&y, down, None, &mut residual, &norm, EPS)
                    .unwrap();
                y = kernels.linear_wgmma_gated_deferred(&x, up).unwrap();
            }
            let y = kernels.linear_wgmma(&y, &down[LAYERS - 1], None).unwrap();
            kernels.add_rms_norm(&mut residual, &y, &norm, EPS).unwrap()
        };
        drop((fused(), deferred())); // compiles
        let pool = || GraphPool::new().unwrap();
        let (mut graph, out) = Graph::capture(pool(), fused).unwrap();
        let (mut deferred_graph, deferred_out) = Graph::capture(pool(), deferred).unwrap();
        for _ in 0..20 {
            input.copy_(&random(&kernels, &[m, k], kind, 1.0));
            graph.replay().unwrap();
            deferred_graph.replay().unwrap();
            synchronize(0).unwrap();
            let want = plain(&input);
            for (out, name) in [(&out, "norms apart"), (&deferred_out, "norms deferred")] {
                let error = distance(out, &want);
                assert!(error < 0.03, "{m} rows, {name}: {error:.2e} away");
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some(kernels) = kernels() else { return };
    let of = |shape: &[i64], kind| Tensor::zeros(shape, (kind, kernels.device()));
    let (b, h) = (Kind::BFloat16, Kind::Half);
    let w = of(&[32, 64], b);
    let x = of(&[20, 64], b);
    assert!(kernels.linear_wgmma(&of(&[20, 64], h), &w, None).is_err());
    assert!(kernels.linear_wgmma(&of(&[20, 72], b), &w, None).is_err());
    assert!(
        kernels
            .linear_wgmma(&of(&[MOST as i64 + 1, 64], b), &w, None)
            .is_err()
    );
    assert!(
        kernels
            .linear_wgmma(&x, &of(&[32, 64], Kind::Float), None)
            .is_err()
    );
    assert!(
        kernels
            .linear_wgmma(&x, &of(&[64, 32], b).tr(), None)
            .is_err()
    );
    assert!(kernels.linear_wgmma(&x, &w, Some(&of(&[31], b))).is_err());
    assert!(kernels.linear_wgmma_gated(&x, &of(&[40, 64], b)).is_err());
    let cpu = Tensor::zeros([20, 64], (b, Device::Cpu));
    assert!(kernels.linear_wgmma(&cpu, &w, None).is_err());
    let other = kernels.linear_wgmma_plans(20, 4096, 4096, false);
    for plan in other {
        // A plan of another problem is no plan of this one, unless it happens to be.
        if !kernels
            .linear_wgmma_plans(20, 32, 64, false)
            .contains(&plan)
        {
            assert!(kernels.linear_wgmma_by(plan, &x, &w, None, false).is_err());
        }
    }
    let empty = kernels.linear_wgmma(&of(&[0, 64], b), &w, None).unwrap();
    assert_eq!(empty.size(), [0, 32]);
}
