//! Preemption by swap, move by move.

mod common;

use batch_scheduler::{
    ConfigError, Event, Fcfs, PreemptionMode, RequestId, Scheduler, SchedulerConfig, SeqState,
};
use common::manual::*;
use paged_kv::{BlockManager, BlockSize, Config};

/// A scheduler on 4 blocks of 4 tokens, and `host` on the host.
fn swapping(host: u32) -> Sched {
    let config = SchedulerConfig {
        preemption_mode: PreemptionMode::Swap,
        ..config()
    };
    let size = BlockSize::new(4).expect("4 is not 0");
    let kv = Config::new(5, size).host_blocks(host).prefix_caching(false);
    let kv = BlockManager::new(kv).expect("pool");
    Scheduler::with_policy(config, kv, Box::new(Fcfs::default())).expect("config")
}

/// Two sequences that fill the pool; the second step preempts the second.
fn preempted(host: u32) -> (Sched, Plan) {
    let mut s = swapping(host);
    s.add(request(0, 8, 5)).unwrap();
    s.add(request(1, 7, 8)).unwrap();
    step(&mut s, 7);
    let (plan, _) = step(&mut s, 7);
    assert_eq!(state(&s, 1, 0), Some(SeqState::Preempted));
    (s, plan)
}

#[test]
fn what_a_preempted_sequence_computed_goes_to_the_host_and_comes_back() {
    let (mut s, plan) = preempted(8);
    assert_eq!((plan.swap_outs.len(), plan.swap_ins.len()), (2, 0));
    assert_eq!(s.kv().usage().host_free, 6);
    let out = plan.swap_outs;
    let back = loop {
        let (plan, _) = step(&mut s, 7);
        assert!(plan.swap_outs.is_empty());
        if !plan.admitted.is_empty() {
            break plan;
        }
    };
    // Seven tokens of the prompt were computed; the one that was sampled is next.
    assert_eq!(back.admitted[0].num_computed, 7);
    assert_eq!(rows(&back), [(7, 1)]);
    let moved: Vec<_> = back.swap_ins.iter().map(|m| (m.src, m.dst)).collect();
    let blocks = &back.admitted[0].blocks;
    assert_eq!(moved, [(out[0].dst, blocks[0]), (out[1].dst, blocks[1])]);
    let totals = s.stats().totals;
    assert_eq!(
        (totals.swapped_out_blocks, totals.swapped_in_blocks),
        (2, 2)
    );
    assert_eq!(s.stats().last_step.swapped_in_blocks, 2);
    assert_eq!(s.kv().usage().host_free, 8);
}

#[test]
fn without_room_on_the_host_it_is_computed_again() {
    let (mut s, plan) = preempted(1);
    assert!(plan.swap_outs.is_empty());
    let back = loop {
        let (plan, _) = step(&mut s, 7);
        if !plan.admitted.is_empty() {
            break plan;
        }
    };
    assert_eq!(back.admitted[0].num_computed, 0);
    assert_eq!(rows(&back), [(0, 8)]);
}

#[test]
fn a_swapped_sequence_that_is_aborted_gives_its_host_blocks_back() {
    let (mut s, _) = preempted(8);
    let mut events: Vec<News> = Vec::new();
    assert!(s.abort(RequestId(1), &mut events));
    assert!(matches!(events[0], Event::Finished { .. }));
    let usage = s.kv().usage();
    assert_eq!((usage.host_free, usage.swapped), (8, 0));
}

#[test]
fn a_swapped_sequence_keeps_the_watermark_on_its_way_back() {
    let config = SchedulerConfig {
        preemption_mode: PreemptionMode::Swap,
        watermark_blocks: 1,
        ..config()
    };
    let size = BlockSize::new(4).expect("4 is not 0");
    let kv = Config::new(6, size).host_blocks(8).prefix_caching(false);
    let kv = BlockManager::new(kv).expect("pool");
    let mut s = Scheduler::with_policy(config, kv, Box::new(Fcfs::default())).expect("config");
    s.add(request(0, 7, 20)).unwrap();
    s.add(request(1, 7, 9)).unwrap();
    while state(&s, 1, 0) != Some(SeqState::Preempted) {
        step(&mut s, 7);
    }
    while s.stats().waiting > 0 {
        let running = s.stats().running;
        step(&mut s, 7);
        let free = s.stats().kv_total_blocks - s.stats().kv_used_blocks;
        assert!(s.stats().waiting > 0 || running == 0 || free >= 1);
    }
}

#[test]
fn swapping_needs_a_host_tier() {
    let config = SchedulerConfig {
        preemption_mode: PreemptionMode::Swap,
        ..config()
    };
    let size = BlockSize::new(4).expect("4 is not 0");
    let kv = BlockManager::new(Config::new(5, size)).expect("pool");
    let refused = Scheduler::<_, ()>::new(config, kv).err();
    assert_eq!(refused, Some(ConfigError::NoHostBlocks));
}

/// A scheduler with a host tier on `blocks` blocks of 4 tokens.
fn tight(blocks: usize, watermark: usize, caching: bool) -> Sched {
    let config = SchedulerConfig {
        preemption_mode: PreemptionMode::Swap,
        watermark_blocks: watermark,
        max_num_batched_tokens: 32,
        ..config()
    };
    let size = BlockSize::new(4).expect("4 is not 0");
    let kv = Config::new(blocks + 1, size).host_blocks(8);
    let kv = BlockManager::new(kv.prefix_caching(caching)).expect("pool");
    Scheduler::with_policy(config, kv, Box::new(Fcfs::default())).expect("config")
}

#[test]
fn a_swapped_sequence_comes_back_to_exactly_the_room_that_it_and_the_watermark_need() {
    // The first ends after so many steps and leaves 4 of 7 blocks, or 3 after the second grew.
    for (steps, comes_back) in [(4, true), (6, false)] {
        let mut s = tight(7, 1, false);
        s.add(request(0, 8, steps)).unwrap();
        s.add(request(1, 7, 20)).unwrap();
        s.add(request(2, 7, 20)).unwrap();
        step(&mut s, 7);
        step(&mut s, 7);
        let (plan, _) = step(&mut s, 7);
        assert_eq!(rows(&plan), [(9, 1), (8, 1)], "the third gave way");
        for _ in 3..steps {
            assert_eq!(step(&mut s, 7).0.admitted.len(), 0);
        }
        // It needs 3 blocks for 9 tokens.
        let (plan, _) = step(&mut s, 7);
        assert_eq!(
            plan.admitted.len(),
            usize::from(comes_back),
            "{steps} steps"
        );
    }
}

#[test]
fn a_swapped_sequence_needs_no_room_for_what_others_keep_on_the_device() {
    let mut s = tight(5, 0, true);
    s.add(request(0, 1, 5)).unwrap();
    s.add(request(1, 8, 20)).unwrap();
    step(&mut s, 7);
    let mut shares = request(1, 9, 20);
    shares.id = RequestId(2);
    s.add(shares).unwrap();
    assert_eq!(step(&mut s, 7).0.admitted[0].num_computed, 8);
    while s.stats().last_step.preemptions == 0 {
        step(&mut s, 7);
    }
    assert_eq!(state(&s, 2, 0), Some(SeqState::Preempted));
    // The first has ended: one block of five is free when the second has its fourth.
    let (plan, _) = step(&mut s, 7);
    assert_eq!((plan.admitted.len(), plan.swap_ins.len()), (1, 1));
}

#[test]
fn what_the_host_holds_of_a_rewritten_sequence_stays_if_all_of_it_is_kept() {
    let (mut s, _) = preempted(8);
    // Seven tokens are held.
    s.rewrite(RequestId(1), 0, 7, &[3]).unwrap();
    assert_eq!(s.kv().usage().host_free, 6);
    s.rewrite(RequestId(1), 0, 7, &[]).unwrap();
    assert_eq!(s.kv().usage().host_free, 8);
}
