//! The rules of the blocking engine, on a fake model.

mod common;

use common::*;
use engine::{FinishReason, Prompt, RequestError, StopReason};
use sampler::SamplingParams;

#[test]
fn text_goes_in_and_comes_out_in_the_order_of_the_requests() {
    let mut engine = Setup::default().engine();
    let requests = ["abc", "ABCDEFG", "123"]
        .map(|prompt| request(prompt, greedy(4)))
        .to_vec();
    let outputs = engine.generate(requests);
    let texts: Vec<_> = outputs
        .iter()
        .map(|output| output.as_ref().unwrap().outputs[0].text.as_str())
        .collect();
    assert_eq!(texts, ["defg", "HIJK", "4567"]);
    let first = outputs[0].as_ref().unwrap();
    assert_eq!(first.prompt_token_ids, [97, 98, 99]);
    assert_eq!(first.outputs[0].token_ids, [100, 101, 102, 103]);
    assert_eq!(first.outputs[0].finish_reason(), Some(FinishReason::Length));
    let metrics = first.metrics;
    let (queue, ttft, total) = (
        metrics.queue_time,
        metrics.time_to_first_token,
        metrics.total_time,
    );
    assert!(queue.unwrap() <= ttft.unwrap() && ttft.unwrap() <= total.unwrap());
    assert_empty(&engine);
}

#[test]
fn a_bad_request_gets_its_error_and_the_others_go_on() {
    let mut engine = Setup::default().engine();
    let with = |change: fn(&mut SamplingParams)| {
        let mut params = SamplingParams {
            max_tokens: Some(3),
            ..SamplingParams::default()
        };
        change(&mut params);
        request("abc", params)
    };
    let mut salted = with(|_| ());
    salted.cache_salt = Some("a@b".to_string());
    let mut urgent = with(|_| ());
    urgent.priority = 1;
    let bad = vec![
        (request("", greedy(3)), "prompt"),
        (request(vec![], greedy(3)), "prompt"),
        (request(vec![97, 257], greedy(3)), "prompt"),
        (request("x".repeat(200), greedy(3)), "input_tokens"),
        (with(|p| p.temperature = -1.0), "temperature"),
        (with(|p| p.temperature = f32::NAN), "temperature"),
        (with(|p| p.top_p = 0.0), "top_p"),
        (with(|p| p.n = 0), "n"),
        (with(|p| p.n = 9), "n"),
        (with(|p| p.max_tokens = Some(0)), "max_tokens"),
        (with(|p| p.stop = vec![String::new()]), "stop"),
        (with(|p| p.stop_token_ids = vec![257]), "stop_token_ids"),
        (with(|p| p.logit_bias = [(300, 1.0)].into()), "logit_bias"),
        (with(|p| p.logprobs = Some(21)), "logprobs"),
        (salted, "cache_salt"),
        (urgent, "priority"),
        (
            request(Prompt::Chat(Default::default()), greedy(3)),
            "messages",
        ),
    ];
    let mut requests = Vec::new();
    let mut params = Vec::new();
    for (bad, param) in bad {
        requests.push(bad);
        params.push(Some(param));
        requests.push(request("abc", greedy(3)));
        params.push(None);
    }
    for (at, (output, param)) in engine
        .generate(requests)
        .into_iter()
        .zip(params)
        .enumerate()
    {
        match (output, param) {
            (Ok(output), None) => assert_eq!(output.outputs[0].text, "def"),
            (Err(error), Some(param)) => {
                assert_eq!(error.param(), Some(param), "{error}");
                assert!(error.is_client_error());
            }
            (output, param) => panic!("request {at}: {output:?} where {param:?} was expected"),
        }
    }
    assert_empty(&engine);
}

#[test]
fn a_prompt_too_long_is_told_in_vllms_words() {
    let setup = Setup::default();
    let error = setup
        .engine()
        .generate(vec![request("x".repeat(200), greedy(1))]);
    let message = error[0].as_ref().unwrap_err().to_string();
    let expected = "This model's maximum context length is 200 tokens. However, your prompt \
                    contains 200 input tokens";
    assert!(message.starts_with(expected), "{message}");
    let small = Setup {
        blocks: 10,
        ..setup
    };
    let results = small
        .engine()
        .generate(vec![request("x".repeat(41), greedy(1))]);
    let error = results[0].as_ref().unwrap_err();
    let expected = RequestError::PromptExceedsCache {
        capacity: 40,
        prompt_tokens: 41,
    };
    assert_eq!(*error, expected);
}

#[test]
fn stop_strings_tokens_and_eos_end_a_sequence_early() {
    let stop = |change: &dyn Fn(&mut SamplingParams)| {
        let mut params = greedy(100);
        change(&mut params);
        params
    };
    let text = |reason: &str| Some(StopReason::Text(reason.to_string()));
    let strings = |list: &[&str]| list.iter().map(|s| s.to_string()).collect::<Vec<_>>();
    let cases: Vec<(&str, SamplingParams, &str, usize, Option<StopReason>)> = vec![
        (
            "abc",
            stop(&|p| p.stop = strings(&["gh"])),
            "def",
            5,
            text("gh"),
        ),
        (
            "abc",
            stop(&|p| p.stop = strings(&["hi", "fg"])),
            "de",
            4,
            text("fg"),
        ),
        (
            "abc",
            stop(&|p| {
                p.stop = strings(&["gh"]);
                p.include_stop_str_in_output = true;
            }),
            "defgh",
            5,
            text("gh"),
        ),
        (
            "abc",
            stop(&|p| p.stop_token_ids = vec![103]),
            "def",
            4,
            Some(StopReason::Token(103)),
        ),
        (
            "abc",
            stop(&|p| {
                p.stop_token_ids = vec![103];
                p.include_stop_str_in_output = true;
            }),
            "defg",
            4,
            Some(StopReason::Token(103)),
        ),
        // Too early for the first stop token; the second counts.
        (
            "abc",
            stop(&|p| {
                p.stop_token_ids = vec![103, 106];
                p.min_tokens = 5;
            }),
            "defghi",
            7,
            Some(StopReason::Token(106)),
        ),
        // Up to min_tokens no stop string may end, though one may begin.
        (
            "abc",
            stop(&|p| {
                p.stop = strings(&["ef", "hij"]);
                p.min_tokens = 6;
            }),
            "defg",
            7,
            text("hij"),
        ),
    ];
    for overlap in [false, true] {
        let setup = Setup {
            overlap,
            ..Setup::default()
        };
        let mut engine = setup.engine();
        for (prompt, params, expected, tokens, reason) in cases.clone() {
            let output = engine
                .generate(vec![request(prompt, params)])
                .remove(0)
                .unwrap();
            let output = &output.outputs[0];
            assert_eq!(
                (output.text.as_str(), output.token_ids.len()),
                (expected, tokens)
            );
            let finish = output.finish.as_ref().unwrap();
            assert_eq!(
                (finish.reason, &finish.stop_reason),
                (FinishReason::Stop, &reason)
            );
            assert_empty(&engine);
        }
        let steps = engine.stats().totals.steps;
        assert!(steps < 100, "{steps} steps: sequences were not ended early");
    }
}

#[test]
fn an_end_token_is_no_part_of_the_text_and_an_open_character_shows() {
    let mut engine = Setup::default().engine();
    let run = |engine: &mut engine::Engine<FakeRunner>, prompt: u32, params| {
        let output = engine
            .generate(vec![request(vec![prompt], params)])
            .remove(0);
        output.unwrap().outputs.remove(0)
    };
    // The model counts from 254 to 255 and on to the end token.
    let ended = run(&mut engine, 254, greedy(9));
    assert_eq!(
        (ended.token_ids.as_slice(), ended.text.as_str()),
        (&[255, EOS][..], "\u{FFFD}")
    );
    let finish = ended.finish.unwrap();
    assert_eq!(
        (finish.reason, finish.stop_reason),
        (FinishReason::Stop, None)
    );
    let ignoring = SamplingParams {
        ignore_eos: true,
        skip_special_tokens: false,
        ..greedy(3)
    };
    let ignored = run(&mut engine, 254, ignoring);
    assert_eq!(ignored.token_ids, [255, EOS, 0]);
    assert_eq!(ignored.text, "\u{FFFD}<eos>\0");
    // The first byte of a character, and no more: it shows when nothing follows.
    let open = run(&mut engine, 0xE3, greedy(1));
    assert_eq!(
        (open.token_ids.as_slice(), open.text.as_str()),
        (&[0xE4][..], "\u{FFFD}\u{FFFD}")
    );
}

#[test]
fn n_sequences_differ_and_each_is_what_it_is_alone() {
    let setup = Setup {
        mode: Mode::Hash,
        ..Setup::default()
    };
    let params = SamplingParams {
        n: 4,
        seed: Some(7),
        max_tokens: Some(20),
        logprobs: Some(0),
        ..SamplingParams::default()
    };
    let mut engine = setup.engine();
    let output = engine
        .generate(vec![request("some prompt", params.clone())])
        .remove(0)
        .unwrap();
    assert_eq!(output.outputs.len(), 4);
    for (index, seq) in output.outputs.iter().enumerate() {
        assert_eq!((seq.index as usize, seq.token_ids.len()), (index, 20));
        let logprobs = seq.logprobs.as_ref().unwrap();
        let tokens: Vec<u32> = logprobs.iter().map(|entry| entry.token).collect();
        assert_eq!(tokens, seq.token_ids);
        for other in &output.outputs[..index] {
            assert_ne!(other.token_ids, seq.token_ids);
        }
    }
    let single = SamplingParams { n: 1, ..params };
    let alone = engine
        .generate(vec![request("some prompt", single)])
        .remove(0)
        .unwrap();
    assert_eq!(alone.outputs[0].token_ids, output.outputs[0].token_ids);
    assert_empty(&engine);
}

#[test]
fn seeds_come_from_the_engine_where_a_request_has_none() {
    let run = |seed| {
        let setup = Setup {
            mode: Mode::Hash,
            seed,
            ..Setup::default()
        };
        let requests = vec![request("same", SamplingParams::default()); 2];
        let outputs = setup.engine().generate(requests);
        outputs.map_tokens()
    };
    let first = run(1);
    assert_eq!(first, run(1), "the same engine seed gives the same tokens");
    assert_ne!(first, run(2));
    assert_ne!(first[0], first[1], "equal requests of one engine differ");
}

trait MapTokens {
    fn map_tokens(self) -> Vec<Vec<u32>>;
}

impl MapTokens for Vec<Result<engine::RequestOutput, RequestError>> {
    fn map_tokens(self) -> Vec<Vec<u32>> {
        self.into_iter()
            .map(|o| o.unwrap().outputs[0].token_ids.clone())
            .collect()
    }
}

#[test]
fn prompt_logprobs_cover_each_position_once_whatever_the_chunk() {
    for budget in [8, 64] {
        let setup = Setup {
            max_num_batched_tokens: budget,
            ..Setup::default()
        };
        let mut engine = setup.engine();
        let params = SamplingParams {
            prompt_logprobs: Some(0),
            ..greedy(2)
        };
        let prompt = "a prompt of thirty-five characters.";
        // Twice: the second must not take the prompt from the cache.
        for _ in 0..2 {
            let output = engine
                .generate(vec![request(prompt, params.clone())])
                .remove(0)
                .unwrap();
            let list = output.prompt_logprobs.unwrap();
            assert_eq!(list[0], None);
            let tokens: Vec<u32> = list[1..]
                .iter()
                .map(|e| e.as_ref().unwrap().token)
                .collect();
            assert_eq!(tokens, output.prompt_token_ids[1..]);
        }
    }
}
