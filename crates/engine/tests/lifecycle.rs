//! How requests live and die in the blocking engine, on a fake model.

mod common;

use common::*;
use engine::{FinishReason, RequestError};
use sampler::SamplingParams;

#[test]
fn a_sequence_whose_logits_break_fails_alone() {
    for overlap in [false, true] {
        let setup = Setup {
            overlap,
            ..Setup::default()
        };
        let mut engine = setup.engine();
        // '!' follows ' ', and no token follows '!'.
        let outputs = engine.generate(vec![
            request(" ", greedy(9)),
            request("abc", greedy(9)),
            request("wow!", greedy(9)),
        ]);
        for broken in [0, 2] {
            let error = outputs[broken].as_ref().unwrap_err();
            assert!(error.to_string().contains("not finite"), "{error}");
            assert!(!error.is_client_error());
        }
        assert_eq!(outputs[1].as_ref().unwrap().outputs[0].text, "defghijkl");
        assert_empty(&engine);
    }
}

#[test]
fn without_memory_for_a_step_smaller_ones_come_to_the_same_tokens() {
    for overlap in [false, true] {
        let setup = Setup {
            mode: Mode::Hash,
            overlap,
            ..Setup::default()
        };
        let requests = || {
            let prompts = ["a common beginning, a", "a common beginning, b", "c"];
            let params = SamplingParams {
                n: 2,
                seed: Some(3),
                max_tokens: Some(12),
                ..SamplingParams::default()
            };
            let request = |prompt: &&str| request(*prompt, params.clone());
            prompts.iter().map(request).collect::<Vec<_>>()
        };
        let tokens = |memory_for: usize| {
            let mut runner = setup.runner();
            runner.memory_for = memory_for;
            let mut engine = engine::Engine::new(setup.core_with(runner), setup.frontend());
            let outputs = engine.generate(requests());
            let preemptions = engine.stats().totals.preemptions;
            assert_empty(&engine);
            let tokens = |output: Result<engine::RequestOutput, RequestError>| {
                let output = output.map_err(|error| error.to_string())?;
                Ok::<_, String>(output.outputs.into_iter().map(|o| o.token_ids).collect())
            };
            let tokens: Vec<Result<Vec<Vec<u32>>, String>> =
                outputs.into_iter().map(tokens).collect();
            (tokens, preemptions)
        };
        let (expected, none) = tokens(usize::MAX);
        assert_eq!(none, 0);
        for memory_for in [1, 2, 3, 7, 20] {
            let (got, preemptions) = tokens(memory_for);
            assert_eq!(got, expected, "memory for {memory_for} tokens a step");
            assert!(preemptions > 0);
        }
        // Where not even a token finds memory, each request gets its error, and the engine lives.
        let (got, _) = tokens(0);
        for request in got {
            let error = request.unwrap_err();
            assert!(error.contains("out of memory"), "{error}");
        }
    }
}

#[test]
fn cached_prefixes_show_in_metrics_and_salts_keep_them_apart() {
    let mut engine = Setup::default().engine();
    let prompt = "a shared beginning, sixteen and more";
    let run = |engine: &mut engine::Engine<FakeRunner>, salt: Option<&str>| {
        let mut request = request(prompt, greedy(1));
        request.cache_salt = salt.map(str::to_string);
        engine
            .generate(vec![request])
            .remove(0)
            .unwrap()
            .metrics
            .num_cached_tokens
    };
    assert_eq!(run(&mut engine, None), 0);
    assert_eq!(run(&mut engine, None), 32);
    assert_eq!(run(&mut engine, Some("tenant")), 0);
    assert_eq!(run(&mut engine, Some("tenant")), 32);
}

#[test]
fn abort_at_every_state_ends_the_request_and_frees_its_blocks() {
    for overlap in [false, true] {
        for after in 0..12 {
            let setup = Setup {
                overlap,
                max_num_batched_tokens: 8,
                max_num_seqs: 2,
                ..Setup::default()
            };
            let mut engine = setup.engine();
            let params = SamplingParams {
                n: 2,
                max_tokens: Some(5),
                ..SamplingParams::default()
            };
            let doomed = engine
                .add_request(request("a prompt of several chunks", params))
                .unwrap();
            let other = engine.add_request(request("abc", greedy(4))).unwrap();
            let mut outputs = std::collections::HashMap::new();
            for step in 0.. {
                if step == after {
                    engine.abort(doomed);
                }
                outputs.extend(engine.step().finished);
                if !engine.has_work() && step >= after {
                    break;
                }
                assert!(step < 200, "the engine hangs");
            }
            let aborted = outputs[&doomed].as_ref().unwrap();
            for seq in &aborted.outputs {
                let reason = seq.finish_reason().unwrap();
                assert!(matches!(reason, FinishReason::Abort | FinishReason::Length));
            }
            assert_eq!(outputs[&other].as_ref().unwrap().outputs[0].text, "defg");
            assert_empty(&engine);
            assert!(!engine.abort(doomed), "nothing is left to abort");
        }
    }
}

#[test]
fn a_lost_device_ends_every_request_and_the_engine() {
    for overlap in [false, true] {
        let setup = Setup {
            overlap,
            ..Setup::default()
        };
        let mut runner = setup.runner();
        runner.fail_at = Some(3);
        let mut engine = engine::Engine::new(setup.core_with(runner), setup.frontend());
        let requests = vec![
            request("abc", greedy(2)),
            request("abc", greedy(50)),
            request("xyz", greedy(50)),
        ];
        let outputs = engine.generate(requests);
        assert_eq!(outputs[0].as_ref().unwrap().outputs[0].text, "de");
        for output in &outputs[1..] {
            let error = output.as_ref().unwrap_err();
            assert_eq!(
                error.to_string(),
                "the engine has stopped: the device is lost in step 3"
            );
        }
        let late = engine.generate(vec![request("abc", greedy(1))]);
        assert!(matches!(late[0], Err(RequestError::EngineDead(_))));
        assert!(!engine.has_work());
    }
}

#[test]
fn without_a_tokenizer_token_ids_still_work() {
    let setup = Setup::default();
    let mut engine = engine::Engine::new(setup.core(), setup.frontend_with(None, None));
    let outputs = engine.generate(vec![
        request(vec![1, 2, 3], greedy(3)),
        request("text", greedy(3)),
        request(
            vec![1],
            SamplingParams {
                stop: vec!["x".to_string()],
                ..greedy(3)
            },
        ),
        request(
            vec![1],
            SamplingParams {
                bad_words: vec!["x".to_string()],
                ..greedy(3)
            },
        ),
    ]);
    let output = &outputs[0].as_ref().unwrap().outputs[0];
    assert_eq!(
        (output.token_ids.as_slice(), output.text.as_str()),
        (&[4, 5, 6][..], "")
    );
    let params = ["prompt", "stop", "bad_words"];
    for (output, param) in outputs[1..].iter().zip(params) {
        assert_eq!(output.as_ref().unwrap_err().param(), Some(param));
    }
}

#[test]
fn step_reports_tell_who_computes_what_and_who_takes_whose_place() {
    let setup = Setup {
        max_num_seqs: 1,
        max_num_batched_tokens: 8,
        ..Setup::default()
    };
    let mut engine = setup.engine();
    engine.trace();
    let first = engine
        .add_request(request("twelve chars", greedy(2)))
        .unwrap();
    let second = engine.add_request(request("ab", greedy(1))).unwrap();
    let mut reports = Vec::new();
    while engine.has_work() {
        reports.push(engine.step().report.unwrap());
    }
    let rows: Vec<_> = reports
        .iter()
        .flat_map(|report| &report.rows)
        .map(|row| (row.seq.request, row.start, row.len, row.decode))
        .collect();
    let expected = [
        (first, 0, 8, false),
        (first, 8, 4, false),
        (first, 12, 1, true),
        (second, 0, 2, false),
    ];
    assert_eq!(rows, expected);
    let admitted: Vec<_> = reports
        .iter()
        .flat_map(|report| &report.admitted)
        .map(|entry| (entry.seq.request, entry.replaces.map(|seq| seq.request)))
        .collect();
    assert_eq!(admitted, [(first, None), (second, Some(first))]);
    let finished: Vec<_> = reports
        .iter()
        .flat_map(|report| &report.finished)
        .map(|(seq, _)| seq.request)
        .collect();
    assert_eq!(finished, [first, second]);
}
