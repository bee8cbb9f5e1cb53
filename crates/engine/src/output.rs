//! What a user gets.

use std::time::Duration;

use sampler::TokenLogprobs;

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-sequence token, a stop token or a stop string.
    Stop,
    /// `max_tokens`, the model's context length, or the size of the KV cache.
    Length,
    /// The request was aborted.
    Abort,
    /// This sequence could not go on.
    Error,
}

impl FinishReason {
    /// The word that OpenAI's and vLLM's interfaces use.
    pub fn as_str(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Abort => "abort",
            FinishReason::Error => "error",
        }
    }
}

/// What exactly stopped a sequence; nothing for the model's own end-of-sequence token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// One of the stop strings.
    Text(String),
    /// One of the stop tokens.
    Token(u32),
}

/// How a sequence ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finish {
    /// Why.
    pub reason: FinishReason,
    /// What stopped it.
    pub stop_reason: Option<StopReason>,
    /// What went wrong, if the reason is [`FinishReason::Error`].
    pub error: Option<String>,
}

/// One sequence's news: what a stream yields.
#[derive(Clone, Debug, PartialEq)]
pub struct OutputDelta {
    /// Which of the request's `n` sequences.
    pub index: u32,
    /// Text that became final. It may lag behind `token_ids`: an incomplete character and what
    /// may be the beginning of a stop string are held back.
    pub text: String,
    /// New tokens.
    pub token_ids: Vec<u32>,
    /// Log-probabilities of the new tokens, if asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// Set in the sequence's last delta.
    pub finish: Option<Finish>,
}

/// One of a request's sequences, whole.
#[derive(Clone, Debug, PartialEq)]
pub struct CompletionOutput {
    /// Which of the request's `n` sequences.
    pub index: u32,
    /// The text; empty without a tokenizer.
    pub text: String,
    /// The tokens, up to and including the one that stopped the sequence.
    pub token_ids: Vec<u32>,
    /// Log-probabilities, one entry a token, if asked for.
    pub logprobs: Option<Vec<TokenLogprobs>>,
    /// How it ended; `None` while it goes on.
    pub finish: Option<Finish>,
}

impl CompletionOutput {
    /// Why it ended; `None` while it goes on.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.finish.as_ref().map(|finish| finish.reason)
    }
}

/// Times and counts of one request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestMetrics {
    /// From arrival until the first step that computed something for it.
    pub queue_time: Option<Duration>,
    /// From arrival to the first token.
    pub time_to_first_token: Option<Duration>,
    /// From arrival to the last token.
    pub total_time: Option<Duration>,
    /// Prompt tokens whose keys and values came from the prefix cache.
    pub num_cached_tokens: u32,
    /// How often its sequences were preempted.
    pub num_preemptions: u32,
}

/// A request's outcome.
#[derive(Clone, Debug, PartialEq)]
pub struct RequestOutput {
    /// The caller's name for the request.
    pub id: String,
    /// The prompt as the model saw it.
    pub prompt_token_ids: Vec<u32>,
    /// Log-probabilities of the prompt's tokens, if asked for. The first has none.
    pub prompt_logprobs: Option<Vec<Option<TokenLogprobs>>>,
    /// The sequences, by index.
    pub outputs: Vec<CompletionOutput>,
    /// Times and counts.
    pub metrics: RequestMetrics,
}
