//! Where lines come from and go to: pipes, files, what cannot be written.

use std::fs;
use std::io::{BufRead, BufReader, Write};

use serde_json::{Value, json};

use crate::common::{Answers, SMALL, Scratch, batch, completion, golden, program, run};

fn line(id: &str) -> String {
    let prompt = golden("sum").prompt;
    let body =
        json!({"prompt": prompt, "temperature": 0, "max_tokens": 40, "return_token_ids": true});
    completion(id, body)
}

#[test]
fn an_answer_comes_while_the_input_is_still_open() {
    let args = [&["run-batch", "-i", "-", "-o", "-"], &SMALL[..]].concat();
    let mut child = program(&args).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    for id in ["first", "second"] {
        input.write_all(line(id).as_bytes()).unwrap();
        input.flush().unwrap();
        let mut answer = String::new();
        output.read_line(&mut answer).unwrap();
        assert_eq!(Answers::read(&answer).tokens(id), golden("sum").greedy);
    }
    drop(input);
    assert!(child.wait().unwrap().success());
}

#[test]
fn no_lines_are_no_error() {
    for input in ["", "\n\n  \n"] {
        assert_eq!(batch(&SMALL, input.as_bytes()).len(), 0);
    }
}

#[test]
fn an_old_output_file_is_replaced_once_the_run_starts() {
    let scratch = Scratch::new();
    let input = scratch.file("in.jsonl", line("a"));
    let old = "x".repeat(100_000);
    let output = scratch.file("out.jsonl", &old);
    let files = ["run-batch", "-i", &input, "-o", &output];

    // A run that cannot start leaves it as it is, and a file is never its own output.
    let missing = scratch.path("no-model");
    run(&[&files[..], &["--model", &missing]].concat(), b"").error(1);
    assert_eq!(fs::read_to_string(&output).unwrap(), old);
    let ran = run(&["run-batch", "-i", &input, "-o", &input], b"");
    assert!(ran.error(1).contains("both input and output"));
    assert_eq!(fs::read_to_string(&input).unwrap(), line("a"));

    let ran = run(&[&files[..], &SMALL].concat(), b"");
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert_eq!(ran.stdout, "");
    let answers = Answers::read(&fs::read_to_string(&output).unwrap());
    assert_eq!(answers.tokens("a"), golden("sum").greedy);
}

#[test]
fn files_that_cannot_be_used_end_the_run_before_a_model_is_loaded() {
    let scratch = Scratch::new();
    let input = scratch.file("in.jsonl", line("a"));
    let missing = scratch.path("missing.jsonl");
    let inside_missing = scratch.path("missing/out.jsonl");
    let folder = scratch.path("");
    for (input, output, text) in [
        (&missing, "-", "cannot read"),
        (&folder, "-", "cannot read"),
        (&input, folder.as_str(), "cannot write"),
        (&input, &inside_missing, "cannot write"),
    ] {
        // The model does not exist either: the files are looked at first.
        let model = ["--model", &missing];
        let ran = run(
            &[&["run-batch", "-i", input, "-o", output], &model[..]].concat(),
            b"",
        );
        let error = ran.error(1);
        assert!(error.contains(text), "{error}");
        assert!(error.matches("(os error").count() <= 1, "{error}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_ends_the_run_with_an_error() {
    let scratch = Scratch::new();
    let input = scratch.file("in.jsonl", line("a"));
    let args = [&["run-batch", "-i", &input, "-o", "/dev/full"], &SMALL[..]].concat();
    let ran = run(&args, b"");
    let error = ran.error(1);
    assert!(
        error.contains("cannot write /dev/full: No space left"),
        "{error}"
    );
}

#[test]
fn vllm_spelling_of_flags_is_understood() {
    let lines = [
        completion(
            "a",
            json!({"model": "a", "prompt": "x", "priority": 3, "logprobs": 30}),
        ),
        completion("b", json!({"model": "b", "prompt": "x"})),
        completion("unnamed", json!({"prompt": "x"})),
        completion("other", json!({"model": "nano-vllm-demo", "prompt": "x"})),
    ];
    let flags = [
        "--cpu",
        "--dtype",
        "float32",
        "--tensor-parallel-size",
        "1",
        "--served-model-name",
        "a",
        "b",
        "--max-model-len",
        "1k",
        "--kv-cache-memory-bytes",
        "64M",
        "--max-num-seqs",
        "4",
        "--max-num-batched-tokens",
        "2k",
        "--enable-prefix-caching",
        "--enable-chunked-prefill",
        "--long-prefill-token-threshold",
        "64",
        "--scheduling-policy",
        "priority",
        "--load-format",
        "auto",
        "--seed",
        "3",
        "--attention-backend",
        "reference",
        "--max-logprobs",
        "-1",
        "--threads",
        "1",
        "--no-overlap",
        "--block-size",
        "32",
    ];
    let answers = batch(&flags, lines.concat().as_bytes());
    assert_eq!(answers.body("a")["model"], "a");
    assert_eq!(answers.body("b")["model"], "b");
    assert_eq!(answers.body("unnamed")["model"], "a");
    assert_eq!(answers.error("other")["code"], 404);
    assert_eq!(answers.error("other")["param"], Value::from("model"));
}
