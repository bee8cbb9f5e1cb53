//! Every range of `SamplingParams`, from both sides.

use sampler::SamplingParams;

/// Applies `change` to the defaults (with an unlimited `max_tokens`).
fn with(change: impl FnOnce(&mut SamplingParams)) -> SamplingParams {
    let mut params = SamplingParams {
        max_tokens: None,
        ..Default::default()
    };
    change(&mut params);
    params
}

/// A refused parameter set: name, value that the message must show, and the set.
type Refused = (&'static str, &'static str, SamplingParams);

#[test]
fn refused_without_a_model() {
    let table: Vec<Refused> = vec![
        ("n", "0", with(|p| p.n = 0)),
        ("n", "16385", with(|p| p.n = 16385)),
        ("n", "2", with(|p| (p.n, p.temperature) = (2, 0.0))),
        ("temperature", "-1", with(|p| p.temperature = -1.0)),
        ("temperature", "2.01", with(|p| p.temperature = 2.01)),
        ("temperature", "NaN", with(|p| p.temperature = f32::NAN)),
        (
            "temperature",
            "inf",
            with(|p| p.temperature = f32::INFINITY),
        ),
        ("top_k", "-2", with(|p| p.top_k = -2)),
        ("top_p", "0", with(|p| p.top_p = 0.0)),
        ("top_p", "1.5", with(|p| p.top_p = 1.5)),
        ("top_p", "NaN", with(|p| p.top_p = f32::NAN)),
        ("min_p", "-0.1", with(|p| p.min_p = -0.1)),
        ("min_p", "1.1", with(|p| p.min_p = 1.1)),
        ("min_p", "NaN", with(|p| p.min_p = f32::NAN)),
        (
            "repetition_penalty",
            "0",
            with(|p| p.repetition_penalty = 0.0),
        ),
        (
            "repetition_penalty",
            "inf",
            with(|p| p.repetition_penalty = f32::INFINITY),
        ),
        (
            "repetition_penalty",
            "NaN",
            with(|p| p.repetition_penalty = f32::NAN),
        ),
        (
            "presence_penalty",
            "2.5",
            with(|p| p.presence_penalty = 2.5),
        ),
        (
            "presence_penalty",
            "NaN",
            with(|p| p.presence_penalty = f32::NAN),
        ),
        (
            "frequency_penalty",
            "-2.5",
            with(|p| p.frequency_penalty = -2.5),
        ),
        (
            "logit_bias",
            "NaN for token 3",
            with(|p| p.logit_bias = [(3, f32::NAN)].into()),
        ),
        (
            "allowed_token_ids",
            "[]",
            with(|p| p.allowed_token_ids = Some(vec![])),
        ),
        (
            "bad_words",
            "blank",
            with(|p| p.bad_words = vec!["a".into(), " ".into()]),
        ),
        (
            "bad_words_token_ids",
            "[]",
            with(|p| p.bad_words_token_ids = vec![vec![1], vec![]]),
        ),
        ("max_tokens", "0", with(|p| p.max_tokens = Some(0))),
        (
            "min_tokens",
            "9",
            with(|p| (p.min_tokens, p.max_tokens) = (9, Some(8))),
        ),
        (
            "stop",
            "\"\"",
            with(|p| p.stop = vec!["x".into(), String::new()]),
        ),
        ("logprobs", "-2", with(|p| p.logprobs = Some(-2))),
        (
            "prompt_logprobs",
            "-2",
            with(|p| p.prompt_logprobs = Some(-2)),
        ),
    ];
    for (name, value, params) in table {
        let error = params.validate().expect_err(name);
        assert_eq!(error.param(), name);
        let message = error.to_string();
        assert!(
            message.starts_with(&format!("{name} must be ")),
            "{message}"
        );
        assert!(message.contains(value), "{message} does not show {value}");
        assert_eq!(params.validate_for(100, 20).expect_err(name), error);
    }
}

#[test]
fn refused_for_a_model() {
    let table: Vec<Refused> = vec![
        (
            "logit_bias",
            "100",
            with(|p| p.logit_bias = [(1, 1.0), (100, 1.0)].into()),
        ),
        (
            "allowed_token_ids",
            "100",
            with(|p| p.allowed_token_ids = Some(vec![100, 1])),
        ),
        (
            "bad_token_ids",
            "100",
            with(|p| p.bad_token_ids = vec![100]),
        ),
        (
            "bad_words_token_ids",
            "100",
            with(|p| p.bad_words_token_ids = vec![vec![100, 2]]),
        ),
        (
            "stop_token_ids",
            "100",
            with(|p| p.stop_token_ids = vec![100]),
        ),
        ("logprobs", "21", with(|p| p.logprobs = Some(21))),
        ("logprobs", "-1", with(|p| p.logprobs = Some(-1))),
        (
            "prompt_logprobs",
            "21",
            with(|p| p.prompt_logprobs = Some(21)),
        ),
    ];
    for (name, value, params) in table {
        params.validate().expect("in range without a model");
        let error = params.validate_for(100, 20).expect_err(name);
        assert_eq!(error.param(), name);
        assert!(error.value().contains(value), "{error}");
    }
}

#[test]
fn accepted() {
    let table = vec![
        SamplingParams::default(),
        SamplingParams::greedy(),
        with(|p| p.temperature = 2.0),
        with(|p| p.temperature = 1e-9),
        with(|p| p.n = 16384),
        with(|p| p.top_k = -1),
        with(|p| p.top_k = i32::MAX),
        with(|p| p.top_p = f32::MIN_POSITIVE),
        with(|p| p.min_p = 1.0),
        with(|p| p.repetition_penalty = 0.1),
        with(|p| (p.presence_penalty, p.frequency_penalty) = (-2.0, 2.0)),
        with(|p| p.logit_bias = [(99, 1e6)].into()),
        with(|p| p.allowed_token_ids = Some(vec![0, 99])),
        with(|p| p.min_tokens = 1000),
        with(|p| (p.min_tokens, p.max_tokens) = (8, Some(8))),
        with(|p| (p.logprobs, p.prompt_logprobs) = (Some(20), Some(0))),
    ];
    for params in table {
        assert_eq!(params.validate_for(100, 20), Ok(()), "{params:?}");
    }
    assert_eq!(
        with(|p| p.logprobs = Some(-1)).validate_for(100, -1),
        Ok(())
    );
    assert_eq!(
        with(|p| p.logprobs = Some(-1)).validate_for(100, 100),
        Ok(())
    );
}

#[test]
fn temperature_that_is_used() {
    for (given, used) in [
        (0.0, 0.0),
        (9e-6, 0.0),
        (1.1e-5, 0.01),
        (0.005, 0.01),
        (0.01, 0.01),
        (0.7, 0.7),
    ] {
        assert_eq!(
            with(|p| p.temperature = given).effective_temperature(),
            used,
            "{given}"
        );
    }
}

#[test]
fn json_round_trip_and_defaults() {
    let text = r#"{"temperature": 0.5, "logit_bias": {"7": -3.5}, "seed": 18446744073709551615}"#;
    let params: SamplingParams = serde_json::from_str(text).unwrap();
    let expected = SamplingParams {
        temperature: 0.5,
        logit_bias: [(7, -3.5)].into(),
        seed: Some(u64::MAX),
        ..Default::default()
    };
    assert_eq!(params, expected);
    let again = serde_json::from_str(&serde_json::to_string(&params).unwrap()).unwrap();
    assert_eq!(params, again);
}
