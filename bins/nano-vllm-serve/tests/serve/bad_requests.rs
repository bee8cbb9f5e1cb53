//! Requests that must be refused, and how.

use serde_json::{Value, json};

use crate::client::request;

/// One bad request.
pub struct Bad {
    pub name: String,
    /// As it is sent.
    pub bytes: Vec<u8>,
    pub status: u16,
    /// The `param` of the error, if it must have one.
    pub param: Option<&'static str>,
}

const PLAIN: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// Bodies of `/v1/completions` in which one field is wrong, and that field.
fn wrong_fields() -> Vec<(Value, &'static str)> {
    vec![
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"temperature": -0.1}), "temperature"),
        (json!({"temperature": 2.1}), "temperature"),
        (json!({"top_p": 0}), "top_p"),
        (json!({"top_p": 1.5}), "top_p"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"min_p": 2}), "min_p"),
        (json!({"repetition_penalty": 0}), "repetition_penalty"),
        (json!({"presence_penalty": 3}), "presence_penalty"),
        (json!({"frequency_penalty": -3}), "frequency_penalty"),
        (json!({"n": 0}), "n"),
        (json!({"n": 2, "temperature": 0}), "n"),
        (json!({"n": 100_000, "temperature": 1}), "n"),
        (json!({"n": 17, "temperature": 1}), "n"),
        (json!({"max_tokens": -1}), "max_tokens"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": 1e30}), "max_tokens"),
        (json!({"max_tokens": 5, "min_tokens": 6}), "min_tokens"),
        (json!({"logprobs": 21}), "logprobs"),
        (json!({"logprobs": "all"}), "logprobs"),
        (
            json!({"prompt_logprobs": 3, "stream": true}),
            "prompt_logprobs",
        ),
        (json!({"stop": ""}), "stop"),
        (json!({"stop": ["a", ""]}), "stop"),
        (json!({"stop": ["a", "b", "c", "d", "e"]}), "stop"),
        (json!({"stop": 7}), "stop"),
        (json!({"seed": 1.5}), "seed"),
        (json!({"logit_bias": {"x": 1}}), "logit_bias"),
        (json!({"logit_bias": {"99999999": 1}}), "logit_bias"),
        (json!({"allowed_token_ids": []}), "allowed_token_ids"),
        (
            json!({"allowed_token_ids": [99_999_999]}),
            "allowed_token_ids",
        ),
        (json!({"stop_token_ids": [-1]}), "stop_token_ids"),
        (json!({"prompt": null}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": 5}), "prompt"),
        (json!({"prompt": [1, "a"]}), "prompt"),
        (json!({"prompt": [99_999_999]}), "prompt"),
        (json!({"prompt": vec!["a"; 1025]}), "prompt"),
        (json!({"prompt": vec![5; 2000]}), "input_tokens"),
        (json!({"prompt": "word ".repeat(3000)}), "input_tokens"),
        (json!({"model": "other"}), "model"),
        (json!({"model": 1}), "model"),
        (json!({"stream": "yes"}), "stream"),
        (
            json!({"stream_options": {"include_usage": true}}),
            "stream_options",
        ),
        (
            json!({"stream": true, "stream_options": 1}),
            "stream_options",
        ),
        (json!({"priority": 1}), "priority"),
        (json!({"cache_salt": "a/b"}), "cache_salt"),
        (json!({"request_id": "a b"}), "request_id"),
        (json!({"response_format": "json"}), "response_format"),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}),
            "response_format",
        ),
        (
            json!({"structured_outputs": {"regex": "("}}),
            "structured_outputs",
        ),
        (
            json!({"structured_outputs": {"regex": "a", "choice": ["a"]}}),
            "structured_outputs",
        ),
        (
            json!({"structured_outputs": {"grammar": "root ::= x"}}),
            "structured_outputs",
        ),
        (
            json!({"structured_outputs": {"json": deep_schema()}}),
            "structured_outputs",
        ),
        (json!({"guided_choice": []}), "guided_choice"),
        (json!({"guided_regex": "a".repeat(300_000)}), "guided_regex"),
        (json!({"use_beam_search": true}), "use_beam_search"),
        (json!({"suffix": "end"}), "suffix"),
        (json!({"best_of": 3}), "best_of"),
    ]
}

/// A chat with one tool.
fn with_tool(mut body: Value) -> Value {
    body["messages"] = json!([{"role": "user", "content": "a"}]);
    body["tools"] = json!([{"type": "function", "function": {"name": "f"}}]);
    body
}

fn deep_schema() -> Value {
    (0..70).fold(json!({}), |inner, _| json!({"items": inner}))
}

fn wrong_chats() -> Vec<(Value, &'static str)> {
    vec![
        (json!({}), "messages"),
        (json!({"messages": "hi"}), "messages"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": [1]}), "messages"),
        (json!({"messages": [{"content": "no role"}]}), "messages"),
        (
            json!({"messages": [{"role": "user", "content": 5}]}),
            "messages",
        ),
        (
            json!({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}),
            "top_logprobs",
        ),
        (
            json!({"messages": [{"role": "user", "content": "a"}], "chat_template": "{{ boom"}),
            "chat_template",
        ),
        (
            json!({"messages": [{"role": "user", "content": "a"}], "echo": true}),
            "echo",
        ),
        (
            json!({"messages": [{"role": "user", "content": "a"}], "tools": []}),
            "tools",
        ),
        (
            json!({"messages": [{"role": "user", "content": "a"}], "tools": [{}]}),
            "tools",
        ),
        (
            json!({
                "messages": [{"role": "user", "content": "a"}],
                "tools": [{"type": "function", "function": {"name": "f"}}],
            }),
            "tool_choice",
        ),
        (
            json!({"messages": [{"role": "user", "content": "a"}], "tool_choice": "required"}),
            "tool_choice",
        ),
        (with_tool(json!({"tool_choice": "must"})), "tool_choice"),
        (
            with_tool(json!({"tool_choice": {"type": "function", "function": {"name": "g"}}})),
            "tool_choice",
        ),
        (
            with_tool(json!({"tool_choice": "required", "guided_regex": "a"})),
            "tool_choice",
        ),
        (
            json!({
                "messages": [{"role": "user", "content": "a"}], "tool_choice": "required",
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}],
            }),
            "tools",
        ),
    ]
}

/// All of them.
pub fn all() -> Vec<Bad> {
    let mut all = Vec::new();
    for (fields, param) in wrong_fields() {
        let mut body = json!({"prompt": "a", "max_tokens": 2});
        for (name, value) in fields.as_object().unwrap() {
            body[name] = value.clone();
        }
        let status = if fields == json!({"model": "other"}) {
            404
        } else {
            400
        };
        let body = body.to_string();
        all.push(Bad {
            name: fields.to_string().chars().take(80).collect(),
            bytes: request(PLAIN, "", body.as_bytes()),
            status,
            param: Some(param),
        });
    }
    for (body, param) in wrong_chats() {
        let body = body.to_string();
        all.push(Bad {
            bytes: request(CHAT, "", body.as_bytes()),
            name: body,
            status: 400,
            param: Some(param),
        });
    }
    let deep = format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000));
    let deep_field = format!("{{\"prompt\": \"a\", \"x\": {deep}}}");
    for (name, body, status) in [
        ("no body", &b""[..], 400),
        ("not JSON", b"{'prompt': 1}", 400),
        ("cut off JSON", b"{\"prompt\": \"a", 400),
        ("two values", b"{} {}", 400),
        ("an array", b"[]", 400),
        ("NaN", b"{\"prompt\": \"a\", \"temperature\": NaN}", 400),
        (
            "out of range",
            b"{\"prompt\": \"a\", \"temperature\": 1e999}",
            400,
        ),
        ("not UTF-8", b"{\"prompt\": \"\xff\xfe\"}", 400),
        ("half a surrogate", b"{\"prompt\": \"\\ud800\"}", 400),
        ("deep", deep.as_bytes(), 400),
        ("deep in a field", deep_field.as_bytes(), 400),
        ("too big", &vec![b' '; (2 << 20) + 1], 413),
    ] {
        all.push(Bad {
            name: name.to_owned(),
            bytes: request(PLAIN, "", body),
            status,
            param: None,
        });
    }
    let raw = |name: &str, bytes: &[u8], status| Bad {
        name: name.to_owned(),
        bytes: bytes.to_vec(),
        status,
        param: None,
    };
    let cookie = "a".repeat(100_000);
    all.push(raw(
        "no content type",
        b"POST /v1/completions HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}",
        400,
    ));
    all.push(raw("no HTTP", b"\x16\x03\x01 hello\r\n\r\n", 400));
    all.push(raw(
        "a long head",
        format!("GET /health HTTP/1.0\r\nCookie: {cookie}\r\n\r\n").as_bytes(),
        431,
    ));
    all.push(raw(
        "many header fields",
        format!("GET /health HTTP/1.0\r\n{}\r\n", "A: b\r\n".repeat(200)).as_bytes(),
        431,
    ));
    all.push(raw(
        "a wrong length",
        b"POST /v1/completions HTTP/1.0\r\nContent-Length: -1\r\n\r\n",
        400,
    ));
    all
}
