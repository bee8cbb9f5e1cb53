//! One model on several ranks: threads, processes, processes under torchrun; and processes that
//! are lost.

use std::io::Read;
use std::net::TcpListener;
use std::process::{Child, Command, Output};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::{SMALL, Scratch, program, run};

/// What a lost rank may cost, and what starting and ending cost beside it on a busy machine.
pub const TIMEOUT: Duration = Duration::from_secs(8);
pub const SLACK: Duration = Duration::from_secs(40);

/// Questions, one with two answers, one with log-probabilities, one drawn at random.
pub fn questions(dir: &Scratch) -> String {
    let body = |more: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "What is 3 plus 4?"}]});
        let fields = more.as_object().unwrap().clone();
        body.as_object_mut().unwrap().extend(fields);
        body
    };
    let bodies = [
        body(json!({"temperature": 0, "max_tokens": 40})),
        body(json!({"temperature": 0.9, "seed": 3, "n": 2, "max_tokens": 40})),
        body(json!({"temperature": 0, "logprobs": true, "max_tokens": 12})),
        body(json!({"temperature": 0, "max_tokens": 60, "messages": [
            {"role": "user", "content": "Name a colour, and then tell me of the sea."}]})),
        // Masks reach the rank that samples.
        body(
            json!({"seed": 5, "n": 2, "max_tokens": 60, "structured_outputs": {
            "json": {"type": "object", "required": ["sum"], "additionalProperties": false,
                     "properties": {"sum": {"type": "integer", "maximum": 99, "minimum": 0}}}}}),
        ),
    ];
    let lines = bodies.into_iter().enumerate().map(|(at, body)| {
        json!({"custom_id": at.to_string(), "method": "POST", "url": "/v1/chat/completions",
               "body": body})
        .to_string()
    });
    dir.file("questions.jsonl", lines.collect::<Vec<_>>().join("\n"))
}

/// The texts of all answers, by line.
pub fn texts(output: &str) -> Vec<(String, Vec<String>)> {
    let mut answers: Vec<_> = output
        .lines()
        .map(|line| {
            let line: Value = serde_json::from_str(line).unwrap();
            let choices = line["response"]["body"]["choices"].as_array().unwrap();
            let texts = choices.iter().map(|choice| {
                let text = choice["message"]["content"].as_str().unwrap();
                assert!(!text.is_empty());
                text.to_owned()
            });
            (line["custom_id"].to_string(), texts.collect())
        })
        .collect();
    answers.sort();
    answers
}

fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    listener.local_addr().unwrap().port()
}

/// Processes that are ranks, as a launcher without a store would start them.
pub struct Ranks(Vec<Child>);

impl Ranks {
    pub fn start(count: usize, args: &[&str], own: impl Fn(usize) -> Vec<&'static str>) -> Self {
        let ranks = count.to_string();
        Self::start_as(count, &[args, &["--tp", &ranks]].concat(), own)
    }

    /// As [`Ranks::start`], without saying what they divide.
    pub fn start_as(count: usize, args: &[&str], own: impl Fn(usize) -> Vec<&'static str>) -> Self {
        let (port, ranks) = (free_port().to_string(), count.to_string());
        let timeout = TIMEOUT.as_secs().to_string();
        let start = |rank: usize| {
            let mut command = program(args);
            command
                .args(SMALL)
                .args(["--distributed-timeout", &timeout])
                .args(own(rank))
                .env("RUST_LOG", "engine=info")
                .env("RANK", rank.to_string())
                .env("WORLD_SIZE", &ranks)
                .env("MASTER_ADDR", "127.0.0.1")
                .env("MASTER_PORT", &port)
                .env("NANO_VLLM_SECRET", "a secret of these tests");
            command.spawn().unwrap()
        };
        Self((0..count).map(start).collect())
    }

    pub fn signal(&self, rank: usize, signal: &str) {
        let pid = self.0[rank].id().to_string();
        let done = Command::new("kill").args([signal, &pid]).status().unwrap();
        assert!(done.success());
    }

    /// Waits until all ranks have what they need to take steps, and rank 0 is about to plan some.
    pub fn wait_ready(&mut self) {
        let (sender, receiver) = channel();
        let mut stderr = self.0[0].stderr.take().unwrap();
        thread::spawn(move || {
            let (mut said, mut byte) = (Vec::new(), [0]);
            while !said.ends_with(b"memory of rank") && stderr.read(&mut byte).is_ok_and(|n| n == 1)
            {
                said.extend(byte);
            }
            let _ = sender.send((stderr, said));
        });
        let (stderr, said) = receiver
            .recv_timeout(Duration::from_secs(60))
            .expect("the ranks get ready");
        let said = String::from_utf8_lossy(&said).into_owned();
        assert!(said.contains("memory of rank"), "rank 0 ended: {said}");
        self.0[0].stderr = Some(stderr);
        // It plans; where in its work it is met is left to chance.
        thread::sleep(Duration::from_millis(400));
    }

    /// The process of a rank.
    pub fn id(&self, rank: usize) -> u32 {
        self.0[rank].id()
    }

    /// What all of them but `lost` said at their end, which must come within `time`.
    pub fn ends(mut self, lost: Option<usize>, time: Duration) -> Vec<(usize, Output)> {
        let deadline = Instant::now() + time;
        let mut outputs = Vec::new();
        // A rank that was stopped stays so until the others have ended.
        let _lost = lost.map(|rank| Self(vec![self.0.remove(rank)]));
        for (at, mut child) in self.0.drain(..).enumerate() {
            let rank = at + usize::from(lost.is_some_and(|lost| at >= lost));
            while child.try_wait().unwrap().is_none() {
                if Instant::now() > deadline {
                    let _ = child.kill();
                    let output = child.wait_with_output().unwrap();
                    let said = String::from_utf8_lossy(&output.stderr).into_owned();
                    panic!("rank {rank} still runs after {time:?}; it said: {said}");
                }
                thread::sleep(Duration::from_millis(20));
            }
            outputs.push((rank, child.wait_with_output().unwrap()));
        }
        outputs
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[test]
fn answers_do_not_depend_on_ranks() {
    let dir = Scratch::new();
    let input = questions(&dir);
    let args = ["run-batch", "-i", &input, "-o", "-"];
    let answers = |ranks: &str| {
        let ran = run(&[&args, &SMALL[..], &["--tp", ranks]].concat(), b"");
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        texts(&ran.stdout)
    };
    let alone = answers("1");
    assert_eq!(alone.len(), 5);
    assert_eq!(answers("2"), alone);
    assert_eq!(answers("4"), alone);
    for count in [2, 4] {
        let start = Instant::now();
        let ends = Ranks::start(count, &args, |_| vec![]).ends(None, Duration::from_secs(60));
        println!("{count} processes: {:?}", start.elapsed());
        for (rank, output) in ends {
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(0), "rank {rank}: {said}");
            let answers = String::from_utf8(output.stdout).unwrap();
            match rank {
                0 => assert_eq!(texts(&answers), alone, "{count} processes"),
                _ => assert_eq!(answers, ""),
            }
        }
    }
}

#[test]
fn torchrun_starts_ranks() {
    let torchrun = std::env::var("TORCHRUN").unwrap_or_else(|_| "torchrun".to_owned());
    if Command::new(&torchrun).arg("--help").output().is_err() {
        println!("skipped: no {torchrun}; pip install torch, or set TORCHRUN");
        return;
    }
    let dir = Scratch::new();
    let input = questions(&dir);
    let args = ["run-batch", "-i", &input, "-o", "-"];
    let alone = texts(&run(&[&args, &SMALL[..]].concat(), b"").stdout);
    let under = |processes: usize, more: &[&str]| {
        Command::new(&torchrun)
            .args(["--standalone", "--no-python"])
            .arg(format!("--nproc-per-node={processes}"))
            .arg(env!("CARGO_BIN_EXE_nano-vllm-serve"))
            .args([&args, &SMALL[..], more].concat())
            .output()
            .unwrap()
    };
    for (processes, division) in [
        (2, &["--tp", "2"][..]),
        (2, &["--pp", "2"]),
        (
            4,
            &["--tp", "2", "--pp", "2", "--pp-layer-partition", "5,3"],
        ),
    ] {
        let start = Instant::now();
        let output = under(processes, division);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        assert_eq!(texts(&String::from_utf8(output.stdout).unwrap()), alone);
        println!("torchrun, {division:?}: {:?}", start.elapsed());
    }
    // Rank 0's failure is the launcher's, and so is a wrong number of ranks.
    let output = under(2, &["--tp", "2", "--max-model-len", "1000000"]);
    assert!(!output.status.success());
    let output = under(2, &["--tp", "4"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && said.contains("started 2 processes"),
        "{said}"
    );
}

/// Work that takes long: nothing but prompts, or nothing but decoding.
pub const PREFILL: [&str; 8] = [
    "bench",
    "throughput",
    "--num-prompts",
    "4000",
    "--random-input-len",
    "900",
    "--random-output-len",
    "1",
];
pub const DECODE: [&str; 8] = [
    "bench",
    "throughput",
    "--num-prompts",
    "400",
    "--random-input-len",
    "4",
    "--random-output-len",
    "900",
];

/// Ends rank `lost` of two by `signal`, at work or at once, and expects all to say so.
fn lose(work: &[&str], lost: usize, signal: &str, at_work: bool, says: &[&str]) {
    let mut ranks = Ranks::start(2, work, |_| vec![]);
    if at_work {
        ranks.wait_ready();
    }
    ranks.signal(lost, signal);
    let start = Instant::now();
    let ends = ranks.ends(Some(lost), TIMEOUT + SLACK);
    println!(
        "{} tokens, {signal} of rank {lost}, at work: {at_work}: all ended after {:?}",
        work[5],
        start.elapsed()
    );
    assert_eq!(ends.len(), 1);
    for (rank, output) in ends {
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "rank {rank}: {said}");
        let named = said.contains(&format!("rank {lost} of 2"));
        assert!(
            named && says.iter().any(|why| said.contains(why)),
            "rank {rank}: {said}"
        );
        assert!(!said.contains("panicked"), "{said}");
    }
}

#[test]
fn a_rank_that_is_killed_ends_the_others() {
    let closed = ["connection closed"];
    for work in [PREFILL, DECODE] {
        for lost in [0, 1] {
            lose(&work, lost, "-KILL", true, &closed);
        }
    }
}

#[test]
fn a_rank_that_stops_ends_the_others() {
    let silent = ["sent nothing for"];
    for work in [PREFILL, DECODE] {
        for lost in [0, 1] {
            lose(&work, lost, "-STOP", true, &silent);
        }
    }
}

#[test]
fn a_rank_that_never_comes_ends_the_others() {
    let absent = [
        "did not connect",
        "cannot be reached",
        "connection closed",
        "sent nothing",
    ];
    for lost in [0, 1] {
        for signal in ["-KILL", "-STOP"] {
            lose(&DECODE, lost, signal, false, &absent);
        }
    }
}

#[test]
fn a_rank_that_was_started_otherwise_is_named() {
    let own = |rank| match rank {
        1 => vec!["--load-format", "dummy"],
        _ => vec![],
    };
    for (rank, output) in Ranks::start(3, &DECODE, own).ends(None, TIMEOUT + SLACK) {
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "rank {rank}: {said}");
        // Four heads among three ranks come later: this is said first.
        assert!(
            said.contains("rank 1 of 3: was started with another load format"),
            "{said}"
        );
    }
}

#[test]
fn exit_codes_and_errors_reach_all_ranks() {
    // Rank 0 cannot read its input.
    let args = ["run-batch", "-i", "/no/such/file", "-o", "-"];
    for (rank, output) in Ranks::start(2, &args, |_| vec![]).ends(None, TIMEOUT + SLACK) {
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "rank {rank}: {said}");
        assert_eq!(
            said.contains("/no/such/file"),
            rank == 0,
            "rank {rank}: {said}"
        );
    }
    for (args, why) in [
        (["--tp", "3"], "sizes that do: 1, 2, 4"),
        (["--tp", "0"], "tensor_parallel_size"),
        (["--distributed-timeout", "0"], "between 0.1"),
    ] {
        let ran = run(&[&["demo", "--plain"], &SMALL[..], &args].concat(), b"");
        assert_ne!(ran.code, Some(0));
        assert!(ran.stderr.contains(why), "{}", ran.stderr);
    }
}

#[test]
fn the_collective_bench_prints_a_table() {
    let args = [
        "bench",
        "collective",
        "--max-bytes",
        "64k",
        "--num-iters",
        "10",
    ];
    let ran = run(&[&args[..], &["--tp", "2"]].concat(), b"");
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert_eq!(ran.stdout.lines().count(), 2 + 4, "{}", ran.stdout);
    for (rank, output) in Ranks::start(2, &args, |_| vec![]).ends(None, Duration::from_secs(30)) {
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "rank {rank}: {said}");
        let table = String::from_utf8(output.stdout).unwrap();
        assert_eq!(table.lines().count(), if rank == 0 { 6 } else { 0 });
    }
    assert!(run(&args, b"").error(1).contains("set --tp to 2"));
}
