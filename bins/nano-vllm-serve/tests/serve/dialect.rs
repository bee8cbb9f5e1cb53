//! What clients written for vLLM count on, beyond the schema of OpenAI's API.

use serde_json::{Value, json};

use crate::client::{Server, endless, request, scratch};

const PLAIN: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

#[test]
fn what_was_not_asked_for_is_null() {
    let server = Server::start(&[]);
    let null = |part: &Value, names: &[&str]| {
        for name in names {
            assert_eq!(part.get(name), Some(&Value::Null), "{name} of {part}");
        }
    };
    let answer = server.ok(PLAIN, &endless("a", 2));
    let names = [
        "token_ids",
        "prompt_token_ids",
        "prompt_logprobs",
        "stop_reason",
    ];
    null(&answer["choices"][0], &names);
    let mut chat = json!({"messages": [{"role": "user", "content": "a"}], "max_tokens": 2});
    let answer = server.ok(CHAT, &chat);
    null(&answer, &["prompt_token_ids", "prompt_logprobs"]);
    null(&answer["choices"][0], &["token_ids", "stop_reason"]);
    null(&answer["choices"][0]["message"], &["reasoning", "refusal"]);
    chat["return_token_ids"] = json!(true);
    let answer = server.ok(CHAT, &chat);
    assert!(answer["prompt_token_ids"].is_array());
    assert!(answer["choices"][0]["token_ids"].is_array());
}

#[test]
fn a_wrong_form_and_a_wrong_value_have_types_of_their_own() {
    let server = Server::fake(0, &[]);
    let message = json!([{"role": "user", "content": "a"}]);
    for (path, body, kind) in [
        (PLAIN, json!({"prompt": "a", "n": "one"}), "Bad Request"),
        (PLAIN, json!({"prompt": 5}), "Bad Request"),
        (PLAIN, json!({}), "Bad Request"),
        (PLAIN, json!({"prompt": "a", "stop": 7}), "Bad Request"),
        (
            PLAIN,
            json!({"prompt": "a", "stream_options": {"include_usage": true}}),
            "Bad Request",
        ),
        (CHAT, json!({"messages": "a"}), "Bad Request"),
        (
            CHAT,
            json!({"messages": message, "tools": []}),
            "Bad Request",
        ),
        (PLAIN, json!({"prompt": "a", "top_p": 2}), "BadRequestError"),
        (PLAIN, json!({"prompt": [99_999_999]}), "BadRequestError"),
        (CHAT, json!({"messages": []}), "BadRequestError"),
    ] {
        let answer = server.post(path, &body);
        assert_eq!(answer.status, 400, "{body}");
        let error = answer.error();
        assert_eq!(error["type"], kind, "{body}: {error}");
        assert!(error["param"].is_string(), "{body}: {error}");
    }
    // Empty options ask for nothing.
    server.ok(
        PLAIN,
        &json!({"prompt": "a", "max_tokens": 1, "stream_options": {}}),
    );
    // An error does not grow with the request.
    let error = server.post(PLAIN, &json!({"prompt": "a", "model": "m".repeat(9_000)}));
    assert_eq!(error.status, 404);
    assert!(error.body.len() < 500, "{}", error.text());
}

#[test]
fn tokens_are_told_as_they_stand_in_the_vocabulary() {
    let server = Server::fake(0, &[]);
    let mut body = json!({"prompt": "The capital", "return_token_strs": true});
    let tokens = server.ok("/tokenize", &body);
    assert_eq!(tokens["token_strs"], json!(["The", "Ġcapital"]));
    body["add_special_token"] = json!(true);
    let answer = server.post("/tokenize", &body);
    assert_eq!(answer.header("x-ignored-fields"), Some("add_special_token"));
    let mut chat = json!({"messages": [{"role": "user", "content": "a"}]});
    chat["chat_template"] = json!("{{ messages }}");
    let error = server.post("/tokenize", &chat).error();
    assert_eq!(error["param"], "chat_template");
}

#[test]
fn templates_see_effort_reasoning_and_messages_without_content() {
    let template = scratch("effort");
    let source = "{{ enable_thinking }}, {{ reasoning_effort }}\
                  {% for m in messages %}, {{ m.reasoning_content + m.content }}{% endfor %}";
    std::fs::write(&template, source).unwrap();
    let server = Server::start(&["--chat-template", template.to_str().unwrap()]);
    std::fs::remove_file(&template).unwrap();
    let call = json!({"type": "function", "function": {"name": "f", "arguments": "{}"}});
    let body = json!({
        "messages": [
            {"role": "assistant", "reasoning": "so", "content": null, "tool_calls": [call]},
        ],
        "reasoning_effort": "high",
    });
    let tokens = server.ok("/tokenize", &body)["tokens"].clone();
    let text = server.ok("/detokenize", &json!({"tokens": tokens}))["prompt"].clone();
    let text = text.as_str().unwrap();
    assert!(text.to_lowercase().ends_with("true, high, so"), "{text}");
    let answer = server.ok(CHAT, &body);
    let length = tokens.as_array().unwrap().len();
    assert_eq!(answer["usage"]["prompt_tokens"], length);
}

#[test]
fn metrics_have_the_format_that_is_asked_for() {
    let server = Server::fake(0, &[]);
    let get = |accept: &str| {
        let head = format!("GET /metrics HTTP/1.0\r\n{accept}\r\n");
        server.raw(head.as_bytes())
    };
    let is = |answer: &crate::client::Answer, media: &str, counter: &str| {
        let found = answer.header("content-type").unwrap();
        assert!(found.starts_with(media), "{found}");
        let line = format!("\n# TYPE {counter} counter\n");
        assert!(answer.text().contains(&line), "{}", answer.text());
        assert!(answer.text().contains("\nvllm:prompt_tokens_total{"));
    };
    // A browser, curl, and vLLM's own tests.
    for accept in ["", "Accept: */*\r\n", "Accept: text/plain\r\n"] {
        let answer = get(accept);
        is(
            &answer,
            "text/plain; version=0.0.4",
            "vllm:prompt_tokens_total",
        );
        assert!(!answer.text().contains("# EOF"));
    }
    let prometheus = "Accept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5\r\n";
    let answer = get(prometheus);
    is(
        &answer,
        "application/openmetrics-text",
        "vllm:prompt_tokens",
    );
    assert!(answer.text().ends_with("\n# EOF\n"));
}

#[test]
fn routers_get_the_load_that_they_ask_for() {
    let server = Server::fake(0, &[]);
    let load = |format: &str| {
        let headers = match format {
            "" => String::new(),
            format => format!("Endpoint-Load-Metrics-Format: {format}\r\n"),
        };
        let body = endless("a", 1).to_string();
        let answer = server.raw(&request(PLAIN, &headers, body.as_bytes()));
        assert_eq!(answer.status, 200);
        answer.header("endpoint-load-metrics").map(str::to_owned)
    };
    assert_eq!(load(""), None);
    assert_eq!(load("BINARY"), None);
    let text = load("TEXT").unwrap();
    let figures = text.strip_prefix("TEXT named_metrics.kv_cache_usage_perc=");
    let (usage, waiting) = figures.unwrap().split_once(", ").unwrap();
    assert!((0.0..=1.0).contains(&usage.parse().unwrap()), "{text}");
    assert_eq!(waiting, "named_metrics.num_requests_waiting=0.0");
    let text = load("json").unwrap();
    let json: Value = serde_json::from_str(text.strip_prefix("JSON ").unwrap()).unwrap();
    assert_eq!(json["named_metrics"]["num_requests_waiting"], 0.0, "{text}");
    assert!(json["named_metrics"]["kv_cache_usage_perc"].is_number());
}
