//! What a fork or a rewrite keeps of what is computed, and what it must not keep.

mod common;

use batch_scheduler::{RequestId, SchedulerConfig, SeqState};
use common::manual::*;

const ID: RequestId = RequestId(0);

/// A sequence with a prompt of 6 tokens that said 6: 11 are computed.
fn talking(window: Option<u32>) -> Sched {
    let config = SchedulerConfig {
        sliding_window: window,
        ..config()
    };
    let mut s = scheduler(config, 32);
    s.add(request(0, 6, 20)).unwrap();
    for _ in 0..6 {
        step(&mut s, 7);
    }
    s
}

#[test]
fn a_cut_keeps_what_is_computed_up_to_it() {
    // The last token that is kept is computed again: what comes after it is sampled there.
    for (keep, tail, start) in [
        (9, &[][..], 8),
        (9, &[3], 9),
        (12, &[3, 4], 11),
        (11, &[], 10),
    ] {
        let mut s = talking(None);
        s.rewrite(ID, 0, keep, tail).unwrap();
        assert_ne!(state(&s, 0, 0), Some(SeqState::Preempted));
        let len = (keep + tail.len()) as u32 - start;
        assert_eq!(rows(&step(&mut s, 7).0), [(start, len)], "rewritten");

        let mut s = talking(None);
        s.fork(ID, 0, 1, keep, tail, "fork").unwrap();
        assert_eq!((s.stats().running, s.stats().waiting), (2, 0));
        assert_eq!(rows(&step(&mut s, 7).0), [(11, 1), (start, len)], "forked");
    }
}

#[test]
fn a_cut_under_a_window_starts_again() {
    let waits = [Some(SeqState::Waiting), Some(SeqState::Preempted)];
    for (keep, tail, again) in [
        (9, &[][..], true),
        (10, &[3], true),
        (11, &[3], false),
        (12, &[3, 4], false),
    ] {
        let mut s = talking(Some(4));
        s.rewrite(ID, 0, keep, tail).unwrap();
        assert_eq!(
            waits.contains(&state(&s, 0, 0)),
            again,
            "rewritten at {keep}"
        );
        let mut s = talking(Some(4));
        s.fork(ID, 0, 1, keep, tail, "fork").unwrap();
        assert_eq!(waits.contains(&state(&s, 0, 1)), again, "forked at {keep}");
    }
}

#[test]
fn slots_that_are_promised_are_not_forked_into() {
    let mut s = talking(None);
    let mut three = request(1, 20, 9);
    three.n = 3;
    s.add(three).unwrap();
    step(&mut s, 7);
    // One of four slots runs, one computes a prompt for itself and two others.
    s.fork(ID, 0, 1, 13, &[], "fork").unwrap();
    assert_eq!((s.stats().running, s.stats().waiting), (2, 1));
    step(&mut s, 7);
    assert_eq!(s.stats().running, 4);
}
