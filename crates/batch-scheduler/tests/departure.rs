//! How sequences end, give way, and are ended by others.

mod common;

use batch_scheduler::{
    ApplyError, Event, FinishReason, Priority, RequestId, SchedulerConfig, SeqState,
};
use common::manual::*;
use smallvec::smallvec;

#[test]
fn each_stop_rule_has_its_reason() {
    let mut s = scheduler(config(), 32);
    let mut eos = request(0, 2, 9);
    eos.stop.eos_token_ids = vec![1, 2];
    let mut ignoring = eos.clone();
    ignoring.id = RequestId(1);
    ignoring.stop.ignore_eos = true;
    ignoring.stop.stop_token_ids = vec![2];
    ignoring.stop.min_tokens = 2;
    s.add(eos).unwrap();
    s.add(ignoring).unwrap();
    s.add(request(2, 2, 3)).unwrap();
    assert_eq!(ended(&step(&mut s, 2).1), [(0, 0, "Eos".to_owned())]);
    assert_eq!(
        ended(&step(&mut s, 2).1),
        [(1, 0, "StopToken(2)".to_owned())]
    );
    assert_eq!(ended(&step(&mut s, 2).1), [(2, 0, "Length".to_owned())]);
    assert!(!s.has_work());
}

#[test]
fn the_length_of_model_and_cache_end_a_sequence() {
    // 4 blocks of 4 tokens: the 17th token is never fed to the model.
    let mut s = scheduler(config(), 4);
    assert_eq!(s.max_len(), 17);
    s.add(request(0, 15, 9)).unwrap();
    assert!(ended(&step(&mut s, 7).1).is_empty());
    assert_eq!(ended(&step(&mut s, 7).1), [(0, 0, "Length".to_owned())]);
    let mut s = scheduler(config(), 99);
    assert_eq!(s.max_len(), 32);
    s.add(request(0, 31, 9)).unwrap();
    step(&mut s, 7);
    assert_eq!(ended(&step(&mut s, 7).1), [(0, 0, "Length".to_owned())]);
}

#[test]
fn the_newest_gives_way_and_comes_back_in_front() {
    let mut s = scheduler(config(), 4);
    s.add(request(0, 8, 8)).unwrap();
    s.add(request(1, 7, 8)).unwrap();
    s.add(request(2, 1, 8)).unwrap();
    step(&mut s, 7);
    // The oldest needs a third block.
    let (plan, _) = step(&mut s, 7);
    assert_eq!(s.stats().last_step.preemptions, 1);
    assert!(plan.admitted.is_empty());
    assert_eq!(rows(&plan), [(8, 1)]);
    assert_eq!(plan.released.len(), 1);
    assert_eq!(state(&s, 1, 0), Some(SeqState::Preempted));
    assert_eq!(state(&s, 2, 0), Some(SeqState::Waiting));
    let mut order = Vec::new();
    while s.has_work() {
        order.extend(ended(&step(&mut s, 7).1).into_iter().map(|e| e.0));
    }
    assert_eq!(order, [0, 1, 2]);
}

#[test]
fn priority_decides_who_gives_way() {
    let mut s = with_policy(config(), 4, Box::new(Priority::default()));
    let mut late_but_urgent = request(1, 8, 8);
    late_but_urgent.priority = -5;
    s.add(request(0, 7, 8)).unwrap();
    s.add(late_but_urgent).unwrap();
    step(&mut s, 7);
    step(&mut s, 7);
    assert_eq!(state(&s, 0, 0), Some(SeqState::Preempted));
    assert_eq!(state(&s, 1, 0), Some(SeqState::Running));
}

#[test]
fn blocks_and_slots_outlive_the_steps_that_read_them() {
    let config = SchedulerConfig {
        max_steps_in_flight: 2,
        ..config()
    };
    let mut s = scheduler(config, 8);
    let mut r = request(0, 4, 9);
    r.stop.eos_token_ids = vec![2];
    s.add(r).unwrap();
    let first = s.schedule().unwrap();
    let second = s.schedule().unwrap();
    assert_eq!(rows(&second), [(4, 1)]);
    assert!(s.schedule().is_none(), "two steps are in flight");
    let mut events: Vec<News> = Vec::new();
    s.apply(output(&first, 2), &mut events).unwrap();
    assert_eq!(state(&s, 0, 0), Some(SeqState::Finished));
    assert!(s.stats().kv_used_blocks > 0);
    s.apply(output(&second, 3), &mut events).unwrap();
    assert_eq!(s.stats().kv_used_blocks, 0);
    assert_eq!(
        events.len(),
        2,
        "the token in flight is discarded: {events:?}"
    );
}

#[test]
fn nothing_is_planned_past_a_known_length() {
    let config = SchedulerConfig {
        max_steps_in_flight: 2,
        ..config()
    };
    let mut s = scheduler(config, 8);
    s.add(request(0, 4, 1)).unwrap();
    assert!(s.schedule().is_some());
    assert!(s.schedule().is_none());
}

#[test]
fn abort_works_in_every_state_and_reports_each_sequence() {
    let config = SchedulerConfig {
        max_steps_in_flight: 2,
        ..config()
    };
    for steps in 0..3 {
        let mut s = scheduler(config.clone(), 16);
        let mut r = request(0, 20, 9);
        r.n = 3;
        s.add(r).unwrap();
        let plans: Vec<Plan> = (0..steps).map_while(|_| s.schedule()).collect();
        let mut events: Vec<News> = Vec::new();
        assert!(s.abort(RequestId(0), &mut events));
        assert!(!s.abort(RequestId(0), &mut events));
        assert_eq!(ended(&events).len(), 3);
        for plan in &plans {
            s.apply(output(plan, 7), &mut events).unwrap();
        }
        assert_eq!(events.len(), 3, "no news after the end");
        assert!(!s.has_work());
        assert_eq!(s.kv().usage().tables, 0);
        s.add(request(0, 4, 1)).expect("the name is free again");
    }
}

#[test]
fn the_sequence_that_computes_a_prompt_hands_it_over() {
    let mut s = scheduler(config(), 16);
    let mut r = request(0, 20, 2);
    r.n = 3;
    s.add(r).unwrap();
    step(&mut s, 7);
    let mut events: Vec<News> = Vec::new();
    assert!(s.finish(RequestId(0), 0, FinishReason::Aborted, &mut events));
    assert!(s.finish(RequestId(0), 1, FinishReason::Aborted, &mut events));
    let (plan, _) = step(&mut s, 7);
    assert_eq!(plan.admitted[0].index, 2);
    assert_eq!(plan.admitted[0].num_computed, 16, "from the prefix cache");
    assert_eq!(ended(&step(&mut s, 7).1), [(0, 2, "Length".to_owned())]);
    assert!(!s.has_work());
}

#[test]
fn a_failed_sample_ends_its_own_sequence_only() {
    let mut s = scheduler(config(), 16);
    s.add(request(0, 4, 9)).unwrap();
    s.add(request(1, 4, 9)).unwrap();
    let plan = s.schedule().unwrap();
    let mut out = output(&plan, 7);
    out.samples[0].tokens.clear();
    out.samples[0].error = Some("logits are not finite".to_owned());
    let mut events = Vec::new();
    s.apply(out, &mut events).unwrap();
    assert_eq!(
        ended(&events),
        [(0, 0, "Error(\"logits are not finite\")".to_owned())]
    );
    assert_eq!(rows(&step(&mut s, 7).0).len(), 1);
    // What a failing step computed is not offered to others.
    let mut again = request(0, 4, 9);
    again.id = RequestId(2);
    again.prompt.push(5);
    s.add(again).unwrap();
    assert_eq!(step(&mut s, 7).0.admitted[0].num_computed, 0);
}

#[test]
fn drafts_are_verified_and_rejected_ones_recomputed() {
    let mut s = scheduler(config(), 16);
    s.add(request(0, 4, 20)).unwrap();
    step(&mut s, 7);
    assert!(s.set_drafts(RequestId(0), 0, &[1, 2, 3]));
    assert!(!s.set_drafts(RequestId(9), 0, &[1]));
    let plan = s.schedule().unwrap();
    assert_eq!(
        (rows(&plan), plan.drafts.as_slice()),
        (vec![(4, 4)], &[1, 2, 3][..])
    );
    let mut out = output(&plan, 0);
    out.samples[0].tokens = smallvec![1, 2, 9];
    let mut events = Vec::new();
    s.apply(out, &mut events).unwrap();
    assert!(matches!(&events[0], Event::Tokens { tokens, .. } if tokens[..] == [1, 2, 9]));
    assert_eq!(rows(&step(&mut s, 7).0), [(7, 1)]);
}

#[test]
fn an_output_of_another_step_is_refused() {
    let mut s = scheduler(config(), 16);
    s.add(request(0, 4, 9)).unwrap();
    let plan = s.schedule().unwrap();
    let mut events: Vec<News> = Vec::new();
    let mut wrong = output(&plan, 7);
    wrong.step = 5;
    let e = s.apply(wrong, &mut events).unwrap_err();
    assert_eq!(
        e,
        ApplyError::WrongStep {
            got: 5,
            expected: Some(0)
        }
    );
    let mut short = output(&plan, 7);
    short.samples.clear();
    let e = s.apply(short, &mut events).unwrap_err();
    assert_eq!(
        e,
        ApplyError::SampleCount {
            step: 0,
            got: 0,
            expected: 1
        }
    );
    let mut long = output(&plan, 7);
    long.samples[0].tokens = smallvec![1, 2];
    let e = s.apply(long, &mut events).unwrap_err();
    assert!(matches!(
        e,
        ApplyError::TooManyTokens { got: 2, max: 1, .. }
    ));
    s.apply(output(&plan, 7), &mut events)
        .expect("still in step");
}

#[test]
fn only_those_behind_give_way() {
    let mut s = scheduler(config(), 5);
    s.add(request(0, 5, 8)).unwrap();
    s.add(request(1, 7, 8)).unwrap();
    s.add(request(2, 3, 8)).unwrap();
    step(&mut s, 7);
    step(&mut s, 7);
    // The second needs a third block.
    assert_eq!(rows(&step(&mut s, 7).0), [(6, 1), (8, 1)]);
    assert_eq!(state(&s, 2, 0), Some(SeqState::Preempted));
}

#[test]
fn nobody_else_gives_way_while_blocks_are_on_their_way_back() {
    let config = SchedulerConfig {
        max_steps_in_flight: 2,
        ..config()
    };
    let mut s = scheduler(config, 5);
    s.add(request(0, 8, 8)).unwrap();
    s.add(request(1, 5, 8)).unwrap();
    s.add(request(2, 3, 8)).unwrap();
    let first = s.schedule().unwrap();
    // The first needs a third block. The last gives way; the step in flight reads its block yet.
    let second = s.schedule().unwrap();
    assert_eq!(rows(&second), [(5, 1)]);
    assert_eq!(state(&s, 2, 0), Some(SeqState::Preempted));
    let mut events: Vec<News> = Vec::new();
    s.apply(output(&first, 7), &mut events).unwrap();
    assert_eq!(rows(&s.schedule().unwrap()), [(8, 1), (6, 1)]);
}

#[test]
fn drafts_are_taken_only_for_a_next_token_that_nobody_computes_yet() {
    let config = SchedulerConfig {
        max_steps_in_flight: 2,
        ..config()
    };
    let mut s = scheduler(config, 16);
    let id = RequestId(0);
    let mut two = request(0, 17, 9);
    two.n = 2;
    s.add(two).unwrap();
    assert!(!s.set_drafts(id, 0, &[1]), "it waits");
    let first = s.schedule().unwrap();
    assert!(!s.set_drafts(id, 0, &[1]), "it is yet to fork");
    let second = s.schedule().unwrap();
    let mut events: Vec<News> = Vec::new();
    s.apply(output(&first, 7), &mut events).unwrap();
    for index in 0..2 {
        assert!(!s.set_drafts(id, index, &[1]), "its token is in flight");
    }
    s.apply(output(&second, 7), &mut events).unwrap();
    s.add(request(1, 18, 9)).unwrap();
    let third = s.schedule().unwrap();
    s.apply(output(&third, 7), &mut events).unwrap();
    assert!(
        !s.set_drafts(RequestId(1), 0, &[1]),
        "it computes its prompt"
    );
    for index in 0..2 {
        assert!(s.set_drafts(id, index, &[1]));
    }
    assert!(!s.set_drafts(id, 2, &[1]));
}

#[test]
fn drafts_give_way_before_sequences_do() {
    let mut s = scheduler(config(), 4);
    s.add(request(0, 6, 8)).unwrap();
    s.add(request(1, 6, 8)).unwrap();
    step(&mut s, 7);
    assert!(s.set_drafts(RequestId(0), 0, &[1, 2, 3]));
    let (plan, _) = step(&mut s, 7);
    assert_eq!(rows(&plan), [(6, 1), (6, 1)]);
    assert!(plan.drafts.is_empty());
    assert_eq!(s.stats().last_step.preemptions, 0);
}

#[test]
fn a_sequence_that_never_forks_leaves_its_slot_to_others() {
    let mut s = scheduler(config(), 32);
    let mut three = request(0, 20, 9);
    three.n = 3;
    s.add(three).unwrap();
    step(&mut s, 7);
    let mut events: Vec<News> = Vec::new();
    assert!(s.finish(RequestId(0), 2, FinishReason::Aborted, &mut events));
    let mut two = request(1, 5, 9);
    two.n = 2;
    s.add(two).unwrap();
    step(&mut s, 7);
    assert_eq!(s.stats().running, 4);
}

#[test]
fn a_step_that_was_taken_back_is_a_preemption_and_is_planned_again_within_the_budget() {
    let mut s = scheduler(config(), 16);
    s.add(request(0, 9, 1)).unwrap();
    let plan = s.schedule().unwrap();
    assert_eq!(s.abandon(plan.step), Some(vec![(RequestId(0), 0)]));
    assert_eq!(s.stats().totals.preemptions, 1);
    assert_eq!(state(&s, 0, 0), Some(SeqState::Preempted));
    assert_eq!(s.token_budget(), 16);
    for (asked, given) in [(0, 1), (99, 16), (4, 4)] {
        s.set_token_budget(asked);
        assert_eq!(s.token_budget(), given);
    }
    assert_eq!(rows(&step(&mut s, 7).0), [(0, 4)]);
    s.set_token_budget(usize::MAX);
    let (_, events) = step(&mut s, 7);
    assert!(matches!(
        events.last(),
        Some(Event::Finished { usage, .. }) if usage.preemptions == 1
    ));
}
