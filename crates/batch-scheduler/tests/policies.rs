//! What policies and runners do by default, whom each policy lets give way, and the words for things.

mod common;

use batch_scheduler::{
    Candidate, ConfigError, Fcfs, FinishReason, ModelRunner, Priority, RequestId, RequestInfo,
    SchedulerConfig, SchedulingPolicy, StepOutput, StepPlan, VictimRule, WeightedFair,
};
use common::manual::*;

fn candidate(rank: i64, num_computed: u32) -> Candidate {
    Candidate {
        id: RequestId(0),
        index: 0,
        rank,
        arrival: 0,
        num_computed,
    }
}

/// Decides nothing.
struct Plain;

impl SchedulingPolicy for Plain {}

#[test]
fn a_policy_that_decides_nothing_serves_in_the_order_of_arrival() {
    let info = |arrival| RequestInfo {
        id: RequestId(arrival),
        arrival,
        priority: 3 - arrival as i32,
        class: arrival,
        prompt_tokens: 1,
        max_tokens: 1,
        n: 1,
    };
    let (a, b) = (info(1), info(2));
    assert_eq!(Plain.queue(&a), Plain.queue(&b));
    assert_eq!(Plain.rank(&a), Plain.rank(&b));
    assert_eq!(Plain.next_queue(&[3, 4]), 0);
    assert_eq!(Plain.victim(&[candidate(0, 1); 3]), 2);
    assert!(!Plain.wants_service());
    let mut s = with_policy(config(), 32, Box::new(Plain));
    for id in 0..9 {
        let mut r = request(id, 4, 3);
        (r.priority, r.class) = (-(id as i32), id);
        s.add(r).unwrap();
    }
    let mut order = Vec::new();
    while s.has_work() {
        order.extend(ended(&step(&mut s, 7).1).into_iter().map(|e| e.0));
    }
    assert_eq!(order, [0, 1, 2, 3, 4, 5, 6, 7, 8]);
}

#[test]
fn every_policy_follows_its_victim_rule() {
    let behind = [
        candidate(0, 1),
        candidate(1, 5),
        candidate(1, 3),
        candidate(1, 3),
        candidate(1, 9),
    ];
    for (victim, chosen) in [(VictimRule::LeastLostWork, 3), (VictimRule::Newest, 4)] {
        assert_eq!(victim.choose(&behind), chosen);
        assert_eq!(Fcfs { victim }.victim(&behind), chosen);
        assert_eq!(Priority { victim }.victim(&behind), chosen);
        let mut fair = WeightedFair::new();
        fair.victim = victim;
        assert_eq!(fair.victim(&behind), chosen);
    }
}

#[test]
fn stop_tokens_that_share_a_bit_of_the_sieve_all_stop() {
    for token in [2, 34] {
        let mut s = scheduler(config(), 8);
        let mut r = request(0, 2, 9);
        r.stop.eos_token_ids = vec![2];
        r.stop.stop_token_ids = vec![34];
        s.add(r).unwrap();
        assert!(ended(&step(&mut s, 98).1).is_empty());
        assert_eq!(ended(&step(&mut s, token).1).len(), 1, "token {token}");
    }
}

#[test]
fn reasons_have_the_words_of_the_interfaces() {
    let text = || "x".to_owned();
    for (reason, word) in [
        (FinishReason::Eos, "stop"),
        (FinishReason::StopToken(1), "stop"),
        (FinishReason::StopString(text()), "stop"),
        (FinishReason::Length, "length"),
        (FinishReason::Aborted, "abort"),
        (FinishReason::Error(text()), "error"),
    ] {
        assert_eq!(
            (reason.as_str(), reason.to_string()),
            (word, word.to_owned())
        );
    }
    assert_eq!(RequestId(12).to_string(), "12");
}

#[test]
fn the_largest_limit_is_a_limit() {
    let max = (u32::MAX / 4) as usize;
    let with = |max_model_len| SchedulerConfig {
        max_model_len,
        ..config()
    };
    assert_eq!(with(max).validate(8), Ok(()));
    assert!(matches!(
        with(max + 1).validate(8),
        Err(ConfigError::TooLarge { .. })
    ));
}

/// Knows nothing of its errors.
struct Runner;

impl ModelRunner for Runner {
    type Params = ();
    type Extra = ();
    type Ticket = u64;
    type Error = std::fmt::Error;

    fn launch(&mut self, plan: StepPlan<()>) -> Result<u64, std::fmt::Error> {
        Ok(plan.step)
    }

    fn collect(&mut self, _step: u64) -> Result<StepOutput<()>, std::fmt::Error> {
        Err(std::fmt::Error)
    }
}

#[test]
fn an_error_is_not_taken_for_memory_that_ran_out() {
    let error = Runner.collect(0).unwrap_err();
    assert!(!Runner.is_out_of_memory(&error));
}

#[test]
fn a_class_that_was_idle_has_saved_nothing() {
    let config = SchedulerConfig {
        max_num_seqs: 1,
        ..config()
    };
    // The second class is new, or was served once long ago.
    for before in 0..2 {
        let mut s = with_policy(config.clone(), 8, Box::new(WeightedFair::new()));
        let add = |s: &mut Sched, ids: std::ops::Range<u64>, class| {
            for id in ids {
                let mut r = request(id, 4, 4);
                r.class = class;
                s.add(r).unwrap();
            }
        };
        add(&mut s, 100..100 + before, 1);
        add(&mut s, 0..30, 0);
        while s.has_work() {
            step(&mut s, 7);
        }
        add(&mut s, 200..220, 1);
        add(&mut s, 30..50, 0);
        let mut served = [0, 0];
        while served.iter().sum::<usize>() < 20 {
            for (id, ..) in ended(&step(&mut s, 7).1) {
                served[usize::from(id >= 200)] += 1;
            }
        }
        assert!((9..=11).contains(&served[1]), "{served:?}, {before}");
    }
}

#[test]
fn shares_are_shares() {
    let mut s = scheduler(config(), 8);
    assert_eq!(
        (s.stats().kv_usage(), s.stats().prefix_hit_rate()),
        (0.0, 0.0)
    );
    let first = request(0, 5, 9);
    let mut second = first.clone();
    second.id = RequestId(1);
    s.add(first).unwrap();
    step(&mut s, 7);
    assert_eq!(
        (s.stats().kv_usage(), s.stats().prefix_hit_rate()),
        (0.25, 0.0)
    );
    s.add(second).unwrap();
    step(&mut s, 7);
    // Of 10 tokens, 4 were there.
    assert_eq!(
        (s.stats().kv_usage(), s.stats().prefix_hit_rate()),
        (0.375, 0.4)
    );
}

#[test]
fn classes_share_tokens_and_not_requests() {
    let config = SchedulerConfig {
        max_num_seqs: 1,
        ..config()
    };
    let mut s = with_policy(config, 8, Box::new(WeightedFair::new()));
    for id in 0..60 {
        let class = u64::from(id >= 30);
        let mut r = request(id, if class == 0 { 15 } else { 3 }, 1);
        r.class = class;
        s.add(r).unwrap();
    }
    let mut served = [0, 0];
    while served[1] < 25 {
        for (id, ..) in ended(&step(&mut s, 7).1) {
            served[usize::from(id >= 30)] += 1;
        }
    }
    assert!((4..=6).contains(&served[0]), "{served:?}");
}
