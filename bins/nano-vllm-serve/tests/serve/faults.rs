//! Bad clients must not be noticed by good ones.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::bad_requests::{self, Bad};
use crate::client::{Server, endless, request};

const PATH: &str = "/v1/completions";
const GOOD: usize = 32;
const DROPPED: usize = 1000;
const LORISES: usize = 50;

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

/// A connection that goes away in the middle of its body, before the answer, or in its middle.
fn go_away(server: &Server, number: usize) {
    let bytes = request(PATH, "", good(number).to_string().as_bytes());
    let mut stream = server.connect();
    match number % 4 {
        0 => stream.write_all(&bytes[..bytes.len() - 9]).unwrap(),
        1 => {
            // Says that nothing more comes, and waits for what the server says to that.
            stream.write_all(&bytes[..bytes.len() - 9]).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            let mut answer = String::new();
            let _ = stream.read_to_string(&mut answer);
            let refused = answer.starts_with("HTTP/1.0 400");
            assert!(answer.is_empty() || refused, "{answer}");
        }
        2 => stream.write_all(&bytes).unwrap(),
        _ => {
            stream.write_all(&bytes).unwrap();
            let mut begin = [0; 300];
            stream.read_exact(&mut begin).unwrap();
            assert!(begin.starts_with(b"HTTP/1.0 200"), "{begin:?}");
        }
    }
}

/// Connections that bring a byte now and then, and never a whole request. They are cut off.
fn slow_lorises(server: &Server) {
    let mut open: Vec<_> = (0..LORISES).map(|_| server.connect()).collect();
    for stream in &open {
        stream.set_nonblocking(true).unwrap();
    }
    let started = Instant::now();
    let mut bytes = b"POST /v1/completions HTTP/1.1\r\n"
        .iter()
        .chain(b"X-Field: a\r\n".iter().cycle());
    while !open.is_empty() {
        let waited = started.elapsed();
        assert!(waited < Duration::from_secs(120), "{} stay", open.len());
        let byte = [*bytes.next().unwrap()];
        open.retain_mut(|stream| {
            let sent = stream.write(&byte).is_ok();
            // Whatever the server says, the end of the connection follows.
            let mut answer = [0; 1000];
            let closed = match stream.read(&mut answer) {
                Ok(read) => read == 0,
                Err(error) => error.kind() != ErrorKind::WouldBlock,
            };
            sent && !closed
        });
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn good_streams_among_bad_requests_get_the_tokens_they_get_alone() {
    let server = Server::start(&["--max-body-size", "2M", "--client-timeout", "3"]);
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
        scope.spawn(|| (0..DROPPED).for_each(|number| go_away(&server, number)));
        scope.spawn(|| slow_lorises(&server));
    });
    server.wait_empty();
    assert_eq!(server.get("/health").status, 200);
    assert_eq!(tokens(&server, &good(0)), alone[0]);
}
