//! Bad clients must not be noticed by good ones.

use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};

use crate::bad_requests::{self, Bad};
use crate::client::{Server, endless, request};

const PATH: &str = "/v1/completions";
const GOOD: usize = 32;
const DROPPED: usize = 200;

/// Half of them share a beginning, half draw at random with a seed.
fn good(number: usize) -> Value {
    let mut body = endless(&format!("Once upon a time there were {number} cats"), 40);
    if number % 2 == 1 {
        body["temperature"] = json!(1.0);
        body["seed"] = json!(number);
    }
    body["return_token_ids"] = json!(true);
    body["stream"] = json!(true);
    body
}

fn tokens(server: &Server, body: &Value) -> Vec<Value> {
    server
        .stream(PATH, body)
        .flat_map(|chunk| {
            assert!(chunk["error"].is_null(), "{chunk}");
            chunk["choices"][0]["token_ids"]
                .as_array()
                .cloned()
                .unwrap()
        })
        .collect()
}

fn check(server: &Server, bad: &Bad) {
    let answer = server.raw(&bad.bytes);
    assert_eq!(answer.status, bad.status, "{}: {answer:?}", bad.name);
    // What is no HTTP at all is answered by the HTTP library, without a body.
    if !answer.body.is_empty() {
        let error = answer.error();
        if let Some(param) = bad.param {
            assert_eq!(error["param"], param, "{}: {error}", bad.name);
        }
        assert!(answer.body.len() < 2000, "{}: a long error", bad.name);
    }
}

#[test]
fn good_streams_among_bad_requests_get_the_tokens_they_get_alone() {
    let server = Server::start(&["--max-body-size", "2M"]);
    let alone: Vec<_> = (0..GOOD).map(|n| tokens(&server, &good(n))).collect();
    let bad = bad_requests::all();
    assert!(bad.len() >= 40);
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for (number, expected) in alone.iter().enumerate() {
            let server = &server;
            scope.spawn(move || {
                assert_eq!(tokens(server, &good(number)), *expected, "{number}");
            });
        }
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(one) = bad.get(next.fetch_add(1, Ordering::Relaxed)) {
                    check(&server, one);
                }
            });
        }
        scope.spawn(|| {
            // Connections that go away: before, while and after they are answered.
            for number in 0..DROPPED {
                let body = good(number).to_string();
                let mut stream = server.connect();
                let bytes = request(PATH, "", body.as_bytes());
                let cut = if number % 3 == 0 {
                    bytes.len() / 2
                } else {
                    bytes.len()
                };
                stream.write_all(&bytes[..cut]).unwrap();
            }
        });
    });
    server.wait_empty();
    assert_eq!(server.get("/health").status, 200);
    assert_eq!(tokens(&server, &good(0)), alone[0]);
}
