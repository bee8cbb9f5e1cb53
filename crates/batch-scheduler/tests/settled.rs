//! What follows when tokens are computed: full blocks are offered to others, blocks behind the window
//! go back, and no memory is allocated for a step like the one before.

mod common;

use batch_scheduler::SchedulerConfig;
use common::manual::*;
use paged_kv::{KvAllocator, Salt};

#[test]
fn a_block_can_be_found_as_soon_as_it_is_full() {
    for prompt in 1..9 {
        let mut s = scheduler(config(), 32);
        let r = request(0, prompt, 20);
        let mut known = r.prompt.clone();
        s.add(r).unwrap();
        for token in 50..68 {
            let computed = known.len();
            step(&mut s, token);
            known.push(token);
            known.push(0); // the last token of a prompt is never found
            let found = s.kv_mut().match_prefix(&known, Salt::NONE);
            assert_eq!(found, computed / 4 * 4, "{computed} computed of {prompt}");
            known.pop();
        }
    }
}

#[test]
fn a_block_goes_back_as_soon_as_the_window_has_left_it() {
    for window in 1..10 {
        let config = SchedulerConfig {
            sliding_window: Some(window),
            ..config()
        };
        let mut s = scheduler(config, 32);
        s.add(request(0, 3, 28)).unwrap();
        for done in 3..30 {
            step(&mut s, 7);
            // Position `done` comes next and sees `window` positions.
            let first = (done + 1u32).saturating_sub(window);
            let held = done.div_ceil(4).max(first / 4) - first / 4;
            assert_eq!(
                s.stats().kv_used_blocks as u32,
                held,
                "{done} under {window}"
            );
        }
    }
}

#[test]
fn a_recycled_plan_makes_the_next_step_cost_no_allocation() {
    let config = SchedulerConfig {
        max_num_seqs: 64,
        max_num_batched_tokens: 512,
        ..config()
    };
    let mut s = scheduler(config, 999);
    for id in 0..64 {
        s.add(request(id, 4, 28)).unwrap();
    }
    let mut events: Vec<News> = Vec::with_capacity(99);
    let mut least = u64::MAX;
    for _ in 0..10 {
        let mut plan = None;
        let cost = allocation_counter::measure(|| plan = s.schedule());
        least = least.min(cost.count_total);
        let plan = plan.expect("a step");
        s.apply(output(&plan, 7), &mut events).unwrap();
        events.clear();
        s.recycle(plan);
    }
    assert_eq!(least, 0);
}
