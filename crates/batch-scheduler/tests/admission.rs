//! Who enters a step, and what is refused at the door.

mod common;

use std::sync::{Arc, Mutex};

use batch_scheduler::{
    AddError, ConfigError, Priority, RequestId, RequestInfo, SchedulerConfig, SchedulingPolicy,
    SeqParams, SeqState, WeightedFair,
};
use common::manual::*;

#[test]
fn prompts_are_chunked_beside_decoding() {
    let mut s = scheduler(config(), 32);
    s.add(request(0, 4, 9)).unwrap();
    s.add(request(1, 20, 9)).unwrap();
    let (plan, _) = step(&mut s, 7);
    assert_eq!(rows(&plan), [(0, 4), (0, 12)]);
    assert_eq!(plan.samples.len(), 1);
    assert_eq!(state(&s, 0, 0), Some(SeqState::Running));
    assert_eq!(state(&s, 1, 0), Some(SeqState::Prefill));
    let (plan, _) = step(&mut s, 7);
    assert_eq!(rows(&plan), [(4, 1), (12, 8)]);
    assert_eq!(plan.samples.len(), 2);
    let stats = s.stats().last_step;
    assert_eq!((stats.decode_tokens, stats.prefill_tokens), (1, 8));
    assert_eq!(rows(&step(&mut s, 7).0), [(5, 1), (20, 1)]);
}

#[test]
fn a_long_prompt_in_front_leaves_a_token_for_everyone_behind() {
    let config = SchedulerConfig {
        max_num_batched_tokens: 8,
        ..config()
    };
    let mut s = with_policy(config, 32, Box::new(Priority::default()));
    s.add(request(0, 2, 20)).unwrap();
    step(&mut s, 7);
    let mut urgent = request(1, 30, 2);
    urgent.priority = -1;
    s.add(urgent).unwrap();
    assert_eq!(rows(&step(&mut s, 7).0), [(2, 1), (0, 7)]);
    assert_eq!(rows(&step(&mut s, 7).0), [(7, 7), (3, 1)]);
}

#[test]
fn the_threshold_bounds_a_chunk() {
    let config = SchedulerConfig {
        long_prefill_token_threshold: 3,
        ..config()
    };
    let mut s = scheduler(config, 32);
    s.add(request(0, 8, 2)).unwrap();
    let chunks: Vec<_> = (0..3).flat_map(|_| rows(&step(&mut s, 7).0)).collect();
    assert_eq!(chunks, [(0, 3), (3, 3), (6, 2)]);
}

#[test]
fn without_chunking_a_prompt_waits_for_a_budget_that_takes_all_of_it() {
    let config = SchedulerConfig {
        enable_chunked_prefill: false,
        max_num_batched_tokens: 32,
        ..config()
    };
    let mut s = scheduler(config, 32);
    s.add(request(0, 20, 2)).unwrap();
    s.add(request(1, 20, 2)).unwrap();
    assert_eq!(rows(&step(&mut s, 7).0), [(0, 20)]);
    assert_eq!(rows(&step(&mut s, 7).0), [(20, 1), (0, 20)]);
}

#[test]
fn nobody_passes_the_first_in_line() {
    let mut s = scheduler(config(), 6);
    s.add(request(0, 16, 4)).unwrap();
    s.add(request(1, 12, 4)).unwrap();
    s.add(request(2, 1, 4)).unwrap();
    assert_eq!(step(&mut s, 7).0.admitted.len(), 1);
    assert_eq!(step(&mut s, 7).0.admitted.len(), 0);
    assert_eq!(s.stats().waiting, 2);
}

#[test]
fn a_finished_sequence_is_replaced_in_the_next_step() {
    let config = SchedulerConfig {
        max_num_seqs: 1,
        ..config()
    };
    let mut s = scheduler(config, 8);
    s.add(request(0, 2, 1)).unwrap();
    s.add(request(1, 3, 1)).unwrap();
    let (first, events) = step(&mut s, 7);
    assert_eq!(ended(&events).len(), 1);
    let (second, _) = step(&mut s, 7);
    assert_eq!(second.released, [first.admitted[0].slot]);
    assert_eq!(second.admitted[0].slot, first.admitted[0].slot);
}

#[test]
fn a_request_of_n_waits_for_n_slots_and_forks_once() {
    let mut s = scheduler(config(), 32);
    s.add(request(0, 4, 2)).unwrap();
    s.add(request(1, 4, 9)).unwrap();
    let mut four = request(2, 5, 9);
    four.n = 3;
    four.params = SeqParams::PerSequence(vec!["a", "b", "c"]);
    s.add(four).unwrap();
    assert_eq!(step(&mut s, 7).0.admitted.len(), 2);
    // Two slots are free, three are needed; the first request ends with this step.
    assert_eq!(step(&mut s, 7).0.admitted.len(), 0);
    let (plan, _) = step(&mut s, 7);
    let admitted: Vec<_> = plan
        .admitted
        .iter()
        .map(|a| (a.index, a.params, a.num_computed))
        .collect();
    assert_eq!(admitted, [(0, "a", 0), (1, "b", 5), (2, "c", 5)]);
    assert_eq!(plan.rows.len(), 2);
    assert_eq!(plan.samples.iter().filter(|s| s.row == 1).count(), 3);
    // Each writes its own last block next; the last of them may keep the shared one.
    assert_eq!(step(&mut s, 7).0.copies.len(), 2);
}

#[test]
fn a_shared_prefix_is_computed_once() {
    let mut s = scheduler(config(), 32);
    let mut a = request(0, 9, 1);
    s.add(a.clone()).unwrap();
    step(&mut s, 7);
    a.id = RequestId(1);
    s.add(a.clone()).unwrap();
    let (plan, _) = step(&mut s, 7);
    assert_eq!((plan.admitted[0].num_computed, rows(&plan)[0]), (8, (8, 1)));
    a.id = RequestId(2);
    a.use_prefix_cache = false;
    s.add(a).unwrap();
    assert_eq!(rows(&step(&mut s, 7).0), [(0, 9)]);
    let totals = s.stats().totals;
    assert_eq!((totals.prefix_hits, totals.prefix_queries), (8, 18));
}

#[test]
fn the_watermark_is_kept_only_while_something_runs() {
    let config = SchedulerConfig {
        watermark_blocks: 2,
        ..config()
    };
    let mut s = scheduler(config, 4);
    s.add(request(0, 12, 3)).unwrap();
    s.add(request(1, 4, 3)).unwrap();
    assert_eq!(step(&mut s, 7).0.admitted.len(), 1);
    assert_eq!(step(&mut s, 7).0.admitted.len(), 0);
}

#[test]
fn classes_share_by_weight() {
    let config = SchedulerConfig {
        max_num_seqs: 1,
        ..config()
    };
    let fair = WeightedFair::new().with_weight(1, 3);
    let mut s = with_policy(config, 8, Box::new(fair));
    // Class 0 floods first; class 1 has three times its weight.
    for id in 0..80 {
        let mut r = request(id, 4, 4);
        r.class = u64::from(id >= 40);
        s.add(r).unwrap();
    }
    let mut served = [0, 0];
    while served.iter().sum::<usize>() < 40 {
        for (id, _, _) in ended(&step(&mut s, 7).1) {
            served[usize::from(id >= 40)] += 1;
        }
    }
    assert!((28..=32).contains(&served[1]), "{served:?}");
}

#[test]
fn bad_requests_are_refused_and_change_nothing() {
    let mut s = scheduler(config(), 4);
    let id = RequestId(1);
    let refused = |s: &mut Sched, change: &dyn Fn(&mut batch_scheduler::Request<&'static str>)| {
        let mut r = request(1, 4, 4);
        change(&mut r);
        s.add(r).unwrap_err()
    };
    let e = refused(&mut s, &|r| r.prompt.clear());
    assert_eq!(e, AddError::EmptyPrompt { id });
    let e = refused(&mut s, &|r| r.prompt = vec![0; 32]);
    assert!(matches!(
        e,
        AddError::PromptTooLong {
            prompt: 32,
            max_model_len: 32,
            ..
        }
    ));
    let e = refused(&mut s, &|r| r.prompt = vec![0; 17]);
    assert_eq!(
        e,
        AddError::NeverFits {
            id,
            prompt: 17,
            capacity: 16
        }
    );
    assert!(e.to_string().contains("17 tokens"), "{e}");
    scheduler(config(), 4).add(request(1, 16, 4)).unwrap();
    let e = refused(&mut s, &|r| r.n = 0);
    assert_eq!(e, AddError::ZeroSequences { id });
    let e = refused(&mut s, &|r| r.n = 5);
    assert_eq!(
        e,
        AddError::TooManySequences {
            id,
            n: 5,
            max_num_seqs: 4
        }
    );
    let e = refused(&mut s, &|r| r.stop.max_tokens = 0);
    assert_eq!(e, AddError::ZeroMaxTokens { id });
    let e = refused(&mut s, &|r| r.stop.min_tokens = 5);
    assert!(matches!(e, AddError::MinAboveMaxTokens { .. }));
    let e = refused(&mut s, &|r| r.params = SeqParams::PerSequence(vec![]));
    assert_eq!(e, AddError::ParamsCount { id, given: 0, n: 1 });
    assert!(!s.has_work());
    s.add(request(1, 4, 4)).unwrap();
    assert_eq!(s.add(request(1, 4, 4)), Err(AddError::DuplicateId { id }));
    assert_eq!(s.stats().waiting, 1);
}

#[test]
fn limits_that_contradict_each_other_are_refused() {
    let check = |change: &dyn Fn(&mut SchedulerConfig)| {
        let mut c = config();
        change(&mut c);
        c.validate(8)
    };
    assert_eq!(check(&|_| ()), Ok(()));
    let zero = |field| Err(ConfigError::Zero { field });
    assert_eq!(check(&|c| c.max_num_seqs = 0), zero("max_num_seqs"));
    assert_eq!(check(&|c| c.max_model_len = 0), zero("max_model_len"));
    assert_eq!(
        check(&|c| c.max_steps_in_flight = 0),
        zero("max_steps_in_flight")
    );
    assert_eq!(
        check(&|c| c.sliding_window = Some(0)),
        zero("sliding_window")
    );
    let e = check(&|c| c.max_num_batched_tokens = 3).unwrap_err();
    assert_eq!(e, ConfigError::BudgetBelowSeqs { tokens: 3, seqs: 4 });
    let e = check(&|c| c.enable_chunked_prefill = false).unwrap_err();
    assert_eq!(
        e,
        ConfigError::BudgetBelowModelLen {
            tokens: 16,
            len: 32
        }
    );
    let e = check(&|c| c.max_model_len = usize::MAX).unwrap_err();
    assert!(matches!(
        e,
        ConfigError::TooLarge {
            field: "max_model_len",
            ..
        }
    ));
    let e = check(&|c| c.watermark_blocks = 8).unwrap_err();
    assert_eq!(
        e,
        ConfigError::WatermarkTooHigh {
            watermark: 8,
            blocks: 8
        }
    );
    assert_eq!(config().validate(0), Err(ConfigError::EmptyPool));
}

#[test]
fn what_is_cached_does_not_count_where_prompts_come_whole() {
    let config = SchedulerConfig {
        enable_chunked_prefill: false,
        max_num_batched_tokens: 32,
        ..config()
    };
    for (prompt, fits) in [(20, true), (21, false)] {
        let mut s = scheduler(config.clone(), 64);
        s.add(request(0, 20, 1)).unwrap();
        step(&mut s, 7);
        // 4 of 32 tokens are left behind the first; the second has 16 cached.
        s.add(request(1, 28, 2)).unwrap();
        let mut again = request(0, prompt, 2);
        again.id = RequestId(2);
        again.prompt[16..].fill(9);
        s.add(again).unwrap();
        let admitted = step(&mut s, 7).0.admitted.len();
        assert_eq!(admitted, 1 + usize::from(fits));
    }
}

#[test]
fn who_follows_a_head_that_left_is_looked_at() {
    let mut s = scheduler(config(), 6);
    s.add(request(0, 16, 4)).unwrap();
    s.add(request(1, 12, 4)).unwrap();
    s.add(request(2, 1, 4)).unwrap();
    step(&mut s, 7);
    step(&mut s, 7);
    assert_eq!(s.stats().waiting, 2);
    let mut events: Vec<News> = Vec::new();
    assert!(s.abort(RequestId(1), &mut events));
    assert_eq!(step(&mut s, 7).0.admitted.len(), 1);
}

/// Keeps the account of what it is told.
struct Bill(Arc<Mutex<[usize; 3]>>);

impl SchedulingPolicy for Bill {
    fn queue(&self, request: &RequestInfo) -> u64 {
        request.class
    }

    fn wants_service(&self) -> bool {
        true
    }

    fn served(&mut self, queue: u64, tokens: usize) {
        self.0.lock().unwrap()[queue as usize] += tokens;
    }
}

#[test]
fn a_policy_is_told_of_every_token_that_is_computed() {
    let bill = Arc::default();
    let mut s = with_policy(config(), 7, Box::new(Bill(Arc::clone(&bill))));
    for id in 0..3 {
        let mut r = request(id, 10, 12);
        r.class = id;
        s.add(r).unwrap();
    }
    let mut computed = [0; 3];
    while s.has_work() {
        for id in 0..3 {
            s.set_drafts(RequestId(id), 0, &[7, 8]);
        }
        let plan = s.schedule().unwrap();
        for row in &plan.rows {
            let (id, ..) = s.occupant(row.slot).unwrap();
            computed[id.0 as usize] += row.len as usize;
        }
        s.apply(output(&plan, 7), &mut Vec::new()).unwrap();
        assert_eq!(*bill.lock().unwrap(), computed);
    }
    assert!(s.stats().totals.preemptions > 0);
}
