//! Spans that go to an OpenTelemetry collector.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use serde_json::{Value, json};

use crate::client::{Server, endless, request};

const LONG: Duration = Duration::from_secs(120);

/// Answers every request with `status` and passes its head and body on. Its thread ends with the
/// test's process.
fn collector(status: &'static str) -> (String, Receiver<(String, Value)>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (sender, received) = channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut reader = BufReader::new(stream.unwrap());
            reader.get_ref().set_read_timeout(Some(LONG)).unwrap();
            let mut head = String::new();
            while !head.ends_with("\r\n\r\n") {
                assert_ne!(reader.read_line(&mut head).unwrap(), 0);
            }
            let head = head.to_lowercase();
            let length = head.split("content-length: ").nth(1).unwrap();
            let mut body = vec![0; length.lines().next().unwrap().parse().unwrap()];
            reader.read_exact(&mut body).unwrap();
            let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 2\r\n\r\n{{}}");
            reader.get_mut().write_all(answer.as_bytes()).unwrap();
            let body = serde_json::from_slice(&body).unwrap();
            if sender.send((head, body)).is_err() {
                return;
            }
        }
    });
    (url, received)
}

fn spans(message: &Value) -> Vec<Value> {
    let scopes = &message["resourceSpans"][0]["scopeSpans"];
    scopes[0]["spans"].as_array().unwrap().clone()
}

fn attribute<'a>(span: &'a Value, name: &str) -> &'a Value {
    let all = span["attributes"].as_array().unwrap();
    let found = all.iter().find(|a| a["key"] == name);
    &found.unwrap_or_else(|| panic!("no {name} in {span}"))["value"]
}

#[test]
fn a_span_of_every_prompt_reaches_the_collector() {
    let (url, received) = collector("200 OK");
    let server = Server::fake(0, &["--otlp-traces-endpoint", &url]);
    let send = |flags: &str, headers: &str| {
        let mut body = endless("a", 3);
        body["request_id"] = json!(format!("request-{flags}"));
        let parent = format!(
            "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-{flags}\r\n{headers}"
        );
        let bytes = request("/v1/completions", &parent, body.to_string().as_bytes());
        assert_eq!(server.raw(&bytes).status, 200);
    };
    send("00", ""); // not recorded by its client
    send("01", "");
    let (head, message) = received.recv_timeout(LONG).unwrap();
    assert!(head.starts_with("post /v1/traces "), "{head}");
    assert!(head.contains("content-type: application/json"), "{head}");
    let service = &message["resourceSpans"][0]["resource"]["attributes"][0];
    assert_eq!(service["key"], "service.name");
    let all = spans(&message);
    assert_eq!(all.len(), 1, "{message}");
    let span = &all[0];
    assert_eq!(span["name"], "llm_request");
    assert_eq!(span["traceId"], "0af7651916cd43dd8448eb211c80319c");
    assert_eq!(span["parentSpanId"], "b7ad6b7169203331");
    assert_eq!(span["spanId"].as_str().unwrap().len(), 16);
    assert_eq!(span["status"], json!({}));
    let nanos = |name: &str| span[name].as_str().unwrap().parse::<u128>().unwrap();
    assert!(nanos("startTimeUnixNano") <= nanos("endTimeUnixNano"));
    for (name, value) in [
        ("gen_ai.request.id", json!({"stringValue": "request-01"})),
        (
            "gen_ai.response.model",
            json!({"stringValue": "nano-vllm-demo"}),
        ),
        ("gen_ai.request.max_tokens", json!({"intValue": "3"})),
        ("gen_ai.request.temperature", json!({"doubleValue": 0.0})),
        ("gen_ai.usage.completion_tokens", json!({"intValue": "3"})),
        ("gen_ai.usage.num_sequences", json!({"intValue": "1"})),
    ] {
        assert_eq!(*attribute(span, name), value, "{name}");
    }
    let seconds = |name: &str| attribute(span, name)["doubleValue"].as_f64().unwrap();
    assert!(seconds("gen_ai.latency.time_to_first_token") <= seconds("gen_ai.latency.e2e"));
    assert!(seconds("gen_ai.latency.time_in_queue") >= 0.0);

    // What has not been sent yet goes out before the process ends.
    let many = json!({"prompt": ["a", "b", "c"], "max_tokens": 1});
    server.ok("/v1/completions", &many);
    server.signal("TERM");
    assert!(server.wait().success());
    let mut last = Vec::new();
    while last.len() < 3 {
        last.extend(spans(&received.recv_timeout(LONG).unwrap().1));
    }
    assert_eq!(last.len(), 3);
    assert!(last.iter().all(|span| span.get("parentSpanId").is_none()));
}

#[test]
fn a_collector_that_fails_harms_nobody() {
    let (url, received) = collector("500 No");
    let server = Server::fake(0, &["--otlp-traces-endpoint", &url]);
    for _ in 0..2 {
        server.ok("/v1/completions", &endless("a", 2));
        received.recv_timeout(LONG).unwrap();
    }
    // Nobody listens there.
    let closed = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", closed.local_addr().unwrap());
    drop(closed);
    let server = Server::fake(0, &["--otlp-traces-endpoint", &url]);
    server.ok("/v1/completions", &endless("a", 2));
    server.signal("TERM");
    assert!(server.wait().success());
}
