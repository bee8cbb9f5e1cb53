//! Long random runs against the model and the simulated buffers. Two tokens and few blocks make
//! prefixes collide, pools run full and cached blocks be evicted all the time.

mod common;

use common::world::{Setup, World};
use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::SmallRng;

fn long_run(block_size: u32, usable: usize) {
    let setup = Setup {
        block_size,
        usable,
        host_blocks: 8,
        window: None,
        prefix_caching: true,
        vocabulary: 2,
    };
    let mut world = World::new(setup, SmallRng::seed_from_u64(u64::from(block_size)));
    for _ in 0..100_000 {
        world.step();
    }
    // The run went where it was meant to go.
    assert!(world.refusals > 1000, "{} refusals", world.refusals);
    assert!(world.hits > 1000, "{} tokens hit", world.hits);
    assert!(
        block_size == 1 || world.copies > 1000,
        "{} copies",
        world.copies
    );
    assert!(world.swaps > 100, "{} swaps", world.swaps);
    world.finish();
}

#[test]
fn block_size_1() {
    long_run(1, 20);
}

#[test]
fn block_size_2() {
    long_run(2, 18);
}

#[test]
fn block_size_4() {
    long_run(4, 24);
}

#[test]
fn block_size_16() {
    long_run(16, 24);
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 300,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_setup(
        block_size in 1u32..9,
        usable in 1usize..40,
        host_blocks in 0u32..9,
        window in prop::option::of(1usize..20),
        prefix_caching: bool,
        vocabulary in 1u32..4,
        seed: u64,
        steps in 1usize..400,
    ) {
        let setup = Setup { block_size, usable, host_blocks, window, prefix_caching, vocabulary };
        let mut world = World::new(setup, SmallRng::seed_from_u64(seed));
        for _ in 0..steps {
            world.step();
        }
        world.finish();
    }
}
