//! What can be wrong with a line, and what its error must say.

use serde_json::{Value, json};

/// Fields that are known and not supported yet, with a value that asks for something.
pub fn unsupported() -> Vec<(&'static str, Value)> {
    vec![
        ("stream", json!(true)),
        ("stream_options", json!({"include_usage": true})),
        ("use_beam_search", json!(true)),
        ("length_penalty", json!(1.5)),
        ("best_of", json!(3)),
        ("spaces_between_special_tokens", json!(false)),
        ("truncate_prompt_tokens", json!(5)),
        ("truncation_side", json!("left")),
        ("logprob_token_ids", json!([1])),
        ("repetition_detection", json!({})),
        ("thinking_token_budget", json!(9)),
        ("prompt_embeds", json!("AAAA")),
        ("kv_transfer_params", json!({})),
        ("vllm_xargs", json!({})),
        ("session_id", json!("s")),
        ("stream_interval", json!(2)),
    ]
}

/// As [`unsupported`], for fields that only chats have.
pub fn unsupported_in_chats() -> Vec<(&'static str, Value)> {
    vec![
        ("include_reasoning", json!(false)),
        ("chat_template", json!("{{ messages }}")),
        ("return_prompt_text", json!(true)),
        ("mm_processor_kwargs", json!({})),
        ("media_io_kwargs", json!({})),
    ]
}

/// One field over a good body, the parameter that the error names, and a part of its message.
pub fn wrong_values() -> Vec<(&'static str, Value, &'static str, &'static str)> {
    let too_long = vec![5; 2000];
    vec![
        (
            "response_format",
            json!({"type": "yaml"}),
            "response_format",
            "json_schema",
        ),
        (
            "structured_outputs",
            json!({"regex": "("}),
            "structured_outputs",
            "cannot be used",
        ),
        (
            "guided_choice",
            json!(5),
            "guided_choice",
            "a list of strings",
        ),
        ("prompt", json!(""), "prompt", "empty"),
        ("prompt", json!([]), "prompt", "empty"),
        ("prompt", json!([[]]), "prompt", "empty"),
        ("prompt", json!(["ok", ""]), "prompt", "empty"),
        ("prompt", Value::Null, "prompt", "missing"),
        ("prompt", json!({"a": 1}), "prompt", "must be a string"),
        ("prompt", json!([true]), "prompt", "must be a string"),
        ("prompt", json!([[1], 2]), "prompt", "must be a string"),
        ("prompt", json!([1, "a"]), "prompt", "not of token ids"),
        ("prompt", json!([-1]), "prompt", "not of token ids"),
        ("prompt", json!([1.5]), "prompt", "not of token ids"),
        (
            "prompt",
            json!([4_294_967_296_u64]),
            "prompt",
            "not of token ids",
        ),
        (
            "prompt",
            json!([1, 99_999]),
            "prompt",
            "token id 99999 at position 1",
        ),
        (
            "prompt",
            json!([[1], [99_999]]),
            "prompt",
            "vocabulary size",
        ),
        (
            "prompt",
            json!(vec!["a"; 1025]),
            "prompt",
            "at most 1024 prompts, got 1025",
        ),
        (
            "prompt",
            json!(too_long),
            "input_tokens",
            "maximum context length is 1024",
        ),
        (
            "prompt",
            json!("word ".repeat(200_000)),
            "input_tokens",
            "maximum context length",
        ),
        (
            "temperature",
            json!(-1),
            "temperature",
            "between 0 and 2, got -1",
        ),
        ("temperature", json!(2.5), "temperature", "got 2.5"),
        ("temperature", json!(1e39), "temperature", "got inf"),
        (
            "temperature",
            json!("hot"),
            "temperature",
            "must be a number, found \"hot\"",
        ),
        (
            "top_p",
            json!(0),
            "top_p",
            "greater than 0 and at most 1, got 0",
        ),
        ("top_p", json!(1.1), "top_p", "got 1.1"),
        ("top_k", json!(-2), "top_k", "at least -1"),
        ("min_p", json!(2), "min_p", "between 0 and 1"),
        ("n", json!(0), "n", "between 1 and 16384, got 0"),
        ("n", json!(-1), "n", "positive integer"),
        ("n", json!(17), "n", "max_num_seqs (16), got 17"),
        (
            "repetition_penalty",
            json!(0),
            "repetition_penalty",
            "greater than 0",
        ),
        (
            "presence_penalty",
            json!(3),
            "presence_penalty",
            "between -2 and 2",
        ),
        (
            "frequency_penalty",
            json!(-3),
            "frequency_penalty",
            "between -2 and 2",
        ),
        ("max_tokens", json!(0), "max_tokens", "at least 1, got 0"),
        ("max_tokens", json!(-1), "max_tokens", "must be an integer"),
        (
            "min_tokens",
            json!(99),
            "min_tokens",
            "at most max_tokens (5)",
        ),
        ("logprobs", json!(21), "logprobs", "20"),
        ("logprobs", json!(-2), "logprobs", "at least -1"),
        ("prompt_logprobs", json!(21), "prompt_logprobs", "20"),
        (
            "logit_bias",
            json!({"99999": 1}),
            "logit_bias",
            "vocabulary size",
        ),
        (
            "logit_bias",
            json!({"x": 1}),
            "logit_bias",
            "'x', which is no token id",
        ),
        ("logit_bias", json!({"1": 1e39}), "logit_bias", "finite"),
        ("logit_bias", json!([1]), "logit_bias", "map token ids"),
        (
            "allowed_token_ids",
            json!([]),
            "allowed_token_ids",
            "at least one",
        ),
        (
            "allowed_token_ids",
            json!([99_999]),
            "allowed_token_ids",
            "vocabulary size",
        ),
        (
            "stop_token_ids",
            json!([99_999]),
            "stop_token_ids",
            "vocabulary size",
        ),
        ("bad_words", json!([" "]), "bad_words", "not blank"),
        ("bad_words", json!("no"), "bad_words", "list of strings"),
        ("stop", json!(""), "stop", "not empty"),
        ("stop", json!(["a", ""]), "stop", "not empty"),
        (
            "stop",
            json!(["a", "b", "c", "d", "e"]),
            "stop",
            "at most 4 strings, got 5",
        ),
        ("stop", json!([1]), "stop", "list of strings"),
        ("seed", json!(1.5), "seed", "64-bit integer"),
        (
            "priority",
            json!(3),
            "priority",
            "scheduling_policy = priority",
        ),
        (
            "cache_salt",
            json!("a/b"),
            "cache_salt",
            "1 to 128 characters",
        ),
        ("echo", json!("yes"), "echo", "true or false"),
        ("suffix", json!("end"), "suffix", "not supported"),
        (
            "temprature",
            json!(1),
            "temprature",
            "unknown field 'temprature'",
        ),
        (
            "messages",
            json!([]),
            "messages",
            "unknown field 'messages'",
        ),
    ]
}

/// As [`wrong_values`], over a good chat.
pub fn wrong_chats() -> Vec<(&'static str, Value, &'static str, &'static str)> {
    vec![
        ("messages", Value::Null, "messages", "missing"),
        ("messages", json!("hello"), "messages", "a list of messages"),
        ("messages", json!([]), "messages", "at least one message"),
        ("messages", json!([5]), "messages", "message"),
        (
            "messages",
            json!([{"content": "no role"}]),
            "messages",
            "role",
        ),
        ("echo", json!(true), "echo", "not supported"),
        ("top_logprobs", json!(2), "top_logprobs", "needs logprobs"),
        ("logprobs", json!(2), "logprobs", "true or false"),
        ("max_tokens", json!(0), "max_tokens", "at least 1"),
        (
            "max_completion_tokens",
            json!(0),
            "max_tokens",
            "at least 1",
        ),
        ("functions", json!([]), "functions", "unknown field"),
        ("prompt", json!("x"), "prompt", "unknown field 'prompt'"),
    ]
}

/// Lines that go wrong before their body is read: bytes, status, parameter, part of the message.
pub fn wrong_lines() -> Vec<(Vec<u8>, u16, Value, &'static str)> {
    let with = |more: &str| format!(r#"{{"custom_id":"ID",{more}}}"#).into_bytes();
    let post = |body: &str| {
        with(&format!(
            r#""method":"POST","url":"/v1/completions","body":{body}"#
        ))
    };
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let null = Value::Null;
    vec![
        (
            b"not JSON".to_vec(),
            400,
            null.clone(),
            "is not JSON: expected ident (column 2)",
        ),
        (
            b"{\"custom_id\":\"cut".to_vec(),
            400,
            null.clone(),
            "is not JSON",
        ),
        (
            b"[1]".to_vec(),
            400,
            null.clone(),
            "must be a JSON object, found an array",
        ),
        (
            b"null".to_vec(),
            400,
            null.clone(),
            "must be a JSON object, found null",
        ),
        (
            b"5".to_vec(),
            400,
            null.clone(),
            "must be a JSON object, found a number",
        ),
        (b"\"\xff\xfe\"".to_vec(), 400, null.clone(), "is not UTF-8"),
        (
            deep.clone().into_bytes(),
            400,
            null.clone(),
            "recursion limit",
        ),
        (
            post(&format!(r#"{{"prompt":{deep}}}"#)),
            400,
            null.clone(),
            "recursion limit",
        ),
        (
            post(r#"{"prompt":"a","temperature":NaN}"#),
            400,
            null.clone(),
            "is not JSON",
        ),
        (
            post(r#"{"prompt":"a","temperature":1e999}"#),
            400,
            null.clone(),
            "out of range",
        ),
        (
            post(r#"{"prompt":"a"} trailing"#),
            400,
            null.clone(),
            "is not JSON",
        ),
        (
            post("[]"),
            400,
            null.clone(),
            "the body must be a JSON object, found an array",
        ),
        (post("null"), 400, json!("body"), "body is missing"),
        (
            with(r#""url":"/v1/completions""#),
            400,
            json!("body"),
            "body is missing",
        ),
        (with(r#""body":{}"#), 400, json!("url"), "url is missing"),
        (
            with(r#""url":7,"body":{}"#),
            400,
            json!("url"),
            "url must be a string",
        ),
        (
            with(r#""url":"/v1/embeddings","body":{}"#),
            404,
            json!("url"),
            "use /v1/completions",
        ),
        (
            with(r#""method":"GET","url":"/v1/completions","body":{}"#),
            400,
            json!("method"),
            "POST",
        ),
        (
            with(r#""method":5,"url":"/v1/completions","body":{}"#),
            400,
            json!("method"),
            "POST",
        ),
        (
            with(r#""url":"/v1/completions","body":{"prompt":"a"},"boddy":1"#),
            400,
            json!("boddy"),
            "unknown field 'boddy'",
        ),
        (
            post(r#"{"prompt":"a","model":"gpt-4"}"#),
            404,
            json!("model"),
            "`gpt-4` does not exist",
        ),
    ]
}
