//! What the answers to the good lines must be, option by option.

use serde_json::{Value, json};

use crate::common::{Answers, golden, ids};

fn floats(value: &Value) -> Vec<f64> {
    let list = value.as_array().unwrap();
    list.iter().map(|v| v.as_f64().unwrap()).collect()
}

fn close(a: &[f64], b: &[f64]) {
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        assert!((a - b).abs() < 1e-3, "{a} and {b}");
    }
}

/// Text, token ids and lists of both: the golden prompt and the golden answer.
pub fn prompts_in_every_form(answers: &Answers) {
    let (case, other) = (golden("sum"), golden("emoji"));
    for id in ["text", "ids", "17", "last", "nulls", "request_id"] {
        assert_eq!(answers.tokens(id), case.greedy, "{id}");
        let choice = answers.choice(id);
        assert_eq!(ids(&choice["prompt_token_ids"]), case.prompt, "{id}");
        assert_eq!(choice["finish_reason"], "stop", "{id}");
        assert_eq!(choice["stop_reason"], Value::Null, "{id}");
        assert_eq!(choice["logprobs"], Value::Null, "{id}");
    }
    assert!(
        answers.text("text").contains("85"),
        "{}",
        answers.text("text")
    );
    for (id, order) in [("texts", [&other, &case]), ("id lists", [&case, &other])] {
        let choices = answers.body(id)["choices"].as_array().unwrap();
        assert_eq!(choices.len(), 2);
        for (at, (choice, case)) in choices.iter().zip(order).enumerate() {
            assert_eq!(choice["index"], at);
            assert_eq!(ids(&choice["token_ids"]), case.greedy);
            assert_eq!(ids(&choice["prompt_token_ids"]), case.prompt);
        }
    }
}

/// `n` gives different continuations of one prompt; a seed gives the same one again.
pub fn parallel_sampling_and_seeds(answers: &Answers) {
    let choices = answers.body("n")["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 3);
    assert!((0..3).all(|at| choices[at]["index"] == at));
    assert_ne!(choices[0]["token_ids"], choices[1]["token_ids"]);
    assert_ne!(choices[1]["token_ids"], choices[2]["token_ids"]);

    let both = answers.body("n and texts")["choices"].as_array().unwrap();
    assert!((0..4).all(|at| both[at]["index"] == at));
    let prompts = [golden("emoji").prompt, golden("sum").prompt];
    for (at, choice) in both.iter().enumerate() {
        assert_eq!(ids(&choice["prompt_token_ids"]), prompts[at / 2]);
    }

    assert_eq!(answers.tokens("seed 1"), answers.tokens("seed 1 again"));
    assert_ne!(answers.tokens("seed 1"), answers.tokens("seed 2"));
    assert!(!answers.tokens("seed -5").is_empty());
}

/// The prompt before the text, and its log-probabilities before those of the answer.
pub fn echo_and_scores(answers: &Answers) {
    let (case, other) = (golden("sum"), golden("emoji"));
    let answer = answers.text("text");
    let echoed = format!("{}{answer}", case.text);
    assert_eq!(answers.text("echo"), echoed);
    assert_eq!(answers.text("echo ids"), echoed);
    let logprobs = &answers.choice("echo ids")["logprobs"];
    let own = logprobs["token_logprobs"].as_array().unwrap();
    assert_eq!(own.len(), case.prompt.len() + case.greedy.len());
    assert!(own[0].is_null() && logprobs["top_logprobs"][0].is_null());
    assert!(own[1..].iter().all(Value::is_number));

    // Scoring prompt and answer gives what generating the answer gave.
    let score = answers.choice("score");
    assert_eq!(score["token_ids"], json!([]));
    assert_eq!(score["finish_reason"], "length");
    assert_eq!(answers.body("score")["usage"]["completion_tokens"], 0);
    let scored = floats(&json!(
        score["logprobs"]["token_logprobs"].as_array().unwrap()[case.prompt.len()..]
    ));
    let generated = floats(&answers.choice("logprobs")["logprobs"]["token_logprobs"]);
    close(&scored, &generated);

    let texts = answers.body("score texts")["choices"].as_array().unwrap();
    assert_eq!(texts[0]["text"], case.text.as_str());
    assert_eq!(texts[1]["text"], other.text.as_str());
}

/// Log-probabilities of generated and of prompt tokens.
pub fn logprobs(answers: &Answers) {
    let case = golden("sum");
    let logprobs = &answers.choice("logprobs")["logprobs"];
    let own = floats(&logprobs["token_logprobs"]);
    let tops = logprobs["top_logprobs"].as_array().unwrap();
    let tokens = logprobs["tokens"].as_array().unwrap();
    let offsets = ids(&logprobs["text_offset"]);
    assert_eq!(own.len(), case.greedy.len());
    assert_eq!(
        (tops.len(), tokens.len(), offsets.len()),
        (own.len(), own.len(), own.len())
    );
    let mut offset = 0;
    for at in 0..own.len() {
        let top = tops[at].as_object().unwrap();
        let token = tokens[at].as_str().unwrap();
        assert_eq!(top.len(), 3);
        // Greedy: the token is the most likely one.
        let best = top
            .values()
            .map(|v| v.as_f64().unwrap())
            .fold(f64::MIN, f64::max);
        assert_eq!(top[token], best);
        assert!(best <= 0.0 && own[at] == best);
        assert_eq!(offsets[at], offset);
        offset += token.chars().count() as u32;
    }
    let written: String = tokens.iter().map(|t| t.as_str().unwrap()).collect();
    assert!(written.starts_with(answers.text("text")), "{written}");

    let names: Vec<String> = case
        .greedy
        .iter()
        .map(|id| format!("token_id:{id}"))
        .collect();
    assert_eq!(
        answers.choice("token names")["logprobs"]["tokens"],
        json!(names)
    );

    let prompt = answers.choice("prompt_logprobs")["prompt_logprobs"]
        .as_array()
        .unwrap();
    assert_eq!(prompt.len(), case.prompt.len() + case.greedy.len());
    assert!(prompt[0].is_null());
    for (at, id) in case.greedy.iter().enumerate() {
        let entry = &prompt[case.prompt.len() + at][id.to_string()];
        assert_eq!(entry["rank"], 1, "the golden answer is greedy");
        assert!((entry["logprob"].as_f64().unwrap() - own[at]).abs() < 1e-3);
        assert!(entry["decoded_token"].is_string());
    }
}

/// Stop strings and stop tokens, and what is said about them.
pub fn stops(answers: &Answers) {
    let case = golden("sum");
    let choice = answers.choice("stop_token_ids");
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(choice["stop_reason"], case.greedy[3]);
    let until = case
        .greedy
        .iter()
        .position(|id| *id == case.greedy[3])
        .unwrap();
    assert_eq!(ids(&choice["token_ids"]), case.greedy[..=until]);

    let content = |id| answers.choice(id)["message"]["content"].as_str().unwrap();
    let text = content("story");
    assert!(!text.is_empty() && !text.contains('.'), "{text}");
    assert_eq!(content("story with stop"), format!("{text}."));
    for id in ["story", "story with stop"] {
        assert_eq!(answers.choice(id)["finish_reason"], "stop");
        assert_eq!(answers.choice(id)["stop_reason"], ".");
    }
}

/// Which tokens may come, and how many.
pub fn limits_on_tokens(answers: &Answers) {
    let case = golden("sum");
    assert_eq!(answers.tokens("logit_bias"), [300; 6]);
    assert_eq!(answers.choice("logit_bias")["finish_reason"], "length");
    let allowed = answers.tokens("allowed_token_ids");
    assert!(allowed.len() == 30 && allowed.contains(&65) && allowed.contains(&66));
    assert!(
        allowed.iter().all(|id| [65, 66].contains(id)),
        "{allowed:?}"
    );
    let text = answers.text("bad_words");
    assert!(!text.is_empty() && !text.contains("85"), "{text}");
    assert!(answers.tokens("min_tokens").len() >= 20);
    let eos = case.greedy.last().unwrap();
    assert!(!answers.tokens("min_tokens")[..19].contains(eos));
    let on = answers.tokens("ignore_eos");
    assert_eq!(on.len(), 40);
    assert_eq!(on[..case.greedy.len()], case.greedy);
    assert_eq!(answers.choice("ignore_eos")["finish_reason"], "length");
    assert_ne!(answers.tokens("penalties"), case.greedy);
}

/// The chat endpoint.
pub fn chats(answers: &Answers) {
    let case = golden("sum");
    let body = answers.body("chat");
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(ids(&body["prompt_token_ids"]), case.prompt);
    assert_eq!(answers.tokens("chat"), case.greedy);
    let choice = answers.choice("chat");
    assert_eq!(choice["message"]["role"], "assistant");
    assert_eq!(choice["message"]["content"], answers.text("text"));
    let content = choice["logprobs"]["content"].as_array().unwrap();
    let own: Vec<f64> = content
        .iter()
        .map(|c| c["logprob"].as_f64().unwrap())
        .collect();
    close(
        &own,
        &floats(&answers.choice("logprobs")["logprobs"]["token_logprobs"]),
    );
    for entry in content {
        let top = entry["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 2);
        assert_eq!(top[0]["token"], entry["token"]);
        assert!(top[0]["logprob"].as_f64() >= top[1]["logprob"].as_f64());
        let bytes: Vec<u8> = serde_json::from_value(entry["bytes"].clone()).unwrap();
        assert_eq!(
            String::from_utf8_lossy(&bytes),
            entry["token"].as_str().unwrap()
        );
    }
    // Text in parts is text, and max_completion_tokens goes before max_tokens.
    assert_eq!(
        ids(&answers.body("chat parts")["prompt_token_ids"]),
        case.prompt
    );
    assert_eq!(answers.tokens("chat parts"), case.greedy[..5]);
}

/// Ids, names and usage.
pub fn names_and_counts(answers: &Answers) {
    let (case, other) = (golden("sum"), golden("emoji"));
    let body = answers.body("request_id");
    assert_eq!(body["id"], "cmpl-mine");
    assert_eq!(body["object"], "text_completion");
    assert_eq!(body["model"], "nano-vllm-demo");
    assert!(body["created"].as_u64().unwrap() > 1_700_000_000);
    let (prompt, answer) = (case.prompt.len(), case.greedy.len());
    let (both, both_answers) = (prompt + other.prompt.len(), answer + other.greedy.len());
    for (id, prompt, answer) in [
        ("text", prompt, answer),
        ("texts", both, both_answers),
        ("id lists", both, both_answers),
        ("ignore_eos", prompt, 40),
        ("score texts", both, 0),
    ] {
        let usage = &answers.body(id)["usage"];
        assert_eq!(usage["prompt_tokens"], prompt, "{id}");
        assert_eq!(usage["completion_tokens"], answer, "{id}");
        assert_eq!(usage["total_tokens"], prompt + answer, "{id}");
        assert!(
            usage["prompt_tokens_details"]["cached_tokens"].is_u64(),
            "{id}"
        );
    }
    let body = answers.body("n");
    let choices = body["choices"].as_array().unwrap();
    let generated: usize = choices.iter().map(|c| ids(&c["token_ids"]).len()).sum();
    assert_eq!(body["usage"]["completion_tokens"], generated);
    assert_eq!(body["usage"]["prompt_tokens"], golden("poem").prompt.len());
}

/// Text of the form that was asked for.
pub fn structured(answers: &Answers) {
    let parts: Vec<&str> = answers.text("regex").split('-').collect();
    assert_eq!(parts.len(), 3, "{parts:?}");
    let is = |part: &str, len: usize, within: &str| {
        part.len() == len && part.chars().all(|c| within.contains(c))
    };
    assert!(
        is(parts[0], 3, "abcdef") && is(parts[1], 2, "0123456789"),
        "{parts:?}"
    );
    let choices = answers.body("choice")["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 3);
    for choice in choices {
        let text = choice["text"].as_str().unwrap();
        assert!(
            ["tortoise", "hare and hedgehog", "Zürich"].contains(&text),
            "{text}"
        );
        assert_eq!(choice["finish_reason"], "stop");
    }
    let choice = answers.choice("schema");
    assert_eq!(choice["finish_reason"], "stop");
    let value: Value =
        serde_json::from_str(choice["message"]["content"].as_str().unwrap()).unwrap();
    assert!(
        [json!(true), json!(null), json!("z")].contains(&value["x"]),
        "{value}"
    );
    assert!(
        value["y"].as_array().unwrap().iter().all(Value::is_boolean),
        "{value}"
    );
}
