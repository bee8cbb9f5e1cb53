//! Any life of a scheduler, against a sequential run of its tests' model on simulated KV memory.
#![no_main]

mod bytes;
#[path = "../../crates/batch-scheduler/tests/common/mod.rs"]
mod common;

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    // An operation takes some six bytes.
    common::life::live(&mut Bytes::new(data), data.len() / 6);
});
