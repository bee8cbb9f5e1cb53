//! One-shot exchanges with all ranks on one GPU, each on a stream of its own, against float64.
//!
//! Best with `CUDA_DEVICE_MAX_CONNECTIONS=32`, so that no two streams share a queue of the device.
//! Nothing hangs otherwise: a rank that waits for more than [`PATIENCE`] gives up, and the test fails.
//! While a rank waits on the device, what synchronizes with it (memory that is freed, code that is
//! loaded) waits too, and may hold up the launch of the rank that is waited for. So one test runs at
//! a time, and each kernel is launched alone before it is launched behind others.
#![cfg(feature = "cuda")]

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rand::{Rng, SeedableRng, rngs::StdRng};
use tch::{Device, Kind, Tensor};
use torch_ext::cuda::{self, Graph, GraphPool, OneShot, Stream};

const GPU: Device = Device::Cuda(0);
const EPS: f64 = 1e-5;
const PATIENCE: Duration = Duration::from_secs(5);
const HALVES: [Kind; 2] = [Kind::BFloat16, Kind::Half];

/// Ranks and the stream of each, while no other test has the device.
struct Ranks(Vec<(OneShot, Stream)>, #[expect(dead_code)] Turn);

type Turn = MutexGuard<'static, ()>;

fn turn() -> Turn {
    static DEVICE: Mutex<()> = Mutex::new(());
    DEVICE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn ranks(count: usize) -> Option<Ranks> {
    if !cuda::is_available() {
        println!("skipped: no CUDA device");
        return None;
    }
    let turn = turn();
    let group = OneShot::group(&vec![0; count], PATIENCE).unwrap();
    let ranks = group
        .into_iter()
        .map(|rank| (rank, Stream::new(0).unwrap()));
    // All ranks have the device's kernels in common, so the first one's launch loads the code for
    // all, and nobody waits for a rank meanwhile.
    Some(Ranks(ranks.collect(), turn))
}

impl Ranks {
    /// The same for each rank, each on its stream; all of them are launched before any is awaited.
    fn each<T>(&self, mut work: impl FnMut(usize, &OneShot) -> T) -> Vec<T> {
        cuda::synchronize(0).unwrap();
        let launched = self.0.iter().enumerate().map(|(at, (rank, stream))| {
            stream.make_current().unwrap();
            work(at, rank)
        });
        let results = launched.collect();
        for (_, stream) in &self.0 {
            stream.make_current().unwrap();
            cuda::synchronize(0).unwrap();
        }
        assert_eq!(self.0[0].0.alarm().late(), None, "a rank was late");
        results
    }

    fn len(&self) -> usize {
        self.0.len()
    }
}

fn random(size: &[i64], kind: Kind) -> Tensor {
    (Tensor::randn(size, (Kind::Float, Device::Cpu)) * 2.0).to_kind(kind)
}

fn on(x: &Tensor) -> Tensor {
    x.to_device(GPU)
}

fn cpu(x: &Tensor) -> Tensor {
    x.to_device(Device::Cpu)
}

/// The sum in float32, in the order of ranks, rounded once.
fn sum(parts: &[Tensor]) -> Tensor {
    let wide = |x: &Tensor| x.to_kind(Kind::Float);
    let first = wide(&parts[0]);
    let sum = parts[1..].iter().fold(first, |sum, part| sum + wide(part));
    sum.to_kind(parts[0].kind())
}

/// Residual and norm as the model wants them, the norm in float64.
fn norm(parts: &[Tensor], residual: &Tensor, weight: &Tensor) -> (Tensor, Tensor) {
    let residual = residual + sum(parts);
    let wide = residual.to_kind(Kind::Double);
    let mean = wide.square().mean_dim(-1, true, Kind::Double);
    let normed = (wide * (mean + EPS).rsqrt()).to_kind(Kind::Double) * weight.to_kind(Kind::Double);
    (residual, normed)
}

#[track_caller]
fn close(got: &Tensor, want: &Tensor, kind: Kind, what: &str) {
    // Two roundings: of the normalized value, and of its product with the weight.
    let step = if kind == Kind::BFloat16 {
        2f64.powi(-7)
    } else {
        2f64.powi(-10)
    };
    let excess = (cpu(got).to_kind(Kind::Double) - want).abs() / (want.abs() * step + 1e-6);
    let worst = excess.max().double_value(&[]);
    assert!(worst <= 1.0, "{what}: {worst} of the bound");
}

#[test]
fn sums_are_exact_at_all_sizes() {
    for count in [2, 3, 4, 8] {
        let Some(ranks) = ranks(count) else { return };
        for kind in [Kind::BFloat16, Kind::Half, Kind::Float] {
            for n in [8, 16, 4096, 8 * 513, 8 * 16_385, 8 * 40_001, 1 << 21] {
                let parts: Vec<Tensor> = (0..ranks.len()).map(|_| random(&[n], kind)).collect();
                let there: Vec<Tensor> = parts.iter().map(on).collect();
                let want = sum(&parts);
                for got in ranks.each(|at, rank| rank.all_reduce_sum(&there[at]).unwrap()) {
                    assert!(cpu(&got).equal(&want), "{count} ranks, {n} {kind:?}");
                }
            }
        }
    }
}

#[test]
fn the_fused_norm_equals_float64_and_its_parts() {
    for count in [2, 4] {
        let Some(ranks) = ranks(count) else { return };
        for kind in HALVES {
            for (tokens, width) in [
                (1, 8),
                (3, 136),
                (33, 1024),
                (64, 4096),
                (5, 5120),
                (31, 8200),
                (2, 16_384),
                (257, 896),
            ] {
                let what = format!("{count} ranks, {tokens} x {width} {kind:?}");
                let size = [tokens, width];
                let parts: Vec<Tensor> = (0..count).map(|_| random(&size, kind)).collect();
                let (residual, weight) = (random(&size, kind), random(&[width], kind));
                let there: Vec<Tensor> = parts.iter().map(on).collect();
                let residuals: Vec<Tensor> = (0..count).map(|_| on(&residual)).collect();
                let gain = on(&weight);
                let got = ranks.each(|at, rank| {
                    let mut residual = residuals[at].shallow_clone();
                    rank.all_reduce_norm(&there[at], &mut residual, &gain, EPS)
                        .unwrap()
                });
                let (want_residual, want) = norm(&parts, &residual, &weight);
                for (got, residual) in got.iter().zip(&residuals) {
                    assert!(cpu(residual).equal(&want_residual), "{what}");
                    close(got, &want, kind, &what);
                }
                // All ranks have the same bits.
                assert!(
                    got.iter().all(|other| cpu(other).equal(&cpu(&got[0]))),
                    "{what}"
                );
            }
        }
        let (rank, _) = &ranks.0[0];
        let bad = on(&random(&[2, 12], Kind::Half));
        let mut residual = bad.copy();
        assert!(
            rank.all_reduce_norm(&bad, &mut residual, &bad.get(0), EPS)
                .is_err()
        );
        assert!(!OneShot::norms(12) && !OneShot::norms(16_392) && OneShot::norms(16_384));
    }
}

#[test]
fn exchanges_bring_every_byte() {
    for count in [2, 4] {
        let Some(ranks) = ranks(count) else { return };
        for (kind, size) in [
            (Kind::Int, &[1][..]),
            (Kind::Int, &[257]),
            (Kind::Half, &[3, 7]),
            (Kind::BFloat16, &[5, 75_969]),
            (Kind::Int64, &[1000]),
        ] {
            let parts: Vec<Tensor> = (0..count).map(|_| random(size, kind) * 100.0).collect();
            let parts: Vec<Tensor> = parts.iter().map(|x| x.to_kind(kind)).collect();
            let there: Vec<Tensor> = parts.iter().map(on).collect();
            let want = Tensor::stack(&parts, 0);
            for got in ranks.each(|at, rank| rank.all_gather(&there[at]).unwrap()) {
                assert!(cpu(&got).equal(&want), "{kind:?} {size:?}");
            }
            let root = count - 1;
            let got = ranks.each(|at, rank| rank.gather(&there[at], root).unwrap());
            for (at, got) in got.iter().enumerate() {
                assert_eq!(got.is_some(), at == root);
                assert!(got.as_ref().is_none_or(|got| cpu(got).equal(&want)));
            }
            for got in ranks.each(|at, rank| rank.broadcast(&there[at], root).unwrap()) {
                assert!(cpu(&got).equal(&parts[root]), "{kind:?} {size:?}");
            }
        }
        assert!(
            ranks.0[0]
                .0
                .broadcast(&on(&random(&[1], Kind::Int)), count)
                .is_err()
        );
    }
}

#[test]
fn graphs_replay_exchanges() {
    let mut rng = StdRng::seed_from_u64(3);
    for count in [2, 4] {
        let Some(ranks) = ranks(count) else { return };
        let kind = HALVES[count / 4];
        // A sum, a norm and a broadcast of different grids in a row, as in a step.
        let (tokens, width) = (17, 1024);
        let size = [tokens, width];
        let weight = random(&[width], kind);
        let gain = on(&weight);
        let mut inputs: Vec<Tensor> = (0..count).map(|_| on(&random(&size, kind))).collect();
        let mut residuals: Vec<Tensor> = (0..count).map(|_| on(&random(&size, kind))).collect();
        let record = |rank: &OneShot, x: &Tensor, residual: &Tensor| {
            let sum = rank.all_reduce_sum(x).unwrap();
            let mut residual = residual.shallow_clone();
            let normed = rank
                .all_reduce_norm(&sum, &mut residual, &gain, EPS)
                .unwrap();
            (rank.broadcast(&normed, count - 1).unwrap(), sum)
        };
        // Loads the code, one operation after the other.
        drop(ranks.each(|at, rank| rank.all_reduce_sum(&inputs[at]).unwrap()));
        drop(ranks.each(|at, rank| rank.broadcast(&inputs[at], 0).unwrap()));
        let mut spare: Vec<Tensor> = residuals.iter().map(Tensor::copy).collect();
        drop(ranks.each(|at, rank| {
            rank.all_reduce_norm(&inputs[at], &mut spare[at], &gain, EPS)
                .unwrap()
        }));
        drop(ranks.each(|at, rank| record(rank, &inputs[at], &residuals[at])));
        let mut graphs = Vec::new();
        for (at, (rank, stream)) in ranks.0.iter().enumerate() {
            stream.make_current().unwrap();
            let pool = GraphPool::new().unwrap();
            let captured = Graph::capture(pool, || record(rank, &inputs[at], &residuals[at]));
            graphs.push(captured.unwrap());
        }
        for turn in 0..200 {
            let parts: Vec<Tensor> = (0..count).map(|_| random(&size, kind)).collect();
            let residual = random(&size, kind);
            for at in 0..count {
                inputs[at].copy_(&parts[at]);
                residuals[at].copy_(&residual);
            }
            // Ranks come in another order each time, and eager exchanges between graphs.
            let first = rng.random_range(0..count);
            cuda::synchronize(0).unwrap();
            for at in (0..count).map(|at| (at + first) % count) {
                ranks.0[at].1.make_current().unwrap();
                graphs[at].0.replay().unwrap();
            }
            for (_, stream) in &ranks.0 {
                stream.make_current().unwrap();
                cuda::synchronize(0).unwrap();
            }
            let late = ranks.0[0].0.alarm().late();
            assert_eq!(late, None, "{count} ranks, turn {turn}: late in a replay");
            let eager = ranks.each(|at, rank| rank.all_reduce_sum(&graphs[at].1.1).unwrap());
            let once = sum(&parts);
            let sums: Vec<Tensor> = (0..count).map(|_| once.shallow_clone()).collect();
            let twice = sum(&sums);
            let (_, want) = norm(&sums, &residual, &weight);
            for (at, eager) in eager.iter().enumerate() {
                assert!(cpu(&graphs[at].1.1).equal(&once), "turn {turn}");
                assert!(cpu(eager).equal(&twice), "turn {turn}");
                close(&graphs[at].1.0, &want, kind, "replayed");
            }
        }
    }
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    if !cuda::is_available() {
        println!("skipped: no CUDA device");
        return;
    }
    let _turn = turn();
    let group = OneShot::group(&[0, 0], Duration::from_millis(200)).unwrap();
    Stream::new(0).unwrap().make_current().unwrap();
    let x = on(&random(&[64], Kind::Half));
    let alarm = group[0].alarm();
    assert_eq!(alarm.late(), None);
    let _ = group[0].all_reduce_sum(&x).unwrap();
    cuda::synchronize(0).unwrap();
    assert_eq!(alarm.late(), Some(1));
    // A rung alarm ends waiting at once, and blames nobody.
    let group = OneShot::group(&[0, 0], Duration::from_secs(60)).unwrap();
    let alarm = group[1].alarm();
    let _ = group[1].all_reduce_sum(&x).unwrap();
    alarm.ring();
    cuda::synchronize(0).unwrap();
    assert_eq!(alarm.late(), None);
}
