//! `demo` and `bench`.

use std::fs;
use std::io::Read;

use serde_json::Value;

use crate::common::{Scratch, fixture, program, run};

#[test]
fn the_demo_answers_and_shows_who_takes_whose_place() {
    let ran = run(&["demo", "--cpu", "--threads", "1", "--check"], b"");
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let head = "nano-vllm-demo answers 14 questions at once; at most 6 run together";
    assert!(ran.stdout.starts_with(head), "{}", ran.stdout);
    let has = |text: &str| ran.stdout.contains(text);
    assert!(has("prefill A+") && has(" · decode ") && has(" finished"));
    assert!(has("tokens from the prefix cache") && has("   blocks A"));
    assert!(has(" tokens/s · first token ") && has("prefix cache hit rate: "));
    assert!(ran.stdout.trim_end().ends_with("blocks leaked: 0"));

    // Six of fourteen start in free places, so eight take the place of one that has finished, and
    // each place is taken once.
    let finished = |name: &str| ran.stdout.find(&format!("          {name} finished"));
    let mut taken: Vec<&str> = Vec::new();
    for (at, _) in ran.stdout.match_indices(" in the place of ") {
        let gone = &ran.stdout[at + " in the place of ".len()..][..1];
        assert!(finished(gone).unwrap() < at, "{gone} still runs");
        assert!(!taken.contains(&gone), "{gone}'s place is taken twice");
        taken.push(gone);
    }
    assert_eq!(taken.len(), 8);
    assert!(has("8 freed places taken"));
}

#[test]
fn the_demo_takes_questions_and_says_which_answer_was_cut() {
    let args = [
        "demo",
        "--cpu",
        "--threads",
        "1",
        "--plain",
        "--max-tokens",
        "3",
        "--max-num-seqs",
        "128",
    ];
    let own = ["-p", "What is 47 + 38?", "-p", "Tell me a story."];
    let ran = run(&[&args[..], &own].concat(), b"");
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stdout.contains("A What is 47 + 38?") && ran.stdout.contains("B Tell me"));
    assert_eq!(
        ran.stderr,
        "demo: A did not end by itself\ndemo: B did not end by itself\n"
    );

    let ran = run(
        &[
            "demo",
            "--cpu",
            "--threads",
            "1",
            "--check",
            "--max-tokens",
            "3",
        ],
        b"",
    );
    assert_eq!(ran.code, Some(1));
    assert!(
        ran.stderr.contains("A must mention 'abbit'"),
        "{}",
        ran.stderr
    );
    assert!(ran.stderr.contains("checks failed"));
    run(&["demo", "--check", "-p", "Hello"], b"").error(2);
}

#[test]
fn a_reader_that_goes_away_is_an_error_and_no_panic() {
    let mut child = program(&["demo", "--cpu", "--threads", "1", "--plain"])
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let mut stderr = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut stderr)
        .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert!(
        stderr.contains("cannot write to standard output"),
        "{stderr}"
    );
    assert!(!stderr.contains("panicked"), "{stderr}");
}

/// Runs a bench on random weights with nothing but a `config.json`, and reads its figures.
fn bench(kind: &str, flags: &[&str]) -> (String, Value) {
    let scratch = Scratch::new();
    fs::copy(
        fixture("qwen3-headdim").join("config.json"),
        scratch.path("config.json"),
    )
    .unwrap();
    let (model, json) = (scratch.path(""), scratch.path("figures.json"));
    let args = [
        &[
            "bench",
            kind,
            "--model",
            &model,
            "--load-format",
            "dummy",
            "--cpu",
            "--threads",
            "1",
        ],
        &["--output-json", &json][..],
        flags,
    ];
    let ran = run(&args.concat(), b"");
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    (
        ran.stdout,
        serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap(),
    )
}

#[test]
fn bench_latency_writes_vllms_keys() {
    let flags = [
        "--input-len",
        "20",
        "--output-len",
        "6",
        "--batch-size",
        "3",
        "--num-iters-warmup",
        "1",
        "--num-iters",
        "4",
    ];
    let (stdout, json) = bench("latency", &flags);
    assert!(stdout.starts_with("Avg latency: ") && stdout.contains("99% percentile latency: "));
    let latencies: Vec<f64> = serde_json::from_value(json["latencies"].clone()).unwrap();
    assert_eq!(latencies.len(), 4);
    let average = latencies.iter().sum::<f64>() / 4.0;
    assert!((json["avg_latency"].as_f64().unwrap() - average).abs() < 1e-9);
    let percentiles = json["percentiles"].as_object().unwrap();
    let (low, high) = (percentiles["10"].as_f64(), percentiles["99"].as_f64());
    assert!(low <= high && high == latencies.iter().copied().reduce(f64::max));
    for key in ["25", "50", "75", "90"] {
        assert!(percentiles[key].is_f64(), "{key}");
    }
    for key in [
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
        "inter_token_latency_s",
        "load_time_s",
        "start_to_first_token_s",
    ] {
        assert!(json[key].as_f64().unwrap() > 0.0, "{key}");
    }
}

#[test]
fn bench_throughput_writes_vllms_keys() {
    let fixed = [
        "--num-prompts",
        "5",
        "--input-len",
        "20",
        "--output-len",
        "7",
    ];
    let (stdout, json) = bench("throughput", &fixed);
    assert!(stdout.starts_with("Throughput: "));
    assert!(stdout.contains("Total num prompt tokens:  100\nTotal num output tokens:  35\n"));
    assert_eq!(json["num_requests"], 5);
    assert_eq!(json["total_num_tokens"], 135);
    let elapsed = json["elapsed_time"].as_f64().unwrap();
    for (key, count) in [
        ("requests_per_second", 5.0),
        ("tokens_per_second", 135.0),
        ("output_tokens_per_second", 35.0),
    ] {
        let rate = json[key].as_f64().unwrap();
        assert!((rate * elapsed - count).abs() < 1e-6 * count, "{key}");
    }

    let range = [
        "--num-prompts",
        "40",
        "--random-input-len",
        "3..9",
        "--random-output-len",
        "1..3",
        "--seed",
        "4",
        "--temperature",
        "0",
    ];
    let (_, json) = bench("throughput", &range);
    let total = json["total_input_tokens"].as_u64().unwrap();
    assert!((120..=360).contains(&total) && total != 240, "{total}");
    assert_eq!(bench("throughput", &range).1["total_input_tokens"], total);
}

#[test]
fn a_bench_that_would_measure_something_else_does_not_run() {
    let scratch = Scratch::new();
    let missing = scratch.path("missing/figures.json");
    for kind in ["latency", "throughput"] {
        let long = [
            "bench",
            kind,
            "--cpu",
            "--input-len",
            "2000",
            "--output-len",
            "49",
        ];
        let ran = run(&long, b"");
        assert!(
            ran.error(1)
                .contains("2049 tokens do not fit --max-model-len 2048")
        );
        let ran = run(&["bench", kind, "--cpu", "--output-json", &missing], b"");
        assert!(ran.error(1).contains("cannot write"));
    }
    let short = [
        "--input-len",
        "5",
        "--output-len",
        "5",
        "--temperature",
        "-1",
    ];
    let ran = run(&[&["bench", "latency", "--cpu"], &short[..]].concat(), b"");
    assert!(ran.error(1).contains("temperature must be"));
    for flags in [
        &["latency", "--num-iters", "0"][..],
        &["latency", "--output-len", "0"],
        &["throughput", "--num-prompts", "0"],
        &["throughput", "--random-input-len", "9..3"],
    ] {
        run(&[&["bench"], flags].concat(), b"").error(2);
    }
}
