//! The bounded queue and the observer of the asynchronous engine, on a fake model.

mod common;

use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::*;
use engine::{AsyncEngine, AsyncOptions, QueueLimits, RequestError, Stats};

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < deadline, "never {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_full_queue_refuses_and_an_observer_sees_the_end() {
    let setup = Setup::default();
    let (permits, gate) = channel();
    let mut runner = setup.runner();
    runner.permits = Some(gate);
    let seen: Arc<Mutex<Vec<(Stats, bool)>>> = Arc::default();
    let observed = seen.clone();
    let options = AsyncOptions {
        queue: QueueLimits {
            max_num_queued_reqs: Some(2),
            ..QueueLimits::default()
        },
        observer: Some(Box::new(move |stats, working| {
            // Long enough for a reader to look before this, if an answer went out first.
            std::thread::sleep(Duration::from_millis(5));
            observed.lock().unwrap().push((*stats, working));
        })),
    };
    let engine =
        AsyncEngine::start_with(setup.core_with(runner), setup.frontend(), options).unwrap();
    let send = || engine.generate(request("abc", greedy(5)));
    let (first, second) = (send().unwrap(), send().unwrap());
    assert_eq!(engine.num_queued(), 2);
    assert_eq!(
        send().err(),
        Some(RequestError::QueueFull {
            limit: 2,
            what: "requests"
        }),
        "no step has touched the two before"
    );
    // A bad request does not take a place.
    assert!(engine.generate(request("", greedy(5))).is_err());
    drop(permits);
    let text = |s: engine::TokenStream| s.blocking_collect().unwrap().outputs[0].text.clone();
    assert_eq!(
        (text(first), text(second)),
        ("defgh".into(), "defgh".into())
    );
    let (last, _) = *seen.lock().unwrap().last().unwrap();
    assert_eq!(
        (last.running, last.waiting),
        (0, 0),
        "figures of before the answer"
    );
    wait_until("empty", || engine.num_queued() == 0);
    // A dropped request leaves the queue too.
    for _ in 0..20 {
        drop(send().unwrap());
        wait_until("empty", || engine.num_queued() == 0);
    }
    wait_until("idle", || {
        let seen = seen.lock().unwrap();
        let (stats, working) = seen.last().unwrap();
        !working && stats.kv_used_blocks == 0 && stats.running == 0
    });
    assert!(seen.lock().unwrap()[0].1, "work came to an idle engine");
}
