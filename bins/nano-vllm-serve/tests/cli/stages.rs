//! Pipeline stages: threads and processes, and stages that are lost or slow.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::{SMALL, Scratch, run};
use crate::ranks::{DECODE, PREFILL, Ranks, SLACK, TIMEOUT, questions, texts};

/// Ways to divide, and how many ranks each takes.
const DIVISIONS: [(&[&str], usize); 3] = [
    (&["--pp", "2"], 2),
    (&["--tp", "2", "--pp", "2"], 4),
    (&["--pp", "3", "--pp-layer-partition", "1,5,2"], 3),
];

#[test]
fn answers_do_not_depend_on_stages() {
    let dir = Scratch::new();
    let input = questions(&dir);
    let args = ["run-batch", "-i", &input, "-o", "-"];
    let answers = |division: &[&str]| {
        let ran = run(&[&args, &SMALL[..], division].concat(), b"");
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        texts(&ran.stdout)
    };
    let alone = answers(&[]);
    assert_eq!(alone.len(), 5);
    for text in &alone[4].1 {
        let sum: serde_json::Value = serde_json::from_str(text).expect(text);
        assert!(sum["sum"].is_u64(), "{text}");
    }
    for (division, count) in DIVISIONS {
        assert_eq!(answers(division), alone, "{division:?}");
        // One step under way at a time: the same, slower.
        if count == 2 {
            assert_eq!(answers(&[division, &["--no-overlap"]].concat()), alone);
        }
        let ranks = Ranks::start_as(count, &[&args, division].concat(), |_| vec![]);
        for (rank, output) in ranks.ends(None, Duration::from_secs(60)) {
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(0), "rank {rank}: {said}");
            let answers = String::from_utf8(output.stdout).unwrap();
            match rank {
                0 => assert_eq!(texts(&answers), alone, "{division:?}"),
                _ => assert_eq!(answers, ""),
            }
        }
    }
}

#[test]
fn what_cannot_be_divided_into_stages_is_refused_with_what_can() {
    for (args, why) in [
        (&["--pp", "9"][..], "sizes that do: 1 to 8"),
        (&["--pp", "0"], "pipeline_parallel_size: must be at least 1"),
        (
            &["--pp", "2", "--pp-layer-partition", "5,4"],
            "5,4 adds up to 9, but this model has 8 layers; one that does: 4,4",
        ),
        (
            &["--pp", "2", "--pp-layer-partition", "8,0"],
            "leaves a stage without a layer",
        ),
        (
            &["--pp-layer-partition", "4,4"],
            "has 2 numbers for 1 stages",
        ),
        (&["--pp-layer-partition", "4,x"], "invalid digit"),
    ] {
        let ran = run(&[&["demo", "--plain"], &SMALL[..], args].concat(), b"");
        assert_ne!(ran.code, Some(0));
        assert!(ran.stderr.contains(why), "{}", ran.stderr);
    }
    let division = ["--tp", "2", "--pp", "2"];
    let ranks = Ranks::start_as(2, &[&DECODE[..], &division].concat(), |_| vec![]);
    for (rank, output) in ranks.ends(None, TIMEOUT + SLACK) {
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "rank {rank}: {said}");
        let fits = "started 2 processes (WORLD_SIZE); use tensor_parallel_size 1 or \
                    pipeline_parallel_size 1 or 4 processes";
        assert!(said.contains(fits), "{said}");
    }
}

#[test]
fn a_stage_that_is_lost_ends_the_others() {
    for (work, lost, signal, why) in [
        (PREFILL, 1, "-KILL", "connection closed"),
        (DECODE, 2, "-KILL", "connection closed"),
        (PREFILL, 2, "-STOP", "sent nothing for"),
        (DECODE, 1, "-STOP", "sent nothing for"),
    ] {
        let mut ranks = Ranks::start_as(3, &[&work[..], &["--pp", "3"]].concat(), |_| vec![]);
        ranks.wait_ready();
        ranks.signal(lost, signal);
        let start = Instant::now();
        let ends = ranks.ends(Some(lost), TIMEOUT + SLACK);
        println!(
            "{} {signal} of stage {lost}: all ended after {:?}",
            work[5],
            start.elapsed()
        );
        assert_eq!(ends.len(), 2);
        for (rank, output) in ends {
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "rank {rank}: {said}");
            let named = said.contains(&format!("rank {lost} of 3"));
            assert!(named && said.contains(why), "rank {rank}: {said}");
            assert!(!said.contains("panicked"), "{said}");
        }
    }
}

#[test]
fn a_stage_that_is_slow_is_waited_for() {
    let dir = Scratch::new();
    let input = questions(&dir);
    let args = ["run-batch", "-i", &input, "-o", "-"];
    let alone = texts(&run(&[&args, &SMALL[..]].concat(), b"").stdout);
    for division in [["--pp", "2"], ["--tp", "2"]] {
        let ranks = Ranks::start_as(2, &[&args[..], &division].concat(), |_| vec![]);
        let pid = ranks.id(1).to_string();
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            // It stands still for 50 ms of every 60: longer than any step takes.
            scope.spawn(|| {
                let kill = |signal: &str| {
                    let sent = std::process::Command::new("kill")
                        .args([signal, pid.as_str()])
                        .output();
                    sent.is_ok_and(|output| output.status.success())
                };
                let until = Instant::now() + Duration::from_secs(100);
                while !over.load(Ordering::Relaxed) && Instant::now() < until && kill("-STOP") {
                    thread::sleep(Duration::from_millis(50));
                    if !kill("-CONT") {
                        break;
                    }
                    thread::sleep(Duration::from_millis(10));
                }
            });
            let start = Instant::now();
            let ends = ranks.ends(None, Duration::from_secs(90));
            over.store(true, Ordering::Relaxed);
            println!("{division:?}, slow rank 1: {:?}", start.elapsed());
            for (rank, output) in ends {
                let said = String::from_utf8_lossy(&output.stderr);
                assert_eq!(output.status.code(), Some(0), "rank {rank}: {said}");
                if rank == 0 {
                    assert_eq!(texts(&String::from_utf8(output.stdout).unwrap()), alone);
                }
            }
        });
    }
}
