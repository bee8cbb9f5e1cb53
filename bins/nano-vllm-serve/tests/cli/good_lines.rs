//! `run-batch` on good lines: one file that asks for everything, and what it must give.

use serde_json::{Value, json};

use crate::common::{Answers, SMALL, batch, chat, completion, fixture, golden, ids};
use crate::good_lines_checks as checks;

/// A body for a greedy answer to the golden sum, with `more` over it.
fn sum(more: Value) -> Value {
    let case = golden("sum");
    let mut body = json!({
        "prompt": case.text, "temperature": 0, "max_tokens": 40, "return_token_ids": true,
    });
    let map = body.as_object_mut().unwrap();
    map.extend(more.as_object().unwrap().clone());
    body
}

/// A body that samples with a seed, for a prompt that may be continued in many ways.
fn sampled(seed: i64, more: Value) -> Value {
    let mut body = sum(json!({"prompt": golden("poem").text}));
    let map = body.as_object_mut().unwrap();
    map.extend(more.as_object().unwrap().clone());
    body["temperature"] = json!(1.5);
    body["seed"] = json!(seed);
    body
}

/// Every line is greedy or has a seed, so that nothing but its own body decides its answer.
fn input() -> Vec<u8> {
    let (case, other) = (golden("sum"), golden("emoji"));
    let scored = [case.prompt.as_slice(), &case.greedy].concat();
    let messages = json!([{"role": "user", "content": "What is 47 + 38?"}]);
    let story = json!({
        "messages": [{"role": "user", "content": "Tell me a story about a race with a rabbit."}],
        "temperature": 0, "max_tokens": 100, "return_token_ids": true, "stop": ["zzz", "."],
    });
    let mut story_with_stop = story.clone();
    story_with_stop["include_stop_str_in_output"] = json!(true);
    let lines = [
        completion("text", sum(json!({}))),
        completion("texts", sum(json!({"prompt": [other.text, case.text]}))),
        completion("ids", sum(json!({"prompt": case.prompt}))),
        completion(
            "id lists",
            sum(json!({"prompt": [case.prompt, other.prompt]})),
        ),
        completion("n", sampled(7, json!({"n": 3}))),
        completion(
            "n and texts",
            sampled(7, json!({"n": 2, "prompt": [other.text, case.text]})),
        ),
        completion("seed 1", sampled(1, json!({}))),
        completion("seed 1 again", sampled(1, json!({}))),
        completion("seed 2", sampled(2, json!({}))),
        completion(
            "seed -5",
            sampled(-5, json!({"top_k": 50, "top_p": 0.95, "min_p": 0.01})),
        ),
        completion("echo", sum(json!({"echo": true}))),
        completion(
            "echo ids",
            sum(json!({"echo": true, "prompt": [case.prompt], "logprobs": 2})),
        ),
        completion(
            "score",
            sum(json!({"echo": true, "prompt": scored, "max_tokens": 0, "logprobs": 0})),
        ),
        completion(
            "score texts",
            sum(json!({"echo": true, "prompt": [case.text, other.text], "max_tokens": 0})),
        ),
        completion("logprobs", sum(json!({"logprobs": 3}))),
        completion(
            "token names",
            sum(json!({"logprobs": 1, "return_tokens_as_token_ids": true})),
        ),
        completion(
            "prompt_logprobs",
            sum(json!({"prompt": scored, "prompt_logprobs": 2, "max_tokens": 1})),
        ),
        completion(
            "stop_token_ids",
            sum(json!({"stop_token_ids": [case.greedy[3]]})),
        ),
        completion(
            "logit_bias",
            sum(json!({"logit_bias": {"300": 100}, "max_tokens": 6})),
        ),
        completion(
            "allowed_token_ids",
            sampled(3, json!({"allowed_token_ids": [65, 66], "max_tokens": 30})),
        ),
        completion("bad_words", sum(json!({"bad_words": ["85"]}))),
        completion("min_tokens", sum(json!({"min_tokens": 20}))),
        completion("ignore_eos", sum(json!({"ignore_eos": true}))),
        completion(
            "penalties",
            sum(
                json!({"repetition_penalty": 1.3, "presence_penalty": 1.5, "frequency_penalty": -0.5}),
            ),
        ),
        completion(
            "request_id",
            sum(json!({"request_id": "mine", "user": "me", "metadata": {"a": 1}})),
        ),
        completion(
            "nulls",
            sum(json!({"stop": null, "n": null, "logprobs": null, "seed": null, "suffix": null})),
        ),
        chat(
            "chat",
            json!({"messages": messages, "temperature": 0, "return_token_ids": true, "logprobs": true, "top_logprobs": 2}),
        ),
        chat(
            "chat parts",
            json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "What is 47 + 38?"}]}], "temperature": 0, "return_token_ids": true, "max_completion_tokens": 5, "max_tokens": 9}),
        ),
        completion(
            "regex",
            sampled(
                3,
                json!({"structured_outputs": {"regex": "[a-f]{3}(-[0-9]{2}){2}"}}),
            ),
        ),
        completion(
            "choice",
            sampled(
                4,
                json!({"n": 3, "guided_choice": ["tortoise", "hare and hedgehog", "Zürich"]}),
            ),
        ),
        chat(
            "schema",
            json!({"messages": messages, "seed": 5, "max_tokens": 80, "return_token_ids": true, "response_format": {
                "type": "json_schema", "json_schema": {"name": "s", "schema": {
                    "type": "object", "required": ["x", "y"], "additionalProperties": false,
                    "properties": {"x": {"enum": [true, null, "z"]}, "y": {"type": "array", "maxItems": 2, "items": {"type": "boolean"}}},
            }}}}),
        ),
        chat("story", story),
        chat("story with stop", story_with_stop),
        // A custom_id that is no string, and the fields that may be left out.
        format!(
            "{}\r\n",
            json!({"custom_id": 17, "url": "/v1/completions", "body": sum(json!({}))})
        ),
        "\n \r\n".to_owned(),
    ];
    // The last line ends without a newline.
    let last = completion("last", sum(json!({})));
    format!("{}{}", lines.concat(), last.trim_end()).into_bytes()
}

/// What decides whether two answers are the same.
fn choices(answers: &Answers, id: &str) -> Value {
    let mut choices = answers.body(id)["choices"].clone();
    // Log-probabilities may differ in their last digits with the shape of a batch.
    for choice in choices.as_array_mut().unwrap() {
        choice["logprobs"].take();
        choice["prompt_logprobs"].take();
    }
    choices
}

#[test]
fn every_option_does_what_it_says_and_company_changes_nothing() {
    let input = input();
    let answers = batch(&SMALL, &input);
    checks::prompts_in_every_form(&answers);
    checks::parallel_sampling_and_seeds(&answers);
    checks::echo_and_scores(&answers);
    checks::logprobs(&answers);
    checks::stops(&answers);
    checks::limits_on_tokens(&answers);
    checks::chats(&answers);
    checks::structured(&answers);
    checks::names_and_counts(&answers);

    // The same lines in the reverse order, nearly alone, in tiny steps and blocks.
    let text = String::from_utf8(input).unwrap();
    let reversed: Vec<&str> = text.lines().rev().collect();
    let flags = [
        "--device",
        "cpu",
        "--threads",
        "1",
        "--dtype",
        "float32",
        "--tp",
        "1",
        "--max-model-len",
        "1K",
        "--max-num-seqs",
        "3",
        "--max-num-batched-tokens",
        "19",
        "--block-size",
        "4",
        "--no-enable-prefix-caching",
        "--num-gpu-blocks-override",
        "280",
    ];
    let others = batch(&flags, reversed.join("\n").as_bytes());
    assert_eq!(others.len(), answers.len());
    for id in answers.ids() {
        assert_eq!(choices(&answers, id), choices(&others, id), "{id}");
    }
}

#[test]
fn greedy_tokens_are_those_of_transformers() {
    let folder = fixture("qwen2-tied");
    let bytes = std::fs::read(folder.join("golden.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let read = |name: String| -> Vec<u32> {
        let data = tensors.tensor(&name).unwrap();
        let words = data.data().chunks(4);
        words
            .map(|w| u32::from_le_bytes(w.try_into().unwrap()))
            .collect()
    };
    let lengths = [700, 1, 129, 2, 333, 17, 64];
    let prompts: Vec<_> = lengths
        .iter()
        .map(|n| read(format!("prompt.{n}")))
        .collect();
    let line = completion(
        "golden",
        json!({
            "prompt": prompts, "temperature": 0, "max_tokens": 200, "ignore_eos": true,
            "return_token_ids": true,
        }),
    );
    let model = ["--model", folder.to_str().unwrap()];
    let answers = batch(&[&SMALL[..], &model].concat(), line.as_bytes());
    let choices = answers.body("golden")["choices"].as_array().unwrap();
    assert_eq!(choices.len(), lengths.len());
    for (choice, n) in choices.iter().zip(lengths) {
        assert_eq!(
            ids(&choice["token_ids"]),
            read(format!("greedy.{n}")),
            "{n}"
        );
    }
    let usage = &answers.body("golden")["usage"];
    assert_eq!(usage["prompt_tokens"], lengths.iter().sum::<usize>());
    assert_eq!(usage["completion_tokens"], 1400);
}
