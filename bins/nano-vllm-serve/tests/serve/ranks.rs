//! A model on several ranks, seen by clients: nothing is different, unless a rank is lost.

use std::net::TcpListener;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::{Server, command, endless};

const PATH: &str = "/v1/completions";
const LONG: Duration = Duration::from_secs(60);

/// Requests of all kinds: greedy, seeded, with several answers, with log-probabilities, streamed.
fn bodies() -> Vec<Value> {
    let body = |number: usize, more: Value| {
        let mut body = endless(&format!("Once there were {number} cats"), 24);
        body["return_token_ids"] = json!(true);
        let fields = more.as_object().unwrap().clone();
        body.as_object_mut().unwrap().extend(fields);
        body
    };
    vec![
        body(1, json!({})),
        body(2, json!({"temperature": 0.8, "seed": 5, "n": 3})),
        body(3, json!({"logprobs": 2})),
        body(
            4,
            json!({"temperature": 1.0, "seed": 6, "frequency_penalty": 0.5}),
        ),
        body(5, json!({"logit_bias": {"7": 3.5}, "min_tokens": 5})),
        body(6, json!({"prompt_logprobs": 1, "max_tokens": 3})),
    ]
}

/// The token ids of all answers to all requests, which come at the same time.
fn answers(server: &Server) -> Vec<Vec<Value>> {
    let ids = |choices: &Value| -> Vec<Value> {
        let choices = choices.as_array().unwrap().iter();
        let mut answers: Vec<_> = choices
            .map(|choice| (choice["index"].as_u64(), choice["token_ids"].clone()))
            .collect();
        answers.sort_by_key(|(index, _)| *index);
        answers.into_iter().map(|(_, ids)| ids).collect()
    };
    let bodies = bodies();
    thread::scope(|scope| {
        let ask = |body| scope.spawn(move || ids(&server.ok(PATH, body)["choices"]));
        let asked: Vec<_> = bodies.iter().map(ask).collect();
        asked.into_iter().map(|one| one.join().unwrap()).collect()
    })
}

#[test]
fn clients_see_no_difference() {
    let alone = answers(&Server::start(&[]));
    assert!(
        alone
            .iter()
            .flatten()
            .all(|ids| !ids.as_array().unwrap().is_empty())
    );
    for flags in [
        &["--tp", "2"][..],
        &["--pp", "2"],
        &["--tp", "2", "--pp", "2"],
    ] {
        let server = Server::start(flags);
        assert_eq!(answers(&server), alone, "{flags:?}");
        // A client that leaves gives its blocks back on every rank.
        let mut body = endless("a", 900);
        body["stream"] = json!(true);
        let mut stream = server.stream(PATH, &body);
        stream.next().unwrap();
        drop(stream);
        server.wait_empty();
        assert_eq!(answers(&server), alone, "{flags:?}");
        server.signal("TERM");
        assert_eq!(server.wait().code(), Some(0));
    }
}

/// A server and the process that is its rank 1.
struct Two {
    server: Option<Server>,
    rank_1: Child,
}

impl Two {
    fn start(division: &str, timeout: &str) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port().to_string();
        drop(listener);
        let rank = |rank: &str| {
            let mut command = command(&[division, "2", "--distributed-timeout", timeout]);
            command
                .env("RANK", rank)
                .env("WORLD_SIZE", "2")
                .env("MASTER_ADDR", "127.0.0.1")
                .env("MASTER_PORT", &port)
                .env("NANO_VLLM_SECRET", "a secret of these tests");
            command
        };
        let rank_1 = rank("1").spawn().unwrap();
        let mut two = Self {
            server: None,
            rank_1,
        };
        two.server = Some(Server::begin(rank("0")));
        two
    }

    fn server(&self) -> &Server {
        self.server.as_ref().unwrap()
    }

    fn signal(&self, signal: &str) {
        let pid = self.rank_1.id().to_string();
        let sent = Command::new("kill").args(["-s", signal, &pid]).status();
        assert!(sent.unwrap().success());
    }

    /// Rank 1's exit code, which must come.
    fn rank_1_ends(&mut self) -> Option<i32> {
        let until = Instant::now() + LONG;
        loop {
            if let Some(status) = self.rank_1.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < until, "rank 1 does not end");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Two {
    fn drop(&mut self) {
        let _ = self.rank_1.kill();
        let _ = self.rank_1.wait();
    }
}

#[test]
fn a_slow_rank_does_not_end_the_service() {
    let alone = answers(&Server::start(&[]));
    for division in ["--tp", "--pp"] {
        let mut two = Two::start(division, "60");
        thread::scope(|scope| {
            let asked = scope.spawn(|| answers(two.server()));
            // It stands still for 50 ms of every 60, longer than any step takes.
            let until = Instant::now() + LONG;
            while !asked.is_finished() {
                assert!(Instant::now() < until, "the answers do not come");
                two.signal("STOP");
                thread::sleep(Duration::from_millis(50));
                two.signal("CONT");
                thread::sleep(Duration::from_millis(10));
            }
            assert_eq!(asked.join().unwrap(), alone, "{division}");
        });
        let server = two.server.take().unwrap();
        server.signal("TERM");
        assert_eq!(server.wait().code(), Some(0));
        assert_eq!(two.rank_1_ends(), Some(0));
    }
}

#[test]
fn a_lost_rank_ends_every_stream_with_an_error() {
    for (division, signal, why) in [
        ("--pp", "KILL", "rank 1 of 2: its connection closed"),
        ("--tp", "STOP", "rank 1 of 2: sent nothing for"),
    ] {
        let mut two = Two::start(division, "8");
        let mut body = endless("a", 1000);
        body["stream"] = json!(true);
        let mut streams: Vec<_> = (0..3).map(|_| two.server().stream(PATH, &body)).collect();
        for stream in &mut streams {
            stream.next().unwrap();
        }
        let start = Instant::now();
        two.signal(signal);
        for stream in streams {
            let last = stream.last().unwrap();
            let message = last["error"]["message"].as_str().unwrap_or_default();
            assert!(message.contains(why), "{last}");
        }
        println!(
            "{division} {signal}: streams ended after {:?}",
            start.elapsed()
        );
        let server = two.server.take().unwrap();
        assert_eq!(server.wait().code(), Some(1));
    }
}
