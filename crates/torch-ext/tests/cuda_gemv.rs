//! Small-batch products and what is fused with them, against float64 on the CPU.
#![cfg(feature = "cuda")]

use rand::{Rng, SeedableRng, rngs::StdRng};
use tch::{Device, Kind, Tensor};
use torch_ext::cuda::{self, Graph, GraphPool, Kernels, Stream, synchronize};

const EPS: f64 = 1e-6;

fn kernels() -> Option<Kernels> {
    if !cuda::is_available() {
        println!("skipped: no CUDA device");
        return None;
    }
    Some(Kernels::new(0).unwrap())
}

fn random(shape: &[usize], kind: Kind, scale: f64) -> Tensor {
    let shape: Vec<i64> = shape.iter().map(|n| *n as i64).collect();
    (Tensor::randn(shape, (Kind::Float, Device::Cpu)) * scale).to_kind(kind)
}

fn wide(x: &Tensor) -> Tensor {
    x.to_device(Device::Cpu).to_kind(Kind::Double)
}

/// |got - want| / |want|
fn distance(got: &Tensor, want: &Tensor) -> f64 {
    let want = wide(want);
    ((wide(got) - &want).norm() / want.norm()).double_value(&[])
}

fn rounding(kind: Kind) -> f64 {
    match kind {
        Kind::BFloat16 => 2f64.powi(-8),
        _ => 2f64.powi(-11),
    }
}

/// As `tp-model` computes it on the CPU, rounding where it rounds.
fn rms_norm(x: &Tensor, weight: &Tensor) -> Tensor {
    let wide = x.to_kind(Kind::Float);
    let mean_square = wide.square().mean_dim(-1, true, Kind::Float);
    (wide * (mean_square + EPS).rsqrt()).to_kind(x.kind()) * weight
}

fn close(got: &Tensor, want: &Tensor, kind: Kind, what: &str) {
    let distance = distance(got, want);
    // NaN is not close.
    assert!(
        distance <= 1.5 * rounding(kind),
        "{what}: {distance:.2e} away"
    );
}

#[test]
fn products_of_few_rows() {
    let Some(kernels) = kernels() else { return };
    let on = |x: &Tensor| x.to_device(kernels.device());
    let mut rng = StdRng::seed_from_u64(3);
    for kind in [Kind::BFloat16, Kind::Half] {
        // Odd sizes, every number of groups, several blocks a thread block (with much of x and with little), long K.
        let shapes = [
            (1, 8),
            (17, 72),
            (1000, 1000),
            (4096, 1024),
            (40_000, 200),
            (9000, 4096),
            (264, 14_336),
        ];
        for (n, k) in shapes {
            let rows = kernels.linear_small_rows(n, k);
            assert!(rows >= 8);
            let mut counts = vec![1, rows, rng.random_range(1..=rows)];
            counts.extend([2, 3, 8, 9, 16, 17, 32].into_iter().filter(|m| *m <= rows));
            let w = random(&[n, k], kind, (k as f64).powf(-0.5));
            for m in counts {
                let x = random(&[m, k], kind, 1.0);
                let bias = (m % 2 == 1).then(|| random(&[n], kind, 1.0));
                let want = wide(&x).linear(&wide(&w), bias.as_ref().map(wide).as_ref());
                let got = kernels
                    .linear_small(&on(&x), &on(&w), bias.as_ref().map(on).as_ref())
                    .unwrap();
                close(&got, &want, kind, &format!("{m} x {k} x {n} {kind:?}"));
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_the_others() {
    let Some(kernels) = kernels() else { return };
    for (n, k) in [(1024, 2048), (6144, 1024), (304, 14_336)] {
        let rows = kernels.linear_small_rows(n, k);
        let x = random(&[rows, k], Kind::BFloat16, 1.0).to_device(kernels.device());
        let w = random(&[n, k], Kind::BFloat16, 0.05).to_device(kernels.device());
        let all = kernels.linear_small(&x, &w, None).unwrap();
        for m in [1, 2, 7, 9, 16, rows - 1].into_iter().filter(|m| *m < rows) {
            let first = x.narrow(0, (rows - m) as i64, m as i64).contiguous();
            let some = kernels.linear_small(&first, &w, None).unwrap();
            assert!(some.equal(&all.narrow(0, (rows - m) as i64, m as i64)));
        }
    }
}

#[test]
fn with_the_norm_before_and_the_activation_after() {
    let Some(kernels) = kernels() else { return };
    let on = |x: &Tensor| x.to_device(kernels.device());
    for kind in [Kind::BFloat16, Kind::Half] {
        for (n, k) in [(24, 72), (3072, 1024), (712, 1000), (1500, 4096)] {
            let rows = kernels.fused_rows(2 * n, k);
            for m in [1, 2, 3, 5, 8, 13, 32] {
                if m > rows {
                    continue;
                }
                let (residual, x) = (random(&[m, k], kind, 2.0), random(&[m, k], kind, 1.0));
                let norm = random(&[k], kind, 1.0);
                let w = random(&[2 * n, k], kind, (k as f64).powf(-0.5));
                for add in [true, false] {
                    let what = format!("{m} x {k} x {n} {kind:?}, add {add}");
                    let sum = if add { &residual + &x } else { residual.copy() };
                    let normed = rms_norm(&sum, &norm);
                    let product = wide(&normed).linear::<&Tensor>(&wide(&w), None);
                    let (r, g, w) = (on(&residual), on(&norm), on(&w));
                    let x = add.then(|| on(&x));
                    let (y, out) = kernels
                        .add_norm_linear(&r, x.as_ref(), &g, EPS, &w, None)
                        .unwrap();
                    close(&y, &product, kind, &what);
                    assert!(wide(&out).equal(&wide(&sum)), "{what}: the sum");
                    assert!(wide(&r).equal(&wide(&residual)), "{what}: the residual");
                    let halves = product.to_kind(kind).chunk(2, -1);
                    let gated = wide(&halves[0]).silu().to_kind(kind) * &halves[1];
                    let (y, out) = kernels.add_norm_gated(&r, x.as_ref(), &g, EPS, &w).unwrap();
                    // Two more roundings than in a plain product.
                    close(&(y / 2), &(gated / 2), kind, &format!("gated {what}"));
                    assert!(wide(&out).equal(&wide(&sum)), "gated {what}: the sum");
                }
            }
        }
    }
}

/// Kernels of a chain start before the one before them has finished.
#[test]
fn a_chain_in_a_graph_keeps_its_order() {
    let Some(kernels) = kernels() else { return };
    Stream::new(0).unwrap().make_current().unwrap();
    let on = |x: &Tensor| x.to_device(kernels.device());
    let kind = Kind::BFloat16;
    const LAYERS: usize = 12;
    for m in [1, 5, 16, 32] {
        let (k, n) = (512, 1536);
        if m > kernels
            .fused_rows(2 * n, k)
            .min(kernels.linear_small_rows(k, n))
        {
            continue;
        }
        let norm = on(&random(&[k], kind, 1.0));
        let up: Vec<Tensor> = (0..LAYERS)
            .map(|_| on(&random(&[2 * n, k], kind, 0.06)))
            .collect();
        let down: Vec<Tensor> = (0..LAYERS)
            .map(|_| on(&random(&[k, n], kind, 0.03)))
            .collect();
        let input = on(&random(&[m, k], kind, 1.0));
        let fused = || {
            let (mut residual, mut x) = (input.shallow_clone(), None);
            for (up, down) in up.iter().zip(&down) {
                let (y, sum) = kernels
                    .add_norm_gated(&residual, x.as_ref(), &norm, EPS, up)
                    .unwrap();
                residual = sum;
                x = Some(kernels.linear_small(&y, down, None).unwrap());
            }
            residual + x.unwrap()
        };
        let plain = || {
            let (mut residual, mut x) = (input.shallow_clone(), None::<Tensor>);
            for (up, down) in up.iter().zip(&down) {
                if let Some(x) = &x {
                    residual = &residual + x;
                }
                let y = rms_norm(&residual, &norm).linear::<&Tensor>(up, None);
                let halves = y.chunk(2, -1);
                x = Some((halves[0].silu() * &halves[1]).linear::<&Tensor>(down, None));
            }
            residual + x.unwrap()
        };
        let _ = fused(); // compiles
        let (mut graph, out) = Graph::capture(GraphPool::new().unwrap(), fused).unwrap();
        let mut input = input.shallow_clone();
        for _ in 0..20 {
            input.copy_(&random(&[m, k], kind, 1.0));
            graph.replay().unwrap();
            synchronize(0).unwrap();
            let error = distance(&out, &plain());
            assert!(error < 0.03, "{m} rows: {error:.2e} away");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some(kernels) = kernels() else { return };
    let of = |shape: &[i64], kind| Tensor::zeros(shape, (kind, kernels.device()));
    let (b, h) = (Kind::BFloat16, Kind::Half);
    let w = of(&[32, 64], b);
    assert!(kernels.linear_small(&of(&[1, 64], h), &w, None).is_err());
    assert!(kernels.linear_small(&of(&[1, 72], b), &w, None).is_err());
    assert!(kernels.linear_small(&of(&[1000, 64], b), &w, None).is_err());
    let bias = of(&[31], b);
    let one = of(&[1, 64], b);
    assert!(kernels.linear_small(&one, &w, Some(&bias)).is_err());
    assert!(
        kernels
            .linear_small(&one, &of(&[32, 64], Kind::Float), None)
            .is_err()
    );
    assert!(
        kernels
            .linear_small(&one, &of(&[64, 32], b).tr(), None)
            .is_err()
    );
    let cpu = Tensor::zeros([1, 64], (b, Device::Cpu));
    assert!(kernels.linear_small(&cpu, &w, None).is_err());
    let shifted = of(&[65], b).narrow(0, 1, 64).view([1, 64]);
    assert!(kernels.linear_small(&shifted, &w, None).is_err());
    let empty = kernels.linear_small(&of(&[0, 64], b), &w, None).unwrap();
    assert_eq!(empty.size(), [0, 32]);
    let odd = of(&[33, 64], b);
    let norm = of(&[64], b);
    assert!(
        kernels
            .add_norm_gated(&one, None, &norm, EPS, &odd)
            .is_err()
    );
    assert_eq!(kernels.linear_small_rows(32, 63), 0);
}
