//! A streamed answer is the whole answer in pieces.

use serde_json::{Value, json};

use crate::client::{Server, endless};

/// What the chunks of one choice add up to.
#[derive(Debug, Default, PartialEq)]
struct Choice {
    text: String,
    tokens: Vec<u64>,
    logprobs: Vec<Value>,
    finish: Value,
    stop: Value,
}

const CHAT: &str = "/v1/chat/completions";
const PLAIN: &str = "/v1/completions";

fn list(value: &Value) -> Vec<Value> {
    value.as_array().cloned().unwrap_or_default()
}

fn logprobs(choice: &Value) -> Vec<Value> {
    let all = &choice["logprobs"];
    let tokens = list(&all["tokens"])
        .into_iter()
        .zip(list(&all["text_offset"]));
    let plain = tokens.zip(list(&all["token_logprobs"]));
    let mut entries = list(&all["content"]);
    entries.extend(plain.map(|(token, p)| json!([token, p])));
    entries
}

/// Adds up a streamed answer, checking the form of every chunk.
fn streamed(server: &Server, path: &str, body: &Value) -> (Vec<Choice>, Value) {
    let mut body = body.clone();
    body["stream"] = json!(true);
    body["stream_options"] = json!({"include_usage": true});
    let mut choices: Vec<Choice> = Vec::new();
    let (mut usage, mut id) = (Value::Null, Value::Null);
    for chunk in server.stream(path, &body) {
        assert!(usage.is_null(), "nothing comes after the usage");
        if id.is_null() {
            id = chunk["id"].clone();
        }
        assert_eq!(chunk["id"], id);
        let object = if path == CHAT {
            "chat.completion.chunk"
        } else {
            "text_completion"
        };
        assert_eq!(chunk["object"], object);
        let Some(part) = chunk["choices"].get(0) else {
            usage = chunk["usage"].clone();
            continue;
        };
        let at = part["index"].as_u64().unwrap() as usize;
        if choices.len() <= at {
            choices.resize_with(at + 1, Choice::default);
        }
        let choice = &mut choices[at];
        assert!(choice.finish.is_null(), "nothing comes after the end");
        let delta = &part["delta"];
        if path == CHAT
            && choice.text.is_empty()
            && choice.tokens.is_empty()
            && delta["role"] == "assistant"
        {
            assert_eq!(delta["content"], "");
        } else {
            assert!(delta["role"].is_null());
        }
        let text = if path == CHAT {
            &delta["content"]
        } else {
            &part["text"]
        };
        choice.text.push_str(text.as_str().unwrap_or_default());
        choice
            .tokens
            .extend(list(&part["token_ids"]).iter().map(|t| t.as_u64().unwrap()));
        choice.logprobs.extend(logprobs(part));
        choice.finish = part["finish_reason"].clone();
        choice.stop = part["stop_reason"].clone();
    }
    (choices, usage)
}

fn whole(server: &Server, path: &str, body: &Value) -> (Vec<Choice>, Value) {
    let answer = server.ok(path, body);
    let choices = list(&answer["choices"])
        .iter()
        .enumerate()
        .map(|(at, choice)| {
            assert_eq!(choice["index"], at);
            let text = if path == CHAT {
                &choice["message"]["content"]
            } else {
                &choice["text"]
            };
            Choice {
                text: text.as_str().unwrap().to_owned(),
                tokens: list(&choice["token_ids"])
                    .iter()
                    .map(|t| t.as_u64().unwrap())
                    .collect(),
                logprobs: logprobs(choice),
                finish: choice["finish_reason"].clone(),
                stop: choice["stop_reason"].clone(),
            }
        })
        .collect();
    (choices, answer["usage"].clone())
}

#[test]
fn pieces_add_up_to_the_whole() {
    let server = Server::start(&[]);
    let question = json!([{"role": "user", "content": "What is the capital of France?"}]);
    let plain = endless("Once upon a time", 40);
    let (reference, _) = whole(&server, PLAIN, &plain);
    let text = &reference[0].text;
    // A stop string from the middle of what comes, and one that only begins to match.
    let middle: String = text.chars().skip(20).take(5).collect();
    let almost = format!("{}\u{1}", text.chars().skip(9).take(4).collect::<String>());
    let mut cases = vec![
        (PLAIN, plain.clone()),
        (
            CHAT,
            json!({"messages": question, "max_tokens": 60, "temperature": 0}),
        ),
        (
            CHAT,
            json!({"messages": question, "max_tokens": 30, "n": 3, "seed": 5, "logprobs": true, "top_logprobs": 2}),
        ),
    ];
    let mut with = |name: &str, value: Value| {
        let mut body = plain.clone();
        body[name] = value;
        cases.push((PLAIN, body));
    };
    with("stop", json!([middle, almost]));
    with("stop", json!([almost]));
    with("logprobs", json!(1));
    with("echo", json!(true));
    with("prompt", json!(["a", "The moon", "Zwölf"]));
    with("prompt", json!([[5, 6, 7], [8]]));
    with("stop_token_ids", json!([reference_token(&server, &plain)]));
    for seed in 0..6 {
        // Hot: bytes of characters that do not fit each other, too.
        let prompt = format!("Tell {seed}: 🌍");
        cases.push((
            PLAIN,
            json!({
                "prompt": prompt, "max_tokens": 50, "temperature": 2.0, "seed": seed,
                "ignore_eos": true, "stop": ["e", "\u{fffd}\u{fffd}\u{fffd}"], "min_tokens": 10,
            }),
        ));
    }
    for (path, mut body) in cases {
        body["return_token_ids"] = json!(true);
        let (expected, mut usage) = whole(&server, path, &body);
        let (got, streamed_usage) = streamed(&server, path, &body);
        assert_eq!(got, expected, "{body}");
        usage
            .as_object_mut()
            .unwrap()
            .remove("prompt_tokens_details");
        assert_eq!(streamed_usage, usage, "{body}");
        if body["stop"].is_array() {
            for choice in &got {
                for stop in list(&body["stop"]) {
                    let cut = choice.text.contains(stop.as_str().unwrap());
                    // Text before `min_tokens` may hold one.
                    assert!(
                        !cut || body["min_tokens"].is_u64(),
                        "{body}: {}",
                        choice.text
                    );
                }
            }
        }
    }
    server.wait_empty();
}

fn reference_token(server: &Server, body: &Value) -> Value {
    let mut body = body.clone();
    body["return_token_ids"] = json!(true);
    server.ok(PLAIN, &body)["choices"][0]["token_ids"][12].clone()
}

#[test]
fn usage_in_every_chunk_if_asked_for() {
    let server = Server::fake(1, &[]);
    let mut body = endless("a", 9);
    body["stream"] = json!(true);
    let quiet: Vec<Value> = server.stream(PLAIN, &body).collect();
    assert!(quiet.iter().all(|chunk| chunk.get("usage").is_none()));
    // As in vLLM, it is of no use alone.
    body["stream_options"] = json!({"continuous_usage_stats": true});
    let quiet: Vec<Value> = server.stream(PLAIN, &body).collect();
    assert!(quiet.iter().all(|chunk| chunk.get("usage").is_none()));

    body["stream_options"]["include_usage"] = json!(true);
    body["messages"] = json!([{"role": "user", "content": "a"}]);
    body["n"] = json!(2);
    body["temperature"] = json!(1);
    for path in [PLAIN, "/v1/chat/completions"] {
        let mut chunks: Vec<Value> = server.stream(path, &body).collect();
        let tokens = |chunk: &Value| chunk["usage"]["completion_tokens"].as_u64().unwrap();
        let total = chunks.pop().unwrap();
        assert_eq!(tokens(&total), 18, "{total}");
        // Each choice counts its own, from none where a chat says its role.
        for choice in [0, 1] {
            let own = chunks.iter().map(|chunk| (&chunk["choices"][0], chunk));
            let own = own.filter(|(of, _)| of["index"] == choice);
            let counts: Vec<u64> = own
                .map(|(of, chunk)| match of["delta"].get("role") {
                    Some(_) => {
                        assert_eq!(tokens(chunk), 0, "{chunk}");
                        0
                    }
                    None => tokens(chunk),
                })
                .collect();
            assert!(counts.is_sorted(), "{counts:?}");
            assert_eq!(counts.last(), Some(&9), "{counts:?}");
        }
    }
}

#[test]
fn a_silent_stream_is_kept_alive() {
    let server = Server::fake(700, &["--sse-keep-alive-interval", "0.1"]);
    let mut body = endless("a", 2);
    body["stream"] = json!(true);
    let answer = server.post(PLAIN, &body);
    assert!(
        answer.text().contains(": keep-alive\n\n"),
        "{}",
        answer.text()
    );
    assert!(answer.text().ends_with("data: [DONE]\n\n"));
}
