//! Overload, timeouts, slow clients, and a model that hangs.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::{Server, endless};

const PATH: &str = "/v1/completions";

fn streamed(max_tokens: u32) -> Value {
    let mut body = endless("a", max_tokens);
    body["stream"] = json!(true);
    body
}

#[test]
fn a_full_queue_says_so() {
    let flags = ["--max-num-seqs", "1", "--max-num-queued-reqs", "1"];
    let server = Server::fake(20, &flags);
    let mut running = server.stream(PATH, &streamed(900));
    running.next().unwrap();
    // The first token comes before the figures of the step that made it.
    server.wait_metric("num_requests_waiting", 0.0);
    let waiting = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| server.post(PATH, &endless("b", 2)));
        server.wait_metric("num_requests_waiting", 1.0);
        let refused = server.post(PATH, &endless("c", 2));
        assert_eq!(refused.status, 503, "{}", refused.text());
        assert_eq!(refused.error()["type"], "Service Unavailable");
        assert!(refused.header("retry-after").is_some());
        let metrics = server.get("/metrics").text();
        assert!(metrics.contains("reason=\"queue_full\"} 1"), "{metrics}");
        // The place that a dropped connection leaves goes to the one that waits.
        drop(running);
        waiting.join().unwrap()
    });
    assert_eq!(waiting.status, 200);
    server.wait_empty();
}

#[test]
fn a_queue_of_too_many_tokens_says_so() {
    let flags = ["--max-num-seqs", "1", "--max-num-queued-tokens", "10"];
    let server = Server::fake(20, &flags);
    let mut running = server.stream(PATH, &streamed(900));
    running.next().unwrap();
    server.wait_metric("num_requests_waiting", 0.0);
    let tokens = |count: usize| {
        let mut body = endless("", 2);
        body["prompt"] = json!(vec![7; count]);
        body
    };
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| server.post(PATH, &tokens(8)));
        server.wait_metric("num_requests_waiting", 1.0);
        let refused = server.post(PATH, &tokens(3));
        assert_eq!(refused.status, 503, "{}", refused.text());
        let message = refused.error()["message"].to_string();
        assert!(message.contains("10 prompt tokens"), "{message}");
        drop(running);
        assert_eq!(waiting.join().unwrap().status, 200);
        // Nothing waits: a long prompt may.
        assert_eq!(server.post(PATH, &tokens(50)).status, 200);
    });
    server.wait_empty();
}

#[test]
fn a_request_for_too_many_tokens_is_refused_and_says_why() {
    let server = Server::fake(0, &["--max-tokens-per-request", "60"]);
    let mut body = endless("a", 10);
    (body["n"], body["temperature"]) = (json!(6), json!(1));
    server.ok(PATH, &body);
    body["n"] = json!(7);
    let mut chat = json!({"messages": [{"role": "user", "content": "a"}]});
    for (path, body, text) in [
        (PATH, &body, "70 tokens (prompts 1 × n 7 × max_tokens 10)"),
        (
            "/v1/chat/completions",
            &chat,
            "1024 tokens (prompts 1 × n 1 × the model's 1024",
        ),
    ] {
        let refused = server.post(path, body);
        assert_eq!(refused.status, 400, "{}", refused.text());
        let error = refused.error();
        assert_eq!(error["param"], "max_tokens");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(text), "{message}");
        assert!(message.contains("60 a request (--max-tokens-per-request)"));
    }
    chat["max_completion_tokens"] = json!(60);
    server.ok("/v1/chat/completions", &chat);
    server.wait_empty();
}

#[test]
fn requests_that_take_too_long_are_given_up() {
    let flags = [
        "--max-num-seqs",
        "1",
        "--request-timeout",
        "1.5",
        "--queue-timeout",
        "0.4",
    ];
    let server = Server::fake(20, &flags);
    let mut running = server.stream(PATH, &streamed(900));
    running.next().unwrap();
    let queued = server.post(PATH, &endless("b", 2));
    assert_eq!(queued.status, 503, "{}", queued.text());
    let last = running.last().unwrap();
    assert_eq!(last["error"]["code"], 504, "{last}");
    let whole = server.post(PATH, &endless("c", 900));
    assert_eq!(whole.status, 504);
    server.wait_empty();
    // Operators see both kinds.
    let metrics = server.get("/metrics").text();
    for counter in [
        "\nnano_vllm:request_timeouts_total{model_name=\"nano-vllm-demo\",engine=\"0\"} 2\n",
        ",reason=\"queue_timeout\"} 1\n",
    ] {
        assert!(metrics.contains(counter), "{counter} is not in\n{metrics}");
    }
}

#[test]
fn slow_clients_are_cut_off() {
    let server = Server::fake(0, &["--client-timeout", "0.3"]);
    let until_closed = |sent: &[u8]| {
        let mut stream = server.connect();
        stream.write_all(sent).unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        answer
    };
    until_closed(b"");
    until_closed(b"GET /hea");
    let head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\
                Content-Type: application/json\r\nContent-Length: 90\r\n\r\n{";
    let answer = until_closed(head.as_bytes());
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn a_reader_that_stops_is_cut_off_and_its_blocks_come_back() {
    // More text than the sockets between hold.
    let flags = ["--write-timeout", "0.5"];
    let server = Server::fake(0, &flags);
    let mut held = Vec::new();
    for _ in 0..4 {
        let mut body = streamed(1000);
        (body["n"], body["seed"], body["temperature"]) = (json!(16), json!(1), json!(1));
        held.push(server.stream(PATH, &body));
    }
    server.wait_empty();
    let started = Instant::now();
    while server.get("/load").json()["server_load"] != 0 {
        assert!(
            started.elapsed() < Duration::from_secs(100),
            "a stream is still open"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn health_notices_a_model_that_hangs() {
    let server = Server::fake(3_600_000, &["--watchdog-timeout", "0.3"]);
    assert_eq!(server.get("/health").status, 200);
    let _stuck = {
        let mut stream = server.connect();
        let body = endless("a", 2).to_string();
        let bytes = crate::client::request(PATH, "", body.as_bytes());
        stream.write_all(&bytes).unwrap();
        stream
    };
    let started = Instant::now();
    while server.get("/health").status != 503 {
        assert!(
            started.elapsed() < Duration::from_secs(100),
            "nobody notices"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(server.get("/ready").status, 503);
}
