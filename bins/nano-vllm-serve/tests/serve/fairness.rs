//! Several API keys compete.

use std::path::PathBuf;

use serde_json::json;

use crate::client::{Answer, Server, endless, request};

const PATH: &str = "/v1/completions";

/// Steps after which the fake model's tokens repeat: a quarter of the demo model's vocabulary.
const PERIOD: u64 = 1024;

/// A server for keys `aaa` and `bbb`, the second of which weighs three times as much, and the file
/// that names them. It runs one sequence at a time.
fn start(file: &str, flags: &[&str]) -> (Server, PathBuf) {
    let path = std::env::temp_dir().join(format!("nano-vllm-{file}-{}", std::process::id()));
    std::fs::write(&path, "aaa name=alpha\nbbb name=beta weight=3\n").unwrap();
    let file = path.to_str().unwrap();
    let mut all = vec!["--max-num-seqs", "1", "--api-key-file", file];
    all.extend(flags);
    let mut server = Server::fake(40, &all);
    server.headers = bearer("aaa");
    (server, path)
}

fn bearer(key: &str) -> String {
    format!("Authorization: Bearer {key}\r\n")
}

fn send(server: &Server, key: &str, max_tokens: u32) -> Answer {
    let mut body = endless("a", max_tokens);
    body["return_token_ids"] = json!(true);
    server.raw(&request(PATH, &bearer(key), body.to_string().as_bytes()))
}

#[test]
fn a_key_gets_its_share_while_another_floods() {
    const EACH: usize = 12;
    let (server, path) = start("shares", &[]);
    let mut long = endless("a", 700);
    (long["stream"], long["return_token_ids"]) = (json!(true), json!(true));
    let mut running = server.stream(PATH, &long);
    let first_token = |choice: &serde_json::Value| choice["token_ids"][0].as_u64();
    let begin = running
        .find_map(|chunk| first_token(&chunk["choices"][0]))
        .unwrap();
    // The fake model's token tells in which step it was computed: time plays no part.
    let mut order: Vec<(u64, &str)> = std::thread::scope(|scope| {
        let mut answers = Vec::new();
        for (key, waiting) in [("aaa", EACH), ("bbb", 2 * EACH)] {
            for _ in 0..EACH {
                answers.push((key, scope.spawn(|| send(&server, key, 8))));
            }
            server.wait_metric("num_requests_waiting", waiting as f64);
        }
        drop(running);
        let step = |answer: Answer| {
            assert_eq!(answer.status, 200, "{}", answer.text());
            let token = first_token(&answer.json()["choices"][0]).unwrap();
            (token + PERIOD - begin) % PERIOD
        };
        let answers = answers.into_iter();
        answers
            .map(|(key, answer)| (step(answer.join().unwrap()), key))
            .collect()
    });
    order.sort_unstable();
    let last = order.iter().rposition(|(_, key)| *key == "bbb").unwrap();
    let before = last + 1 - EACH;
    assert!(
        before <= EACH / 3 + 1,
        "{before} of the first key's went before: {order:?}"
    );

    let metrics = server.get("/metrics").text();
    let line =
        "nano_vllm:key_generation_tokens_total{model_name=\"nano-vllm-demo\",api_key=\"beta\"} 96";
    assert!(metrics.contains(line), "{metrics}");
    assert!(metrics.contains(
        "nano_vllm:key_requests_total{model_name=\"nano-vllm-demo\",api_key=\"alpha\"} 13"
    ));
    assert!(!metrics.contains("aaa") && !metrics.contains("bbb"));
    server.wait_empty();
    std::fs::remove_file(path).unwrap();
}

#[test]
fn a_full_queue_has_room_for_the_other_key() {
    let (server, path) = start("queue", &["--max-num-queued-reqs", "4"]);
    let mut long = endless("a", 700);
    long["stream"] = json!(true);
    let mut running = server.stream(PATH, &long);
    running.next().unwrap();
    std::thread::scope(|scope| {
        let waiting: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| send(&server, "aaa", 1)))
            .collect();
        server.wait_metric("num_requests_waiting", 4.0);
        assert_eq!(send(&server, "aaa", 1).status, 503);
        let others: Vec<_> = (0..3)
            .map(|_| scope.spawn(|| send(&server, "bbb", 1)))
            .collect();
        server.wait_metric("num_requests_waiting", 7.0);
        assert_eq!(
            send(&server, "bbb", 1).status,
            503,
            "three quarters of 4 wait"
        );
        drop(running);
        for answer in waiting.into_iter().chain(others) {
            assert_eq!(answer.join().unwrap().status, 200);
        }
    });
    let metrics = server.get("/metrics").text();
    for name in ["alpha", "beta"] {
        let line = format!(
            "nano_vllm:key_admission_rejections_total{{model_name=\"nano-vllm-demo\",api_key=\"{name}\"}} 1\n"
        );
        assert!(metrics.contains(&line), "{metrics}");
    }
    std::fs::remove_file(path).unwrap();
}
