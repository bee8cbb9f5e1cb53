//! What sampling must remember of a sequence: kept per token, never recounted.

use std::collections::HashMap;
use std::sync::Arc;

use crate::error::AdmitError;
use crate::noise::Noise;
use crate::params::{MAX_LOGIT_BIAS, SamplingParams};

/// A token that penalties apply to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub token: u32,
    /// Occurrences in the output; 0 for a token of the prompt only.
    pub in_output: u32,
}

/// Distinct tokens of a sequence with their counts; a list, so that applying penalties is one
/// linear pass, and an index into it.
#[derive(Clone, Debug, Default)]
struct TokenCounts {
    seen: Vec<Seen>,
    index: HashMap<u32, usize>,
}

impl TokenCounts {
    fn add(&mut self, token: u32, in_output: u32) {
        let next = self.seen.len();
        let at = *self.index.entry(token).or_insert(next);
        if at == next {
            self.seen.push(Seen {
                token,
                in_output: 0,
            });
        }
        self.seen[at].in_output += in_output;
    }
}

/// Whether a sequence can be sampled at all; see [`SeqState::new`].
pub(crate) fn check_sequence(
    params: &SamplingParams,
    tokens: &[u32],
    num_prompt: usize,
    stop_ids: &[u32],
    vocab_size: usize,
) -> Result<(), AdmitError> {
    params.validate_for(vocab_size, -1)?;
    if num_prompt > tokens.len() {
        return Err(AdmitError::PromptLength {
            num_prompt,
            num_tokens: tokens.len(),
        });
    }
    if let Some(&token) = tokens
        .iter()
        .chain(stop_ids)
        .find(|&&t| t as usize >= vocab_size)
    {
        return Err(AdmitError::TokenOutOfRange { token, vocab_size });
    }
    Ok(())
}

/// Sampling state of one sequence.
#[derive(Clone, Debug)]
pub struct SeqState {
    params: Arc<SamplingParams>,
    seed: u64,
    num_prompt: usize,
    num_tokens: usize,
    /// Of `num_tokens`, how many are sampled but not known here yet (they are on the device).
    in_flight: usize,
    /// Present only with penalties.
    counts: Option<TokenCounts>,
    /// The last tokens of the output, as many as bad words need.
    tail: Vec<u32>,
    tail_len: usize,
    /// Tokens that are banned before `min_tokens`.
    stop_ids: Vec<u32>,
}

impl SeqState {
    /// The state of a sequence of `tokens`, of which the first `num_prompt` are the prompt.
    ///
    /// `stop_ids` are banned until `min_tokens` were generated, beside the parameters' own
    /// `stop_token_ids`: pass the model's end-of-sequence tokens.
    pub fn new(
        params: Arc<SamplingParams>,
        seed: u64,
        tokens: &[u32],
        num_prompt: usize,
        stop_ids: &[u32],
        vocab_size: usize,
    ) -> Result<Self, AdmitError> {
        check_sequence(&params, tokens, num_prompt, stop_ids, vocab_size)?;
        let (prompt, output) = tokens.split_at(num_prompt);
        let repetition = params.repetition_penalty != 1.0;
        let any = repetition || params.frequency_penalty != 0.0 || params.presence_penalty != 0.0;
        let mut counts = any.then(TokenCounts::default);
        if let (true, Some(counts)) = (repetition, &mut counts) {
            prompt.iter().for_each(|&token| counts.add(token, 0));
        }
        let longest = params.bad_words_token_ids.iter().map(Vec::len).max();
        let stop_ids = if params.min_tokens > 0 {
            stop_ids
                .iter()
                .chain(&params.stop_token_ids)
                .copied()
                .collect()
        } else {
            Vec::new()
        };
        let mut state = Self {
            seed,
            num_prompt,
            num_tokens: num_prompt,
            in_flight: 0,
            counts,
            tail: Vec::new(),
            tail_len: longest.unwrap_or(1) - 1,
            stop_ids,
            params,
        };
        output.iter().for_each(|&token| state.append(token));
        Ok(state)
    }

    /// Appends a generated token.
    pub fn append(&mut self, token: u32) {
        self.advance();
        self.record(Some(token));
    }

    /// The first half of [`SeqState::append`]: the token is sampled, but on a device.
    pub(crate) fn advance(&mut self) {
        self.num_tokens += 1;
        self.in_flight += 1;
    }

    /// The parameters.
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// The seed.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Number of tokens, which is the position of the next one.
    pub fn num_tokens(&self) -> usize {
        self.num_tokens
    }

    /// Number of generated tokens.
    pub fn num_output(&self) -> usize {
        self.num_tokens - self.num_prompt
    }

    /// The noise of the next token.
    pub fn noise(&self) -> Noise {
        Noise::new(self.seed, self.num_tokens as u32)
    }

    /// Whether logits change before temperature: else they can be used where they are.
    pub(crate) fn changes_logits(&self) -> bool {
        self.counts
            .as_ref()
            .is_some_and(|counts| !counts.seen.is_empty())
            || self.params.allowed_token_ids.is_some()
            || !self.params.logit_bias.is_empty()
            || self.banned().next().is_some()
    }

    /// Tokens that must not come next: bad tokens, ends of bad words, stops before `min_tokens`.
    pub(crate) fn banned(&self) -> impl Iterator<Item = u32> {
        let words = self.params.bad_words_token_ids.iter().filter_map(|word| {
            let (&last, before) = word.split_last()?;
            self.tail.ends_with(before).then_some(last)
        });
        let too_early = self.num_output() < self.params.min_tokens as usize;
        let stops = self.stop_ids.iter().copied().filter(move |_| too_early);
        self.params
            .bad_token_ids
            .iter()
            .copied()
            .chain(words)
            .chain(stops)
    }

    /// The logit bias, clamped.
    pub(crate) fn biases(&self) -> impl Iterator<Item = (u32, f32)> {
        let clamp = |bias: f32| bias.clamp(-MAX_LOGIT_BIAS, MAX_LOGIT_BIAS);
        self.params
            .logit_bias
            .iter()
            .map(move |(&token, &bias)| (token, clamp(bias)))
    }

    /// The tokens that penalties apply to, each once.
    pub(crate) fn seen(&self) -> &[Seen] {
        self.counts.as_ref().map_or(&[], |counts| &counts.seen)
    }

    /// Whether the next token depends on tokens that are in flight: not only on their number.
    #[cfg(feature = "torch")]
    pub(crate) fn awaits_tokens(&self) -> bool {
        self.in_flight > 0 && (self.counts.is_some() || self.tail_len > 0)
    }

    /// The second half of [`SeqState::append`]: the oldest token in flight, or none if it could
    /// not be sampled after all.
    pub(crate) fn record(&mut self, token: Option<u32>) {
        self.in_flight -= 1;
        let Some(token) = token else {
            self.num_tokens -= 1;
            return;
        };
        if let Some(counts) = &mut self.counts {
            counts.add(token, 1);
        }
        if self.tail_len > 0 {
            if self.tail.len() == self.tail_len {
                self.tail.remove(0);
            }
            self.tail.push(token);
        }
    }
}
