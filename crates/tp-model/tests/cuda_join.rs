//! A group of GPUs whose other rank never comes.
#![cfg(feature = "cuda")]

use std::time::Duration;

use torch_ext::cuda::NcclId;
use tp_model::comm::{Health, Members, Nccl};

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
