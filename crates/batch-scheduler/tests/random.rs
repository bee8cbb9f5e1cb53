//! Random operations on random configurations: every request must come to the tokens that a plain
//! sequential run gives, and nothing may leak, hang, or be written while a step reads it.

mod common;

use common::life::live;
use rand::SeedableRng;
use rand::rngs::StdRng;

#[test]
fn tokens_are_those_of_a_sequential_run() {
    let (mut operations, mut preemptions, mut copies, mut accepted, mut hits) = (0, 0, 0, 0, 0);
    let (mut branches, mut swapped, mut abandoned) = (0, 0, 0);
    for seed in 0..700 {
        let result = std::panic::catch_unwind(|| live(&mut StdRng::seed_from_u64(seed), 150));
        let Ok((branched, world)) = result else {
            panic!("seed {seed}");
        };
        operations += 150;
        branches += branched;
        swapped += world.runner.swapped;
        abandoned += world.abandoned;
        preemptions += world.preemptions;
        copies += world.runner.copies;
        accepted += world.runner.accepted;
        hits += world.scheduler.stats().totals.prefix_hits;
    }
    // The worlds must have gone where it hurts.
    assert!(operations >= 100_000);
    assert!(preemptions > 1_000, "{preemptions} preemptions");
    assert!(copies > 1_000, "{copies} copies");
    assert!(accepted > 1_000, "{accepted} accepted drafts");
    assert!(branches > 500, "{branches} forks and rewrites");
    assert!(swapped > 500, "{swapped} blocks swapped in");
    assert!(abandoned > 500, "{abandoned} steps without memory");
    assert!(hits > 10_000, "{hits} prefix hits");
}
