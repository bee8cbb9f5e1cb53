//! Answers that must look like something: schemas, expressions, choices, grammars, forced calls.

use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};

use crate::client::{Server, endless};

const PLAIN: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// Whether a text is what was asked for.
type Check = fn(&str) -> bool;

fn person() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
            "home": {"$ref": "#/$defs/place"},
        },
        "required": ["name", "age", "home"],
        "additionalProperties": false,
        "$defs": {"place": {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[A-Z][a-z]{2,5}$"}]}},
    })
}

fn is_person(text: &str) -> bool {
    let validator = jsonschema::validator_for(&person()).unwrap();
    serde_json::from_str(text).is_ok_and(|value| validator.is_valid(&value))
}

fn is_object(text: &str) -> bool {
    serde_json::from_str::<Value>(text).is_ok_and(|value| value.is_object())
}

fn is_date(text: &str) -> bool {
    let date = |c: &[u8]| c.len() == 5 && c[2] == b'-';
    date(text.as_bytes()) && text.replace('-', "").bytes().all(|b| b.is_ascii_digit())
}

/// Ways to ask for it, and what must come.
fn cases() -> Vec<(&'static str, Value, Check)> {
    let schema = json!({"type": "json_schema", "json_schema": {"name": "p", "strict": true, "schema": person()}});
    vec![
        ("response_format", schema, is_person),
        ("response_format", json!({"type": "json_object"}), is_object),
        (
            "structured_outputs",
            json!({"json": person(), "disable_any_whitespace": true}),
            is_person,
        ),
        (
            "structured_outputs",
            json!({"regex": r"^\d{2}-\d{2}$"}),
            is_date,
        ),
        (
            "structured_outputs",
            json!({"choice": ["Paris", "Rome", "\"Zürich\"\n"]}),
            |text| ["Paris", "Rome", "\"Zürich\"\n"].contains(&text),
        ),
        (
            "structured_outputs",
            json!({"grammar": "start: num (\"+\" num)* \"=\" num\nnum: /[1-9][0-9]?/\n"}),
            |text| text.split('=').count() == 2 && !text.contains(char::is_alphabetic),
        ),
        ("guided_json", json!(person().to_string()), is_person),
        ("guided_regex", json!(r"\d{2}-\d{2}"), is_date),
        ("guided_choice", json!(["yes", "no"]), |text| {
            ["yes", "no"].contains(&text)
        }),
    ]
}

/// Text and reason of each choice.
fn whole(server: &Server, path: &str, body: &Value) -> Vec<(String, Value)> {
    let answer = server.ok(path, body);
    let choices = answer["choices"].as_array().unwrap().iter();
    let text = |c: &Value| {
        c["text"]
            .as_str()
            .or(c["message"]["content"].as_str())
            .map(str::to_owned)
    };
    choices
        .map(|c| (text(c).unwrap_or_default(), c["finish_reason"].clone()))
        .collect()
}

fn streamed(server: &Server, path: &str, body: &Value) -> Vec<(String, Value)> {
    let mut body = body.clone();
    body["stream"] = json!(true);
    let n = body["n"].as_u64().unwrap_or(1) as usize;
    let mut choices = vec![(String::new(), Value::Null); n];
    for chunk in server.stream(path, &body) {
        for choice in chunk["choices"].as_array().unwrap() {
            let at = choice["index"].as_u64().unwrap() as usize;
            let text = choice["text"]
                .as_str()
                .or(choice["delta"]["content"].as_str());
            choices[at].0.push_str(text.unwrap_or_default());
            if !choice["finish_reason"].is_null() {
                choices[at].1 = choice["finish_reason"].clone();
            }
        }
    }
    choices
}

#[test]
fn answers_are_what_was_asked_for() {
    let server = Server::start(&["--max-num-batched-tokens", "40"]);
    let free = endless("The capital of France", 60);
    let alone = server.ok(PLAIN, &free)["choices"][0]["text"].clone();
    let (ended, cut) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for (at, (field, value, check)) in cases().into_iter().enumerate() {
            let (server, ended, cut) = (&server, &ended, &cut);
            scope.spawn(move || {
                for (path, n) in [(PLAIN, 1), (PLAIN, 3), (CHAT, 2)] {
                    let mut body = json!({"max_tokens": 150, "n": n, "seed": 7 * at + n});
                    match path {
                        PLAIN => {
                            body["prompt"] = json!("An answer that begins like this: ".repeat(3))
                        }
                        _ => {
                            body["messages"] = json!([{"role": "user", "content": "Tell me more."}])
                        }
                    }
                    body[field] = value.clone();
                    let choices = whole(server, path, &body);
                    assert_eq!(choices.len(), n);
                    for (text, reason) in &choices {
                        if reason == "stop" {
                            assert!(check(text), "{body}: {text:?}");
                            ended.fetch_add(1, Ordering::Relaxed);
                        } else {
                            assert_eq!(reason, "length", "{body}");
                            cut.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    assert_eq!(streamed(server, path, &body), choices, "{body}");
                }
            });
        }
        // Who asks for nothing of the kind does not notice.
        for _ in 0..10 {
            assert_eq!(server.ok(PLAIN, &free)["choices"][0]["text"], alone);
        }
    });
    let (ended, cut) = (ended.into_inner(), cut.into_inner());
    assert!(ended > 2 * cut, "{ended} ended, {cut} did not");
    server.wait_empty();
}

fn tools() -> Value {
    let city = json!({
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"$ref": "#/$defs/days"}},
        "required": ["city", "days"],
        "additionalProperties": false,
        "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
    });
    json!([
        {"type": "function", "function": {"name": "get_weather", "parameters": city}},
        {"type": "function", "function": {"name": "now"}},
    ])
}

/// The calls of a streamed answer, put together, and its reason.
fn streamed_calls(server: &Server, body: &Value) -> (Vec<(String, String)>, Value) {
    let mut body = body.clone();
    body["stream"] = json!(true);
    let mut calls: Vec<(String, String)> = Vec::new();
    let mut reason = Value::Null;
    for chunk in server.stream(CHAT, &body) {
        let choice = &chunk["choices"][0];
        let text = choice["delta"]["content"].as_str();
        // The beginning of a call that was cut off is text.
        let cut = choice["finish_reason"] == "length";
        assert!(cut || text.is_none_or(str::is_empty), "{chunk}");
        for call in choice["delta"]["tool_calls"]
            .as_array()
            .into_iter()
            .flatten()
        {
            let function = &call["function"];
            if let Some(name) = function["name"].as_str() {
                assert!(
                    call["id"].is_string() && call["type"] == "function",
                    "{call}"
                );
                calls.push((name.to_owned(), String::new()));
            }
            assert_eq!(call["index"], calls.len() - 1);
            let arguments = &mut calls.last_mut().unwrap().1;
            arguments.push_str(function["arguments"].as_str().unwrap());
        }
        if !choice["finish_reason"].is_null() {
            reason = choice["finish_reason"].clone();
        }
    }
    (calls, reason)
}

#[test]
fn calls_can_be_forced() {
    // No parser is needed for these.
    let server = Server::start(&[]);
    let tools = tools();
    let weather = &tools[0]["function"]["parameters"];
    let weather = jsonschema::validator_for(weather).unwrap();
    let named = json!({"type": "function", "function": {"name": "get_weather"}});
    let mut ended = 0;
    for seed in 0..6 {
        for (choice, parallel) in [
            (json!("required"), true),
            (json!("required"), false),
            (named.clone(), true),
        ] {
            let body = json!({
                "messages": [{"role": "user", "content": "Will it rain?"}],
                "max_tokens": 250, "seed": seed, "tools": tools, "tool_choice": choice,
                "parallel_tool_calls": parallel,
            });
            let answer = server.ok(CHAT, &body);
            let answer = &answer["choices"][0];
            let (streamed, reason) = streamed_calls(&server, &body);
            assert_eq!(reason, answer["finish_reason"]);
            let calls: Vec<(String, String)> = answer["message"]["tool_calls"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|call| {
                    let function = &call["function"];
                    let text = |name: &str| function[name].as_str().unwrap().to_owned();
                    (text("name"), text("arguments"))
                })
                .collect();
            assert_eq!(streamed, calls);
            if reason == "length" {
                continue;
            }
            assert_eq!(answer["message"]["content"], Value::Null);
            ended += 1;
            match choice == "required" {
                true => assert_eq!(reason, "tool_calls"),
                false => assert_eq!(reason, "stop"),
            }
            assert!(
                !calls.is_empty() && (parallel || calls.len() == 1),
                "{calls:?}"
            );
            for (name, arguments) in &calls {
                let arguments: Value = serde_json::from_str(arguments).expect(arguments);
                match name.as_str() {
                    "get_weather" => assert!(weather.is_valid(&arguments), "{arguments}"),
                    "now" => assert_eq!(arguments, json!({})),
                    other => panic!("there is no {other}"),
                }
            }
        }
    }
    assert!(ended > 9, "only {ended} ended");
    server.wait_empty();
}

#[test]
fn a_grammar_that_cannot_go_on_fails_alone() {
    let server = Server::start(&[]);
    let mut other = endless("b", 40);
    other["structured_outputs"] = json!({"regex": "z{30}"});
    // Tokens that the grammar needs are forbidden.
    let never = json!({
        "prompt": "a", "max_tokens": 9, "structured_outputs": {"regex": "ab"},
        "allowed_token_ids": [0],
    });
    std::thread::scope(|scope| {
        let other = scope.spawn(|| server.ok(PLAIN, &other));
        let error = server.post(PLAIN, &never).error();
        let message = error["message"].as_str().unwrap();
        assert!(message.contains("no token can be sampled"), "{message}");
        let other = other.join().unwrap();
        assert_eq!(other["choices"][0]["text"], "z".repeat(30));
    });
    server.wait_empty();
}

#[test]
fn usage_tells_of_cached_tokens_if_asked_to() {
    let server = Server::start(&["--enable-prompt-tokens-details"]);
    let body = endless(
        "A prompt that is long enough to fill a block or two of the cache: again",
        3,
    );
    server.ok(PLAIN, &body);
    let usage = server.ok(PLAIN, &body)["usage"].clone();
    let cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64();
    assert!(cached.unwrap() > 0, "{usage}");
    let mut body = body;
    body["stream"] = json!(true);
    body["stream_options"] = json!({"include_usage": true, "continuous_usage_stats": true});
    let chunks: Vec<Value> = server.stream(PLAIN, &body).collect();
    let (last, others) = chunks.split_last().unwrap();
    assert_eq!(last["usage"], usage);
    for chunk in others {
        assert!(
            chunk["usage"].get("prompt_tokens_details").is_none(),
            "{chunk}"
        );
    }
}
