//! The sampling fields that `/v1/completions` and `/v1/chat/completions` share.

use std::collections::BTreeMap;

use sampler::SamplingParams;
use serde_json::{Value, json};

use super::{ApiError, Fields};

/// Most stop strings of a request (vLLM's `VLLM_MAX_STOP_STRINGS`).
const MAX_STOP_STRINGS: usize = 4;

/// Fields of vLLM that may only be null.
pub const NOT_SUPPORTED: &[&str] = &[
    "truncate_prompt_tokens",
    "truncation_side",
    "logprob_token_ids",
    "repetition_detection",
    "thinking_token_budget",
    "prompt_embeds",
    "kv_transfer_params",
    "vllm_xargs",
    "session_id",
    "stream_interval",
];

/// Reads the sampling fields. What the request leaves out comes from `defaults` (the model's
/// `generation_config.json` over the API's defaults). Ranges are checked by the engine.
pub fn take_sampling(
    f: &mut Fields,
    defaults: &SamplingParams,
) -> Result<SamplingParams, ApiError> {
    let mut p = defaults.clone();
    set(f, "n", "a positive integer", &mut p.n)?;
    set(f, "temperature", "a number", &mut p.temperature)?;
    set(f, "top_p", "a number", &mut p.top_p)?;
    set(f, "top_k", "an integer", &mut p.top_k)?;
    set(f, "min_p", "a number", &mut p.min_p)?;
    set(
        f,
        "repetition_penalty",
        "a number",
        &mut p.repetition_penalty,
    )?;
    set(f, "presence_penalty", "a number", &mut p.presence_penalty)?;
    set(f, "frequency_penalty", "a number", &mut p.frequency_penalty)?;
    set(
        f,
        "min_tokens",
        "an integer of at least 0",
        &mut p.min_tokens,
    )?;
    set(
        f,
        "stop_token_ids",
        "a list of token ids",
        &mut p.stop_token_ids,
    )?;
    set(f, "bad_words", "a list of strings", &mut p.bad_words)?;
    p.allowed_token_ids = f.take_as("allowed_token_ids", "a list of token ids")?;
    p.ignore_eos = f.take_bool("ignore_eos", p.ignore_eos)?;
    p.skip_special_tokens = f.take_bool("skip_special_tokens", p.skip_special_tokens)?;
    p.include_stop_str_in_output =
        f.take_bool("include_stop_str_in_output", p.include_stop_str_in_output)?;
    p.prompt_logprobs = f.take_as("prompt_logprobs", "an integer of at least -1")?;
    if let Some(seed) = f.take_as::<i64>("seed", "a 64-bit integer")? {
        // -1 means unset, as in vLLM; other negative seeds keep their bits.
        p.seed = (seed != -1).then_some(seed as u64);
    }
    if let Some(stop) = f.take("stop") {
        p.stop = take_stop(stop)?;
    }
    if let Some(bias) = f.take("logit_bias") {
        p.logit_bias = take_logit_bias(bias)?;
    }
    refuse_unsupported(f)?;
    Ok(p)
}

fn set<T: serde::de::DeserializeOwned>(
    f: &mut Fields,
    name: &str,
    expected: &str,
    into: &mut T,
) -> Result<(), ApiError> {
    if let Some(value) = f.take_as(name, expected)? {
        *into = value;
    }
    Ok(())
}

fn take_stop(value: Value) -> Result<Vec<String>, ApiError> {
    let stop = match value {
        Value::String(one) => vec![one],
        list => serde_json::from_value::<Vec<String>>(list).map_err(|_| {
            ApiError::bad_form("stop", "stop must be a string or a list of strings")
        })?,
    };
    if stop.len() > MAX_STOP_STRINGS {
        return Err(ApiError::bad_form(
            "stop",
            format!(
                "stop may hold at most {MAX_STOP_STRINGS} strings, got {}",
                stop.len()
            ),
        ));
    }
    Ok(stop)
}

fn take_logit_bias(value: Value) -> Result<BTreeMap<u32, f32>, ApiError> {
    let error = |what: String| ApiError::bad_form("logit_bias", what);
    let map: BTreeMap<String, f32> = serde_json::from_value(value)
        .map_err(|_| error("logit_bias must map token ids to numbers".into()))?;
    map.into_iter()
        .map(|(token, bias)| match token.parse() {
            Ok(id) => Ok((id, bias)),
            Err(_) => Err(error(format!(
                "logit_bias has the key '{token}', which is no token id"
            ))),
        })
        .collect()
}

/// Fields that vLLM knows and this engine does not support yet: refused by name unless their
/// value asks for nothing. OpenAI's bookkeeping fields are accepted and have no effect there
/// either.
fn refuse_unsupported(f: &mut Fields) -> Result<(), ApiError> {
    f.refuse_unless("use_beam_search", &[json!(false)], "; use n with sampling")?;
    f.refuse_unless("length_penalty", &[json!(1), json!(1.0)], "")?;
    f.refuse_unless("best_of", &[json!(1)], "; use n")?;
    f.refuse_unless("spaces_between_special_tokens", &[json!(true)], "")?;
    for name in NOT_SUPPORTED {
        f.refuse_unless(name, &[], "")?;
    }
    for bookkeeping in ["user", "metadata", "store", "service_tier"] {
        f.take(bookkeeping);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: Value) -> Result<SamplingParams, ApiError> {
        let mut f = Fields::new(body, "the body")?;
        let p = take_sampling(&mut f, &SamplingParams::default())?;
        f.finish()?;
        Ok(p)
    }

    #[test]
    fn reads_every_field() {
        let p = read(json!({
            "n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1,
            "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3,
            "min_tokens": 3, "stop_token_ids": [7], "bad_words": ["no"], "allowed_token_ids": [1, 2],
            "ignore_eos": true, "skip_special_tokens": false, "include_stop_str_in_output": true,
            "prompt_logprobs": 1, "seed": 9, "stop": "end", "logit_bias": {"5": -3.0},
            "use_beam_search": false, "user": "me", "best_of": null,
        }))
        .unwrap();
        let expected = SamplingParams {
            n: 2,
            temperature: 0.5,
            top_p: 0.9,
            top_k: 40,
            min_p: 0.1,
            repetition_penalty: 1.1,
            presence_penalty: 0.2,
            frequency_penalty: 0.3,
            min_tokens: 3,
            stop_token_ids: vec![7],
            bad_words: vec!["no".into()],
            allowed_token_ids: Some(vec![1, 2]),
            ignore_eos: true,
            skip_special_tokens: false,
            include_stop_str_in_output: true,
            prompt_logprobs: Some(1),
            seed: Some(9),
            stop: vec!["end".into()],
            logit_bias: BTreeMap::from([(5, -3.0)]),
            ..SamplingParams::default()
        };
        assert_eq!(p, expected);
    }

    #[test]
    fn refuses_by_name() {
        for (body, param) in [
            (json!({"temperature": "hot"}), "temperature"),
            (json!({"n": -1}), "n"),
            (json!({"use_beam_search": true}), "use_beam_search"),
            (json!({"session_id": "a"}), "session_id"),
            (json!({"stop": [1]}), "stop"),
            (json!({"stop": ["a", "b", "c", "d", "e"]}), "stop"),
            (json!({"logit_bias": {"x": 1}}), "logit_bias"),
            (json!({"temprature": 1}), "temprature"),
            (json!({"seed": 1.5}), "seed"),
        ] {
            let e = read(body.clone()).expect_err(&body.to_string());
            assert_eq!(e.param.as_deref(), Some(param), "{body}");
            assert!(e.message.contains(param), "{}", e.message);
        }
    }

    #[test]
    fn a_seed_of_minus_one_is_none() {
        assert_eq!(read(json!({"seed": -1})).unwrap().seed, None);
        assert_eq!(read(json!({"seed": -2})).unwrap().seed, Some(u64::MAX - 1));
    }
}
