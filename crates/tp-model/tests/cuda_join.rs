//! A group of GPUs whose other rank never comes, or stops taking part.
#![cfg(feature = "cuda")]

use std::sync::mpsc::channel;
use std::time::Duration;

use tch::{Device, Kind, Tensor};
use torch_ext::cuda::NcclId;
use tp_model::comm::{Collective, Health, Members, Nccl};

#[test]
fn a_rank_that_waits_in_vain_says_so() {
    if !torch_ext::cuda::is_available() {
        println!("skipped: no CUDA device");
        return;
    }
    let (health, timeout) = (Health::default(), Duration::from_secs(3));
    // Rank 0 of two, on the first GPU; nobody is rank 1.
    let id = NcclId::new().unwrap();
    let joined = Nccl::new(id, 0, Members::all(2), 0, timeout, &health);
    let error = joined.unwrap_err();
    println!("{error}");
    let what = "rank 0 of 2: waited 3 s for the GPUs of ranks [0, 1] to join a group";
    assert!(error.to_string().starts_with(what), "{error}");
    assert_eq!(health.failure(), Some(error));
}

#[test]
fn a_rank_that_waits_in_a_call_says_so() {
    if torch_ext::cuda::device_count() < 2 {
        println!("skipped: fewer than two CUDA devices");
        return;
    }
    let (health, timeout) = (Health::default(), Duration::from_secs(3));
    let group = Nccl::local_group(&[0, 1], &Members::all(2), timeout, &health);
    let mut group = group.unwrap();
    let (tell, told) = channel();
    health.on_failure(move |failure| tell.send(failure.to_string()).unwrap());
    let first = group.remove(0);
    // Rank 1 takes part in nothing. A stream that waits for it holds so many exchanges, and then the
    // call of the next one waits, too. The thread is left behind, as in a service that ends.
    std::thread::spawn(move || {
        let mut ones = Tensor::ones([8], (Kind::Float, Device::Cuda(0)));
        for _ in 0..100_000 {
            ones = first.all_reduce_sum(ones).unwrap();
        }
        panic!("the stream holds more than that");
    });
    let error = told.recv_timeout(timeout * 20).expect("a failure");
    println!("{error}");
    let what = "rank 0 of 2: waited 3 s in the driver for the GPUs of ranks [0, 1]";
    assert!(error.starts_with(what), "{error}");
    // To end it would be to wait for the other.
    std::mem::forget(group);
}
