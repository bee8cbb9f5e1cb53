//! Any order of operations on a block manager, against the model and the simulated KV buffers of its
//! tests. The first bytes choose the sizes.
#![no_main]

mod bytes;
#[path = "../../crates/paged-kv/tests/common/mod.rs"]
mod common;

use bytes::Bytes;
use common::world::{Setup, World};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&[size, usable, host, window, rest], data)) = data.split_first_chunk() else {
        return;
    };
    let setup = Setup {
        block_size: u32::from(size % 8) + 1,
        usable: usize::from(usable % 40) + 1,
        host_blocks: u32::from(host % 9),
        window: (window % 40 >= 20).then_some(usize::from(window % 20) + 1),
        prefix_caching: rest % 8 > 0,
        vocabulary: u32::from(rest / 8 % 3) + 1,
    };
    let mut world = World::new(setup, Bytes::new(data));
    // An operation takes some four bytes.
    for _ in 0..data.len() / 4 {
        world.step();
    }
    world.finish();
});
