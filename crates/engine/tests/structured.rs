//! Constrained sequences on a model that chooses at random among the tokens it may say: what ends by
//! itself is what was asked for, whatever else goes on.

mod common;
mod constraints;

use std::sync::Arc;

use common::*;
use constraints::constraint;
use engine::{
    AsyncEngine, Constraint, FinishReason, GenerateRequest, RequestError, RequestOutput,
    SamplingParams, StructuredOutputs,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;

fn setups() -> Vec<Setup> {
    let base = Setup {
        mode: Mode::Hash,
        max_model_len: 500,
        blocks: 600,
        ..Setup::default()
    };
    vec![
        base.clone(),
        Setup {
            overlap: true,
            ..base.clone()
        },
        // Prompts in chunks, and far too few blocks: sequences are preempted all the time.
        Setup {
            overlap: true,
            max_num_batched_tokens: 9,
            blocks: 125,
            ..base.clone()
        },
        Setup {
            max_num_batched_tokens: 8,
            blocks: 125,
            ..base
        },
    ]
}

fn random_params(rng: &mut StdRng) -> SamplingParams {
    SamplingParams {
        n: rng.random_range(1..4),
        seed: Some(rng.random()),
        max_tokens: Some(rng.random_range(100..400)),
        min_tokens: rng.random_range(0..6),
        ignore_eos: rng.random_bool(0.2),
        logprobs: rng.random::<bool>().then_some(0),
        ..SamplingParams::default()
    }
}

#[test]
fn what_ends_is_what_was_asked_for() {
    let mut rng = StdRng::seed_from_u64(3);
    let (mut ended, mut cut) = (0, 0);
    for setup in setups() {
        for _ in 0..25 {
            let mut requests = Vec::new();
            let mut checks = Vec::new();
            for _ in 0..6 {
                let (structured, check) = constraint(&mut rng);
                let prompt = "p".repeat(rng.random_range(1..40));
                let params = random_params(&mut rng);
                let mut request = request(prompt, params);
                // Some are free: what they say must not depend on the others.
                let free = rng.random_bool(0.3);
                if !free {
                    request.structured = Some(structured);
                }
                requests.push(request);
                checks.push((!free).then_some(check));
            }
            let mut engine = setup.engine();
            let outputs = engine.generate(requests.clone());
            assert_empty(&engine);
            for ((request, check), output) in requests.iter().zip(checks).zip(outputs) {
                let output = output.unwrap();
                let Some(check) = check else {
                    let alone = setup.engine().generate(vec![request.clone()]).remove(0);
                    assert_eq!(texts(&alone.unwrap()), texts(&output));
                    continue;
                };
                for sequence in &output.outputs {
                    let finish = sequence.finish.as_ref().unwrap();
                    match finish.reason {
                        FinishReason::Stop => {
                            let asked = &request.structured;
                            assert!(check(&sequence.text), "{:?} for {asked:?}", sequence.text);
                            assert_eq!(finish.stop_reason, None);
                            ended += 1;
                        }
                        FinishReason::Length => cut += 1,
                        _ => panic!("{finish:?}"),
                    }
                    let entries = sequence.logprobs.as_ref().map(Vec::len);
                    let expected = request.params.logprobs.map(|_| sequence.token_ids.len());
                    assert_eq!(entries, expected);
                }
            }
        }
    }
    assert!(ended > 4 * cut, "{ended} ended, {cut} did not");
}

fn texts(output: &RequestOutput) -> Vec<&str> {
    output.outputs.iter().map(|o| o.text.as_str()).collect()
}

#[test]
fn what_a_sequence_says_depends_on_nothing_else() {
    let mut rng = StdRng::seed_from_u64(4);
    let setups = setups();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    for _ in 0..10 {
        let requests: Vec<GenerateRequest> = (0..5)
            .map(|_| {
                let params = random_params(&mut rng);
                let mut request = request("some prompt", params);
                request.structured = Some(constraint(&mut rng).0);
                request
            })
            .collect();
        let mut expected: Option<Vec<String>> = None;
        for setup in &setups {
            let outputs = setup.engine().generate(requests.clone());
            let outputs: Vec<String> = outputs
                .iter()
                .flat_map(|output| texts(output.as_ref().unwrap()))
                .map(str::to_owned)
                .collect();
            assert_eq!(*expected.get_or_insert_with(|| outputs.clone()), outputs);
        }
        // Streams add up to the same.
        let engine = AsyncEngine::start(setups[2].core(), setups[2].frontend()).unwrap();
        let streamed = runtime.block_on(async {
            let mut all = Vec::new();
            let streams: Vec<_> = requests
                .iter()
                .map(|request| engine.generate(request.clone()).unwrap())
                .collect();
            for mut stream in streams {
                let mut texts = vec![String::new(); stream.output().outputs.len()];
                while let Some(delta) = stream.next().await {
                    let delta = delta.unwrap();
                    texts[delta.index as usize].push_str(&delta.text);
                }
                all.extend(texts);
            }
            all
        });
        assert_eq!(expected.unwrap(), streamed);
    }
}

fn run(
    structured: StructuredOutputs,
    params: SamplingParams,
) -> Result<RequestOutput, RequestError> {
    let setup = setups().remove(1);
    let mut request = request("x", params);
    request.structured = Some(structured);
    let mut engine = setup.engine();
    let output = engine.generate(vec![request]).remove(0);
    assert_empty(&engine);
    output
}

fn of_length(max_tokens: u32) -> SamplingParams {
    SamplingParams {
        seed: Some(1),
        max_tokens: Some(max_tokens),
        ..SamplingParams::default()
    }
}

#[test]
fn the_end_of_the_grammar_is_the_end() {
    // Nothing can follow: no end-of-sequence token is needed, whatever the parameters say of it.
    for (ignore_eos, min_tokens) in [(false, 0), (true, 0), (false, 50), (true, 50)] {
        let params = SamplingParams {
            ignore_eos,
            min_tokens,
            ..of_length(100)
        };
        let regex = Constraint::Regex("ab{3}c".to_owned());
        let output = run(StructuredOutputs::new(regex), params).unwrap();
        let sequence = &output.outputs[0];
        assert_eq!(sequence.text, "abbbc");
        assert_eq!(sequence.token_ids.len(), 5);
        assert_eq!(sequence.finish_reason(), Some(FinishReason::Stop));
    }
    // More can follow: only `max_tokens` ends it where the end of the sequence is ignored.
    let params = SamplingParams {
        ignore_eos: true,
        ..of_length(100)
    };
    let regex = Constraint::Regex("a*".to_owned());
    let output = run(StructuredOutputs::new(regex), params).unwrap();
    assert_eq!(output.outputs[0].text, "a".repeat(100));
    assert_eq!(
        output.outputs[0].finish_reason(),
        Some(FinishReason::Length)
    );
    // Nothing at all is a word of the grammar, too.
    let empty = Constraint::Regex(String::new());
    let output = run(StructuredOutputs::new(empty), of_length(9)).unwrap();
    assert_eq!(output.outputs[0].text, "");
    assert_eq!(output.outputs[0].finish_reason(), Some(FinishReason::Stop));
}

#[test]
fn stop_strings_end_it_earlier() {
    let params = SamplingParams {
        stop: vec!["bb".to_owned()],
        ..of_length(100)
    };
    let regex = Constraint::Regex("ab{3}c".to_owned());
    let output = run(StructuredOutputs::new(regex), params).unwrap();
    assert_eq!(output.outputs[0].text, "a");
}

#[test]
fn what_cannot_be_compiled_is_refused_with_the_reason() {
    let deep = (0..70).fold(json!({}), |inner, _| json!({"items": inner}));
    let wide: Vec<String> = (0..100_000).map(|n| n.to_string()).collect();
    for (constraint, cause) in [
        (Constraint::Json(json!({"type": "nonsense"})), "nonsense"),
        (
            Constraint::Json(json!({"$ref": "https://example.com/x"})),
            "example.com",
        ),
        (Constraint::Json(json!({"$ref": "#"})), "no text matches"),
        (Constraint::Json(json!([1])), "must be an object"),
        (Constraint::Json(json!(false)), "describes nothing"),
        (Constraint::Json(json!({"x-guidance": {}})), "x-guidance"),
        (
            Constraint::Json(json!({"type": "integer", "minimum": 5, "maximum": 1})),
            "nsatisfiable",
        ),
        (Constraint::Json(deep), "64 levels"),
        (Constraint::Regex("(".to_owned()), "("),
        (Constraint::Regex(r"(a)\1".to_owned()), "backreference"),
        (Constraint::Regex("a".repeat(30_000)), "16384"),
        (
            Constraint::Json(json!({"pattern": "a".repeat(30_000)})),
            "16384",
        ),
        (Constraint::Grammar("// \n".repeat(30_000)), "65536"),
        (
            // Deep, and twice as large with each line.
            Constraint::Grammar((0..3000).fold(String::from("start: A0\n"), |lark, at| {
                lark + &format!("A{at}: A{0} A{0}\n", at + 1)
            })),
            "written out",
        ),
        (Constraint::Choice(vec![]), "no choice"),
        (Constraint::Choice(wide), "262144"),
        (Constraint::Grammar("start: missing".to_owned()), "missing"),
        (Constraint::Grammar("  ".to_owned()), "empty"),
        (Constraint::Grammar("root ::= \"a\"".to_owned()), "Lark"),
    ] {
        let shown = format!("{constraint:?}")
            .chars()
            .take(60)
            .collect::<String>();
        let error = run(StructuredOutputs::new(constraint), of_length(9)).expect_err(&shown);
        assert_eq!(
            error.param(),
            Some("structured_outputs"),
            "{shown}: {error}"
        );
        assert!(error.is_client_error());
        let text = error.to_string();
        assert!(text.contains(cause), "{shown}: {text}");
        assert!(
            text.len() < 800 && !text.contains('\u{ff}'),
            "{shown}: {text}"
        );
    }
}

#[test]
fn what_cannot_go_on_fails_alone() {
    let setup = setups().remove(1);
    // The only token that the grammar allows is banned: that shows when it is sampled.
    let mut hopeless = request("x", of_length(9));
    hopeless.structured = Some(StructuredOutputs::new(Constraint::Regex("ab".to_owned())));
    let mut other = request("y", of_length(30));
    other.structured = Some(StructuredOutputs::new(Constraint::Regex(
        "z{20}".to_owned(),
    )));
    let mut engine = setup.engine();
    // A lexer that has to remember too much gives up in the middle.
    let exploding = r"(?:[ab]*a[ab]{40}c)".to_owned();
    hopeless.structured = Some(StructuredOutputs::new(Constraint::Regex(exploding)));
    hopeless.params.max_tokens = Some(400);
    let outputs = engine.generate(vec![hopeless, other]);
    assert_empty(&engine);
    let text = &outputs[1].as_ref().unwrap().outputs[0].text;
    assert_eq!(*text, "z".repeat(20));
    if let Err(error) = &outputs[0] {
        assert!(error.to_string().contains("structured output"), "{error}");
        assert!(!error.is_client_error());
    }
}

#[test]
fn it_needs_a_tokenizer_of_bytes() {
    let setup = setups().remove(0);
    let frontend = setup.frontend_with(None, None);
    let mut engine = engine::Engine::new(setup.core(), frontend);
    let mut ids = request(vec![1, 2], of_length(3));
    ids.structured = Some(StructuredOutputs::new(Constraint::JsonObject));
    let error = engine.generate(vec![ids]).remove(0).unwrap_err();
    assert_eq!(error.param(), Some("structured_outputs"));

    let mut words = byte_tokenizer_model();
    let decoder = tokenizers::decoders::wordpiece::WordPiece::default();
    words.with_decoder(Some(decoder));
    let words = engine::tokenizer::Tokenizer::new(words, Default::default()).unwrap();
    let frontend = setup.frontend_with(Some(Arc::new(words)), None);
    let mut engine = engine::Engine::new(setup.core(), frontend);
    let mut text = request("x", of_length(3));
    text.structured = Some(StructuredOutputs::new(Constraint::JsonObject));
    let error = engine.generate(vec![text]).remove(0).unwrap_err();
    assert!(error.to_string().contains("byte-level"), "{error}");
}

#[test]
fn special_tokens_come_where_a_grammar_names_them() {
    let lark = "start: \"a\" <eos>\n".to_owned();
    let structured = StructuredOutputs::new(Constraint::Grammar(lark));
    let output = run(structured, of_length(9)).unwrap();
    assert_eq!(output.outputs[0].token_ids, [u32::from(b'a'), EOS]);
}

/// What a model says before it has thought to the end is free.
#[test]
fn reasoning_comes_first() {
    let mut lark = StructuredOutputs::new(Constraint::Regex("[xyz]{5}".to_owned()));
    lark.after = Some("Z".to_owned());
    let setup = setups().remove(1);
    let mut engine = setup.engine();
    let mut requests = Vec::new();
    for prompt in ["ask", "ask Z \n"] {
        let params = SamplingParams {
            n: 3,
            ..of_length(480)
        };
        let mut request = request(prompt, params);
        request.structured = Some(lark.clone());
        requests.push(request);
    }
    let mut outputs = engine.generate(requests).into_iter();
    let answer = regex::Regex::new("^[xyz]{5}$").unwrap();
    let mut thought = 0;
    for sequence in outputs.next().unwrap().unwrap().outputs {
        // A random byte is the end of the thought once in 256 times.
        if sequence.finish_reason() == Some(FinishReason::Stop) {
            let ids: Vec<u8> = sequence.token_ids.iter().map(|t| *t as u8).collect();
            let at = ids.iter().position(|b| *b == b'Z').unwrap();
            let said = std::str::from_utf8(&ids[at + 1..]).unwrap();
            assert!(answer.is_match(said), "{said}");
            thought += 1;
        }
    }
    assert!(thought > 0);
    for sequence in outputs.next().unwrap().unwrap().outputs {
        assert!(answer.is_match(&sequence.text), "{}", sequence.text);
    }
    assert_empty(&engine);
}
