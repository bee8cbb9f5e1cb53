//! What a request may ask of the sampler.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Temperatures below this mean greedy decoding (vLLM's `_SAMPLING_EPS`).
pub const GREEDY_BELOW: f32 = 1e-5;
/// Temperatures above [`GREEDY_BELOW`] and below this are raised to it (vLLM's `_MAX_TEMP`):
/// dividing logits by less overflows half-precision types.
pub const MIN_TEMPERATURE: f32 = 0.01;
/// Entries of [`SamplingParams::logit_bias`] are clamped to `-MAX_LOGIT_BIAS..=MAX_LOGIT_BIAS`.
pub const MAX_LOGIT_BIAS: f32 = 100.0;
/// Most sequences that one request may ask for (vLLM's `VLLM_MAX_N_SEQUENCES`).
pub const MAX_N: u32 = 16384;

/// Sampling parameters of one request. Names, defaults and ranges are those of vLLM's
/// `SamplingParams`; [`SamplingParams::validate`] checks the ranges.
///
/// ```
/// use sampler::SamplingParams;
///
/// let params = SamplingParams { temperature: 0.7, top_p: 0.9, seed: Some(1), ..Default::default() };
/// params.validate().unwrap();
/// let wrong = SamplingParams { top_p: 0.0, ..params };
/// let error = wrong.validate().unwrap_err();
/// assert_eq!(error.param(), "top_p");
/// assert_eq!(error.to_string(), "top_p must be greater than 0 and at most 1, got 0");
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SamplingParams {
    /// How many sequences to generate, `1..=16384`; 1 when greedy.
    pub n: u32,
    /// Logits are divided by this, `0..=2`. Below 1e-5 means greedy; else below 0.01 is raised
    /// to 0.01 (see [`SamplingParams::effective_temperature`]).
    pub temperature: f32,
    /// Keep the `top_k` most likely tokens; 0 or -1 keeps all.
    pub top_k: i32,
    /// Keep the smallest set of most likely tokens whose probability reaches this, `0 < p <= 1`.
    pub top_p: f32,
    /// Keep tokens at least this fraction as likely as the most likely one, `0..=1`.
    pub min_p: f32,
    /// Above 1 discourages tokens that are in the prompt or the output; must be positive.
    pub repetition_penalty: f32,
    /// Subtracted from the logit of each token that is in the output, `-2..=2`.
    pub presence_penalty: f32,
    /// Subtracted from a token's logit once per occurrence in the output, `-2..=2`.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens, clamped to ±100.
    pub logit_bias: BTreeMap<u32, f32>,
    /// If set, only these tokens can be sampled. Must not be empty.
    pub allowed_token_ids: Option<Vec<u32>>,
    /// Tokens that are never sampled.
    pub bad_token_ids: Vec<u32>,
    /// Texts that must not be generated. Whoever owns the tokenizer turns them into
    /// [`SamplingParams::bad_words_token_ids`]; the sampler itself reads only those.
    pub bad_words: Vec<String>,
    /// Token sequences that must not be generated: the last token of a sequence is banned
    /// whenever the output ends with the tokens before it.
    pub bad_words_token_ids: Vec<Vec<u32>>,
    /// No end-of-sequence and no stop token before this many tokens were generated.
    pub min_tokens: u32,
    /// Generate at most this many tokens (at least 1); `None` means up to the model's length.
    pub max_tokens: Option<u32>,
    /// Texts that end the generation. Checked where text exists, not by the sampler.
    pub stop: Vec<String>,
    /// Tokens that end the generation.
    pub stop_token_ids: Vec<u32>,
    /// Go on after the end-of-sequence token.
    pub ignore_eos: bool,
    /// Whether the stop string is part of the returned text.
    pub include_stop_str_in_output: bool,
    /// Seed of this request's noise; without one the engine chooses.
    pub seed: Option<u64>,
    /// How many most likely tokens' log-probabilities to return beside the sampled token's
    /// (0: the sampled token's only; -1: the whole vocabulary).
    pub logprobs: Option<i32>,
    /// As `logprobs`, for the tokens of the prompt.
    pub prompt_logprobs: Option<i32>,
    /// Leave special tokens out of the returned text.
    pub skip_special_tokens: bool,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            n: 1,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: BTreeMap::new(),
            allowed_token_ids: None,
            bad_token_ids: Vec::new(),
            bad_words: Vec::new(),
            bad_words_token_ids: Vec::new(),
            min_tokens: 0,
            max_tokens: Some(16),
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            include_stop_str_in_output: false,
            seed: None,
            logprobs: None,
            prompt_logprobs: None,
            skip_special_tokens: true,
        }
    }
}

/// A sampling parameter out of its range. Reads "`param` must be `expected`, got `value`".
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{param} must be {expected}, got {value}")]
pub struct ParamError {
    param: &'static str,
    value: String,
    expected: String,
}

impl ParamError {
    /// Name of the parameter, as in [`SamplingParams`] and in the HTTP API.
    pub fn param(&self) -> &'static str {
        self.param
    }

    /// The value that was refused.
    pub fn value(&self) -> &str {
        &self.value
    }

    /// What the parameter must be.
    pub fn expected(&self) -> &str {
        &self.expected
    }
}

/// `Ok` if `ok`, else the error that names the parameter, its range and the value.
fn require(
    ok: bool,
    param: &'static str,
    expected: &str,
    value: impl std::fmt::Display,
) -> Result<(), ParamError> {
    if ok {
        return Ok(());
    }
    Err(ParamError {
        param,
        value: value.to_string(),
        expected: expected.to_owned(),
    })
}

impl SamplingParams {
    /// Greedy decoding with everything else at its default.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            ..Self::default()
        }
    }

    /// Whether the most likely token is taken instead of a random one.
    pub fn is_greedy(&self) -> bool {
        self.temperature < GREEDY_BELOW
    }

    /// The temperature that is used: 0 when greedy, else at least [`MIN_TEMPERATURE`].
    pub fn effective_temperature(&self) -> f32 {
        if self.is_greedy() {
            0.0
        } else {
            self.temperature.max(MIN_TEMPERATURE)
        }
    }

    /// Checks all that can be checked without knowing the model.
    pub fn validate(&self) -> Result<(), ParamError> {
        let n = self.n;
        require((1..=MAX_N).contains(&n), "n", "between 1 and 16384", n)?;
        // A range contains no NaN, so NaN and infinities are refused by every line below.
        let t = self.temperature;
        require(
            (0.0..=2.0).contains(&t),
            "temperature",
            "a number between 0 and 2",
            t,
        )?;
        require(
            n == 1 || !self.is_greedy(),
            "n",
            "1 when temperature is 0 (greedy)",
            n,
        )?;
        require(
            self.top_k >= -1,
            "top_k",
            "at least -1 (0 or -1 keeps all tokens)",
            self.top_k,
        )?;
        let p = self.top_p;
        require(
            p > 0.0 && p <= 1.0,
            "top_p",
            "greater than 0 and at most 1",
            p,
        )?;
        let p = self.min_p;
        require((0.0..=1.0).contains(&p), "min_p", "between 0 and 1", p)?;
        let r = self.repetition_penalty;
        let positive = "a finite number greater than 0";
        require(r > 0.0 && r.is_finite(), "repetition_penalty", positive, r)?;
        for (name, penalty) in [
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        ] {
            require(
                (-2.0..=2.0).contains(&penalty),
                name,
                "between -2 and 2",
                penalty,
            )?;
        }
        for (token, bias) in &self.logit_bias {
            let value = format_args!("{bias} for token {token}");
            require(
                bias.is_finite(),
                "logit_bias",
                "finite for every token",
                value,
            )?;
        }
        let empty = self.allowed_token_ids.as_ref().is_some_and(Vec::is_empty);
        require(
            !empty,
            "allowed_token_ids",
            "absent or name at least one token",
            "[]",
        )?;
        let blank = self.bad_words.iter().any(|word| word.trim().is_empty());
        require(
            !blank,
            "bad_words",
            "texts that are not blank",
            "a blank text",
        )?;
        let empty = self.bad_words_token_ids.iter().any(Vec::is_empty);
        require(
            !empty,
            "bad_words_token_ids",
            "sequences of at least one token",
            "[]",
        )?;
        if let Some(max) = self.max_tokens {
            require(max >= 1, "max_tokens", "at least 1", max)?;
            let expected = format!("at most max_tokens ({max})");
            require(
                self.min_tokens <= max,
                "min_tokens",
                &expected,
                self.min_tokens,
            )?;
        }
        let empty = self.stop.iter().any(String::is_empty);
        require(!empty, "stop", "strings that are not empty", "\"\"")?;
        for (name, count) in [
            ("logprobs", self.logprobs),
            ("prompt_logprobs", self.prompt_logprobs),
        ] {
            let count = count.unwrap_or(0);
            require(
                count >= -1,
                name,
                "at least -1 (the whole vocabulary)",
                count,
            )?;
        }
        Ok(())
    }

    /// [`SamplingParams::validate`], and that every token id is below `vocab_size` and no more
    /// than `max_logprobs` log-probabilities are asked for (-1: no limit).
    pub fn validate_for(&self, vocab_size: usize, max_logprobs: i32) -> Result<(), ParamError> {
        self.validate()?;
        let bad_words = self.bad_words_token_ids.iter().flatten();
        let lists: [(&'static str, Option<u32>); 5] = [
            ("logit_bias", self.logit_bias.keys().copied().max()),
            (
                "allowed_token_ids",
                self.allowed_token_ids.iter().flatten().copied().max(),
            ),
            ("bad_token_ids", self.bad_token_ids.iter().copied().max()),
            ("bad_words_token_ids", bad_words.copied().max()),
            ("stop_token_ids", self.stop_token_ids.iter().copied().max()),
        ];
        let expected = format!("token ids below the vocabulary size ({vocab_size})");
        for (name, largest) in lists {
            let largest = largest.unwrap_or(0);
            require((largest as usize) < vocab_size, name, &expected, largest)?;
        }
        if max_logprobs >= 0 {
            for (name, count) in [
                ("logprobs", self.logprobs),
                ("prompt_logprobs", self.prompt_logprobs),
            ] {
                let count = count.unwrap_or(0);
                let entries = usize::try_from(count).unwrap_or(vocab_size);
                let expected = format!("at most {max_logprobs} (-1 means all {vocab_size})");
                require(entries <= max_logprobs as usize, name, &expected, count)?;
            }
        }
        Ok(())
    }
}
