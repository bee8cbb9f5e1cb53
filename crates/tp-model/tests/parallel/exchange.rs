//! Collectives against plain arithmetic, on threads and on connected processes (which are threads
//! here, too: they share nothing but the connections).

use std::net::TcpListener;
use std::thread;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tch::{Device, Kind, Tensor};
use tp_model::comm::{Collective, Health, Threads};
use tp_model::distributed::{Launcher, World};

pub const TIMEOUT: Duration = Duration::from_secs(10);
pub const SECRET: &str = "a secret of these tests";

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    listener.local_addr().unwrap().port()
}

/// Runs `rank` on a thread for each rank of a group of connected processes.
pub fn on_worlds<T: Send>(
    size: usize,
    timeout: Duration,
    rank: impl Fn(World) -> T + Sync,
) -> Vec<T> {
    let port = free_port();
    thread::scope(|scope| {
        let rank = &rank;
        let start = |at| {
            scope.spawn(move || {
                let launcher = Launcher::new(at, size, "127.0.0.1", port, SECRET);
                rank(World::connect(&launcher, timeout).unwrap())
            })
        };
        let threads: Vec<_> = (0..size).map(start).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

fn on_threads<T: Send>(size: usize, rank: impl Fn(Threads) -> T + Sync) -> Vec<T> {
    let group = Threads::group(size, TIMEOUT, &Health::default());
    thread::scope(|scope| {
        let rank = &rank;
        let start = |comm| scope.spawn(move || rank(comm));
        let threads: Vec<_> = group.into_iter().map(start).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

/// What rank `rank` brings to exchange `round`.
fn input(round: u64, rank: usize, shape: [i64; 2], kind: Kind) -> Tensor {
    let mut rng = StdRng::seed_from_u64(round * 97 + rank as u64);
    let values: Vec<f32> = (0..shape[0] * shape[1])
        .map(|_| rng.random_range(-1.0f32..1.0) * 10f32.powi(rng.random_range(-3..4)))
        .collect();
    Tensor::from_slice(&values).view(shape).to_kind(kind)
}

/// Many exchanges of random sizes, some larger than the buffers of a connection.
fn exchanges(comm: &dyn Collective) {
    let (rank, size) = (comm.rank(), comm.world_size());
    let mut rng = StdRng::seed_from_u64(1);
    for round in 0..60 {
        let large = if round % 20 == 7 { 900 } else { 17 };
        let shape = [rng.random_range(1..large), rng.random_range(1..large)];
        let kind = [Kind::Float, Kind::BFloat16, Kind::Half][rng.random_range(0..3)];
        let all: Vec<Tensor> = (0..size).map(|r| input(round, r, shape, kind)).collect();
        let mine = all[rank].copy();
        let root = rng.random_range(0..size);
        let peer = (rank + 1) % size;
        match rng.random_range(0..5) {
            0 | 1 => {
                let mut sum = &all[0] + &all[1];
                for one in &all[2..] {
                    sum += one;
                }
                let mut got = comm.all_reduce_sum(mine).unwrap();
                // To the bit: the order of the sum is fixed.
                assert!(got.equal(&sum), "sum of {shape:?} in round {round}");
                // And nobody else's.
                let _ = got.g_add_scalar_(1.0);
            }
            2 => {
                let got = comm.all_gather(mine).unwrap();
                assert!(got.equal(&Tensor::cat(&all, -1)));
            }
            3 => {
                let got = comm.gather(mine.shallow_clone(), root).unwrap();
                assert_eq!(got.is_some(), rank == root);
                if let Some(got) = got {
                    assert!(got.equal(&Tensor::cat(&all, -1)));
                }
                assert!(comm.broadcast(mine, root).unwrap().equal(&all[root]));
            }
            _ => {
                // A ring: one end begins.
                let from = (rank + size - 1) % size;
                let like = Tensor::empty(shape, (kind, Device::Cpu));
                if rank == 0 {
                    comm.send(&mine, peer).unwrap();
                    assert!(comm.recv(&like, from).unwrap().equal(&all[from]));
                } else {
                    assert!(comm.recv(&like, from).unwrap().equal(&all[from]));
                    comm.send(&mine, peer).unwrap();
                }
            }
        }
    }
    assert!(comm.send(&Tensor::from(1.0f32), size).is_err());
    assert!(comm.send(&Tensor::from(1.0f32), rank).is_err());
}

#[test]
fn threads_exchange() {
    for size in [2, 3, 4, 7] {
        on_threads(size, |comm| exchanges(&comm));
    }
}

#[test]
fn connected_processes_exchange() {
    for size in [2, 3, 4] {
        on_worlds(size, TIMEOUT, |world| {
            exchanges(&world.collective().unwrap());
            // Nobody leaves while others still read.
            let _ = world
                .collective()
                .unwrap()
                .all_gather(Tensor::from_slice(&[0f32]))
                .unwrap();
            world.finish(0);
            world.health().close();
        });
    }
}

#[test]
fn strangers_are_sent_away() {
    let port = free_port();
    thread::scope(|scope| {
        let start = |rank, secret: &'static str, timeout| {
            scope.spawn(move || {
                let launcher = Launcher::new(rank, 2, "127.0.0.1", port, secret);
                World::connect(&launcher, timeout).map(|_| ())
            })
        };
        let leader = start(0, SECRET, Duration::from_secs(2));
        let stranger = start(1, "not the secret of these", Duration::from_secs(2));
        let error = leader.join().unwrap().unwrap_err();
        assert_eq!(error.rank, 1);
        assert!(error.what.contains("did not connect within 2 s"), "{error}");
        let error = stranger.join().unwrap().unwrap_err();
        assert!(error.what.contains("same secret"), "{error}");
    });
}
