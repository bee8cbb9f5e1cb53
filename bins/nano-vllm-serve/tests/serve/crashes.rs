//! What clients see when the server dies, and a disk that is full.

use std::io::{Read, Write};
use std::process::Stdio;

use serde_json::{Value, json};

use crate::client::{Events, Server, command, endless, request};

const PATH: &str = "/v1/completions";

/// Streams that are in the middle of their answers.
fn begun(server: &Server, count: usize) -> Vec<Events> {
    let mut body = endless("a", 1000);
    body["stream"] = json!(true);
    let mut streams: Vec<_> = (0..count).map(|_| server.stream(PATH, &body)).collect();
    for stream in &mut streams {
        stream.next().unwrap();
    }
    streams
}

#[test]
fn a_killed_server_leaves_nobody_waiting_and_starts_again_on_its_port() {
    let server = Server::fake(10, &[]);
    let address = server.address;
    let streams = begun(&server, 8);
    let mut whole = server.connect();
    whole
        .write_all(&request(
            PATH,
            "",
            endless("b", 1000).to_string().as_bytes(),
        ))
        .unwrap();
    server.signal("KILL");
    assert!(server.wait().code().is_none());
    for stream in streams {
        let rest = stream.rest();
        assert!(!rest.contains("[DONE]"), "{rest}");
    }
    let mut answer = String::new();
    // The end of the connection or a reset: an error for every HTTP client.
    let _ = whole.read_to_string(&mut answer);
    assert_eq!(answer, "");
    let again = Server::fake(0, &["--port", &address.port().to_string()]);
    assert_eq!(again.address, address);
    again.ok(PATH, &endless("c", 4));
}

#[test]
fn a_panic_of_the_runner_ends_every_request_with_an_error_and_then_the_process() {
    let server = Server::fake(20, &["--fake-runner-panic-at-step", "40"]);
    let streams = begun(&server, 8);
    let whole = server.post(PATH, &endless("b", 1000));
    assert_eq!(whole.status, 500, "{}", whole.text());
    let message = "the engine has stopped: it failed unexpectedly, its log says more";
    assert_eq!(whole.error()["message"], message);
    for stream in streams {
        let chunks: Vec<Value> = stream.collect();
        let (last, good) = chunks.split_last().unwrap();
        assert_eq!(last["error"]["code"], 500, "{last}");
        assert_eq!(last["error"]["message"], message);
        assert!(good.iter().all(|chunk| chunk["error"].is_null()));
    }
    assert_eq!(server.wait().code(), Some(1));
}

#[test]
fn a_log_on_a_full_disk_stops_nobody() {
    let full = std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();
    for format in ["pretty", "json"] {
        let flags = ["--log-format", format, "--enable-log-requests"];
        let mut command = command(&flags);
        command.stderr(Stdio::from(full.try_clone().unwrap()));
        let server = Server::begin(command);
        let mut body = endless("a", 4);
        // Each of them is worth a warning.
        body["unknown"] = json!(1);
        let first = server.ok(PATH, &body);
        for _ in 0..20 {
            assert_eq!(server.ok(PATH, &body)["choices"], first["choices"]);
        }
        server.signal("TERM");
        assert_eq!(server.wait().code(), Some(0));
    }
}
