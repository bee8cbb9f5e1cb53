//! What a step meant for the requests.

use std::fmt;

use paged_kv::TokenId;
use smallvec::SmallVec;

use crate::request::RequestId;

/// News of one sequence, in the order in which it happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event<L> {
    /// A sequence got longer.
    Tokens {
        /// Its request.
        id: RequestId,
        /// Which of the request's `n` sequences.
        index: u32,
        /// The new tokens; the one that stopped the sequence is included.
        tokens: SmallVec<[TokenId; 2]>,
        /// What sampling reported of each of them; empty if the parameters ask for nothing.
        extras: Vec<L>,
    },
    /// Reports on prompt tokens, each position once.
    PromptExtras {
        /// The request.
        id: RequestId,
        /// Which of its sequences computed the prompt.
        index: u32,
        /// Position of the first entry's token.
        start: u32,
        /// One entry a position.
        extras: Vec<L>,
    },
    /// A sequence ended by itself. Those that the caller ends bring no event.
    Finished {
        /// Its request.
        id: RequestId,
        /// Which of the request's `n` sequences.
        index: u32,
        /// Why.
        reason: FinishReason,
        /// What it took.
        usage: Usage,
    },
}

/// Why a sequence ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-sequence token of the model.
    Eos,
    /// One of the request's stop tokens.
    StopToken(TokenId),
    /// One of the request's stop strings (found by the caller).
    StopString(String),
    /// `max_tokens`, `max_model_len` or the size of the KV cache.
    Length,
    /// The caller lost interest.
    Aborted,
    /// This sequence could not go on; the text says why.
    Error(String),
}

impl FinishReason {
    /// The word used for it in OpenAI's and vLLM's interfaces.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Eos | Self::StopToken(_) | Self::StopString(_) => "stop",
            Self::Length => "length",
            Self::Aborted => "abort",
            Self::Error(_) => "error",
        }
    }
}

impl fmt::Display for FinishReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What one sequence took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens in the prompt.
    pub prompt_tokens: u32,
    /// Prompt tokens whose keys and values came from the prefix cache at first admission.
    pub cached_tokens: u32,
    /// Tokens generated.
    pub output_tokens: u32,
    /// How often it was preempted.
    pub preemptions: u32,
}
