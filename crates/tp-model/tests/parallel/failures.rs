//! A rank that is lost ends the group: on every rank, with its name, in time.

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use tch::Tensor;
use tp_model::comm::{Collective, CommError, Health, Threads};
use tp_model::distributed::World;
use tp_model::{Backend, DtypeChoice, LoadOptions, ParallelConfig};

use super::exchange::{TIMEOUT, on_worlds};
use super::shares::fixture;

fn ones() -> Tensor {
    Tensor::from_slice(&[1f32; 8])
}

#[test]
fn a_thread_that_hangs_is_named() {
    let timeout = Duration::from_millis(300);
    let health = Health::default();
    let mut group = Threads::group(3, timeout, &health);
    let hangs = group.remove(1);
    let start = Instant::now();
    let errors: Vec<CommError> = thread::scope(|scope| {
        let start = |comm: Threads| scope.spawn(move || comm.all_reduce_sum(ones()).unwrap_err());
        let threads: Vec<_> = group.into_iter().map(start).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(start.elapsed() < timeout * 3);
    for error in errors {
        assert_eq!(error.to_string(), "rank 1 of 3: sent nothing for 0.3 s");
    }
    assert_eq!(health.failure().unwrap().rank, 1);
    // Too late.
    assert_eq!(hangs.recv(&ones(), 0).unwrap_err().rank, 1);
}

#[test]
fn a_thread_that_fails_wakes_those_that_wait() {
    let health = Health::default();
    let mut group = Threads::group(2, TIMEOUT, &health);
    let waits = group.remove(0);
    let waiter = thread::spawn(move || waits.all_gather(ones()).unwrap_err());
    thread::sleep(Duration::from_millis(50));
    let start = Instant::now();
    health.fail(CommError {
        rank: 1,
        world_size: 2,
        what: "a reason".to_owned(),
    });
    assert_eq!(waiter.join().unwrap().to_string(), "rank 1 of 2: a reason");
    assert!(start.elapsed() < Duration::from_secs(1));
}

/// The first failure that each rank hears of when `doomed` does `this` while the others wait.
fn failures(timeout: Duration, size: usize, doomed: usize, this: fn(World)) -> Vec<CommError> {
    let start = Instant::now();
    let all_connected = Barrier::new(size);
    let heard = on_worlds(size, timeout, |world| {
        let comm = world.collective().unwrap();
        let _ = comm.all_reduce_sum(ones()).unwrap();
        // One rank may have the sum before another has.
        all_connected.wait();
        if world.rank() == doomed {
            drop(comm);
            let health = world.health().clone();
            this(world);
            return health.failure();
        }
        let error = comm.all_reduce_sum(ones()).unwrap_err();
        assert_eq!(world.health().failure(), Some(error.clone()));
        Some(error)
    });
    assert!(start.elapsed() < timeout * 2, "{:?}", start.elapsed());
    heard.into_iter().flatten().collect()
}

#[test]
fn a_process_that_fails_tells_all_others_why() {
    for doomed in 0..3 {
        let heard = failures(TIMEOUT, 3, doomed, |world| {
            world.fail("cannot go on".to_owned());
        });
        let expected = format!("rank {doomed} of 3: cannot go on");
        assert_eq!(heard.len(), 3);
        assert!(
            heard.iter().all(|error| error.to_string() == expected),
            "{heard:?}"
        );
    }
}

#[test]
fn a_process_that_hangs_is_named() {
    // Its monitor lives on, so the exchange itself must notice.
    for doomed in 0..2 {
        let heard = failures(Duration::from_millis(400), 2, doomed, |_world| {
            thread::sleep(Duration::from_millis(600));
        });
        let expected = format!("rank {doomed} of 2: sent nothing for 0.4 s");
        assert!(!heard.is_empty());
        assert!(
            heard.iter().all(|error| error.to_string() == expected),
            "{heard:?}"
        );
    }
}

#[test]
fn what_differs_between_ranks_is_named() {
    let agree = |name: fn(usize) -> &'static str, dtype: fn(usize) -> DtypeChoice| {
        on_worlds(3, TIMEOUT, |world| {
            let options = LoadOptions {
                dtype: dtype(world.rank()),
                backend: Backend::Cpu,
                ..LoadOptions::default()
            };
            let result = world.agree(
                &fixture(name(world.rank())),
                &options,
                &ParallelConfig::tensor(3),
            );
            // All have heard before any leaves.
            thread::sleep(Duration::from_millis(100));
            world.health().close();
            result.map_err(|error| error.to_string())
        })
    };
    let float32 = |_| DtypeChoice::Float32;
    assert!(agree(|_| "llama3-gqa4", float32).iter().all(Result::is_ok));
    let other = |rank| {
        if rank == 2 {
            "llama-yarn"
        } else {
            "llama3-gqa4"
        }
    };
    let differs = "rank 2 of 3: was started with another model";
    let results = agree(other, float32);
    let told = results.iter().filter_map(|r| r.as_ref().err());
    assert!(told.clone().count() >= 2, "{results:?}");
    assert!(
        told.clone().all(|error| error.starts_with(differs)),
        "{results:?}"
    );
    let results = agree(
        |_| "llama3-gqa4",
        |rank| match rank {
            1 => DtypeChoice::Bfloat16,
            _ => DtypeChoice::Float32,
        },
    );
    let differs = "rank 1 of 3: was started with another dtype (Bfloat16) than rank 0 (Float32)";
    assert!(
        results[0].as_ref().is_err_and(|error| error == differs),
        "{results:?}"
    );
}
