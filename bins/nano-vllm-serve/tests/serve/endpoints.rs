//! Every route once.

use std::io::{Read, Write};

use serde_json::json;

use crate::client::{Server, endless, request};

#[test]
fn every_route_answers() {
    let server = Server::start(&["--enable-request-id-headers"]);
    for path in ["/health", "/ready", "/ping"] {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
    let models = server.get("/v1/models").json();
    assert_eq!(models["data"][0]["id"], "nano-vllm-demo");
    assert_eq!(models["data"][0]["max_model_len"], 1024);
    assert_eq!(server.get("/v1/models/nano-vllm-demo").status, 200);
    assert_eq!(server.get("/v1/models/other").error()["param"], "model");
    assert!(server.get("/version").json()["version"].is_string());
    assert_eq!(server.get("/load").json()["server_load"], 0);
    assert!(server.get("/").text().contains("<title>nano-vllm"));

    let text = "Grüße, 世界 🌍!";
    let tokens = server.ok(
        "/tokenize",
        &json!({"prompt": text, "return_token_strs": true}),
    );
    assert_eq!(tokens["count"], tokens["tokens"].as_array().unwrap().len());
    assert_eq!(
        tokens["count"],
        tokens["token_strs"].as_array().unwrap().len()
    );
    let back = server.ok("/detokenize", &json!({"tokens": tokens["tokens"]}));
    assert_eq!(back["prompt"], text);
    let chat = json!({"messages": [{"role": "user", "content": "hi"}]});
    assert!(server.ok("/tokenize", &chat)["count"].as_u64().unwrap() > 3);

    for path in ["/v1/embeddings", "/v1/rerank", "/score"] {
        let error = server.post(path, &json!({})).error();
        assert!(error["message"].as_str().unwrap().contains(path), "{error}");
    }
    assert_eq!(server.get("/nowhere").error()["code"], 404);
    let wrong = server.get("/v1/completions");
    assert_eq!(wrong.error()["code"], 405);
    assert!(wrong.header("allow").is_some());

    let mut body = endless("a", 3);
    body["request_id"] = json!("of-the-body");
    let answer = server.post("/v1/completions", &body);
    assert_eq!(answer.json()["id"], "cmpl-of-the-body");
    let answer = server.raw(&request(
        "/v1/completions",
        "X-Request-Id: abc-1\r\n",
        body.to_string().as_bytes(),
    ));
    assert_eq!(answer.header("x-request-id"), Some("abc-1"));
    assert_eq!(answer.json()["id"], "cmpl-abc-1");
    let mut typo = endless("a", 3);
    typo["temprature"] = json!(1);
    let answer = server.post("/v1/completions", &typo);
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("x-ignored-fields"), Some("temprature"));

    for name in [
        "generation_tokens_total",
        "prompt_tokens_total",
        "time_to_first_token_seconds_count",
        "e2e_request_latency_seconds_count",
        "request_generation_tokens_count",
    ] {
        assert!(server.metric(name) > 0.0, "{name}");
    }
    assert_eq!(server.metric("generation_tokens_total"), 9.0);
    server.wait_empty();
}

#[test]
fn keys_are_needed_but_for_probes() {
    let server = Server::start(&["--api-key", "one", "--api-key", "two"]);
    for path in ["/health", "/ready"] {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
    for path in [
        "/",
        "/v1/models",
        "/metrics",
        "/load",
        "/version",
        "/live",
        "/nowhere",
    ] {
        let answer = server.get(path);
        assert_eq!(answer.status, 401, "{path}");
        assert_eq!(answer.json(), json!({"error": "Unauthorized"}));
    }
    let body = endless("a", 2).to_string();
    let send = |headers: &str| {
        let bytes = request("/v1/completions", headers, body.as_bytes());
        server.raw(&bytes).status
    };
    assert_eq!(send(""), 401);
    assert_eq!(send("Authorization: Bearer three\r\n"), 401);
    assert_eq!(send("Authorization: Bearer one\r\n"), 200);
    assert_eq!(send("Authorization: Bearer two\r\n"), 200);
}

#[test]
fn flags_come_from_a_file_too() {
    let path = std::env::temp_dir().join(format!("nano-vllm-config-{}.yaml", std::process::id()));
    std::fs::write(
        &path,
        "served-model-name: [a, b]\nmax_num_seqs: 2\nport: 1\n",
    )
    .unwrap();
    let server = Server::start(&["--config", path.to_str().unwrap()]);
    std::fs::remove_file(&path).unwrap();
    let models = server.get("/v1/models").json();
    assert_eq!(models["data"][1]["id"], "b");
    let error = server.post("/v1/completions", &json!({"model": "c", "prompt": "x"}));
    assert_eq!(error.error()["message"], "The model `c` does not exist.");
}

#[test]
fn browsers_of_other_origins_are_let_in_only_if_named() {
    let server = Server::start(&["--allowed-origins", "https://a.example"]);
    let from = |origin: &str, method: &str| {
        let head = format!("{method} /version HTTP/1.0\r\nOrigin: {origin}\r\n\r\n");
        server.raw(head.as_bytes())
    };
    let allow = "access-control-allow-origin";
    assert_eq!(
        from("https://a.example", "GET").header(allow),
        Some("https://a.example")
    );
    assert_eq!(from("https://a.example", "OPTIONS").status, 204);
    assert_eq!(from("https://b.example", "GET").header(allow), None);
    assert_eq!(from("https://b.example", "OPTIONS").status, 405);
}

#[test]
fn requests_are_counted_by_route_and_status() {
    let mut server = Server::start(&["--api-key", "one"]);
    assert_eq!(server.get("/v1/models").status, 401);
    server.headers = "Authorization: Bearer one\r\n".to_owned();
    server.ok("/v1/completions", &endless("a", 2));
    let mut body = endless("a", 300);
    body["stream"] = json!(true);
    let mut events = server.stream("/v1/completions", &body);
    events.next().expect("an event");
    // A stream counts when it has ended.
    let completions = r#"handler="/v1/completions",method="POST",status="2xx"}"#;
    let counted = |line: &str| server.get("/metrics").text().contains(line);
    assert!(counted(&format!("http_requests_total{{{completions} 1\n")));
    drop(events.rest());
    assert_eq!(server.get("/v1/models/none/such").status, 404);
    assert_eq!(server.get("/none").status, 404);
    let metrics = server.get("/metrics").text();
    for line in [
        "# TYPE http_requests_total counter".to_owned(),
        "# TYPE process_cpu_seconds_total counter\nprocess_cpu_seconds_total ".to_owned(),
        "# TYPE process_resident_memory_bytes gauge\nprocess_resident_memory_bytes ".to_owned(),
        format!("http_requests_total{{{completions} 2"),
        r#"http_requests_total{handler="/v1/models",method="GET",status="4xx"} 1"#.to_owned(),
        r#"http_requests_total{handler="none",method="GET",status="4xx"} 1"#.to_owned(),
        r#"http_request_duration_seconds_count{handler="/v1/completions",method="POST"} 2"#
            .to_owned(),
        "http_request_duration_highr_seconds_count 5".to_owned(),
    ] {
        assert!(metrics.contains(&line), "{line} is not in\n{metrics}");
    }
}

#[test]
fn the_dashboard_shows_metrics_that_are_there() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../docs/deploy/grafana.json"
    );
    let dashboard = std::fs::read_to_string(path).unwrap();
    let mut server = Server::start(&["--api-key", "one"]);
    server.headers = "Authorization: Bearer one\r\n".to_owned();
    server.ok("/v1/completions", &endless("a", 2));
    let metrics = server.get("/metrics").text();
    let mut used = 0;
    let parts: Vec<&str> = dashboard.split("vllm:").collect();
    for (before, part) in parts.iter().zip(&parts[1..]) {
        let prefix = match before.ends_with("nano_") {
            true => "nano_vllm",
            false => "vllm",
        };
        let name: String = part
            .chars()
            .take_while(|c| c.is_ascii_alphanumeric() || *c == '_')
            .collect();
        // Rejections have a line only once there was one.
        let family = name.trim_end_matches("_bucket").trim_end_matches("_total");
        assert!(
            metrics.contains(&format!("# TYPE {prefix}:{family}")),
            "{name}"
        );
        used += 1;
    }
    assert!(used > 25);
}

#[test]
fn a_connection_that_began_with_a_probe_takes_one_other_request() {
    let server = Server::fake(0, &[]);
    let mut stream = server.connect();
    let body = endless("a", 2).to_string();
    let probe = "GET /health HTTP/1.1\r\nHost: a\r\n\r\n";
    let post = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream
        .write_all([probe, probe, &post].concat().as_bytes())
        .unwrap();
    // It ends before the client times out.
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let text = String::from_utf8(answer).unwrap();
    assert_eq!(text.matches("HTTP/1.1 200").count(), 3, "{text}");
    assert_eq!(text.matches("connection: close").count(), 1, "{text}");
    assert!(text.contains("text_completion"), "{text}");
}

#[test]
fn the_document_names_every_field_that_is_refused() {
    let server = Server::fake(0, &[]);
    let document = server.get("/openapi.json").json();
    assert_eq!(document["openapi"], "3.1.0");
    let schemas = &document["components"]["schemas"];
    for (path, schema) in [
        ("/v1/completions", "CompletionRequest"),
        ("/v1/chat/completions", "ChatRequest"),
    ] {
        let fields = schemas[schema]["properties"].as_object().unwrap();
        assert!(fields.len() > 40);
        let messages = json!([{"role": "user", "content": "hi"}]);
        for (name, field) in fields.iter().filter(|(_, f)| f["enum"].is_array()) {
            // Every value that is listed is taken, and no other.
            let post = |value: &serde_json::Value| {
                let mut body = json!({"prompt": "a", "messages": messages, "max_tokens": 1});
                body[name] = value.clone();
                server.post(path, &body).status
            };
            for value in field["enum"].as_array().unwrap() {
                assert_eq!(post(value), 200, "{path} {name} = {value}");
            }
            assert!(
                [400, 404].contains(&post(&json!({"x": 1}))),
                "{path} {name}"
            );
        }
    }
}
