//! What can be wrong with one request. The others never notice.

use batch_scheduler::AddError;
use sampler::ParamError;

use crate::chat_template::ChatError;

/// Why a request was refused or failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// There is no token to compute logits from.
    #[error("the prompt is empty; it must have at least one token")]
    EmptyPrompt,
    /// The prompt leaves no room to generate.
    #[error(
        "This model's maximum context length is {max_model_len} tokens. However, your prompt \
         contains {prompt_tokens} input tokens, and at least one token must be left to generate. \
         Please reduce the length of the prompt."
    )]
    PromptTooLong {
        /// The engine's `max_model_len`.
        max_model_len: usize,
        /// Tokens in the prompt.
        prompt_tokens: usize,
    },
    /// The prompt would not fit the KV cache even if nothing else ran.
    #[error(
        "the KV cache holds {capacity} tokens, but your prompt contains {prompt_tokens} input \
         tokens; shorten it, or run the engine with a larger kv_cache_memory_bytes"
    )]
    PromptExceedsCache {
        /// Tokens that the cache holds.
        capacity: usize,
        /// Tokens in the prompt.
        prompt_tokens: usize,
    },
    /// A token id that the model does not have.
    #[error(
        "token id {token} at position {position} of the prompt is not below the vocabulary size \
         ({vocab_size})"
    )]
    TokenOutOfRange {
        /// The token.
        token: u32,
        /// Its place in the prompt.
        position: usize,
        /// Number of tokens the model knows.
        vocab_size: usize,
    },
    /// A sampling parameter is out of its range.
    #[error(transparent)]
    Param(#[from] ParamError),
    /// The chat cannot be rendered.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// The request needs what the model or the configuration does not provide.
    #[error("{message}")]
    Unsupported {
        /// The parameter that asks for it.
        param: &'static str,
        /// What is missing and what would work.
        message: String,
    },
    /// A parameter that is not one of the sampler's has an impossible value.
    #[error("{param} must be {expected}")]
    Invalid {
        /// The parameter.
        param: &'static str,
        /// What it must be.
        expected: String,
    },
    /// A schema, regular expression, choice or grammar cannot be used.
    #[error("{param} cannot be used: {cause}")]
    Grammar {
        /// The parameter.
        param: &'static str,
        /// What is wrong with it.
        cause: String,
    },
    /// Too much waits already; this one would only wait longer.
    #[error("{limit} {what} are waiting already, which is the most; try again later")]
    QueueFull {
        /// The engine's `max_num_queued_reqs` or `max_num_queued_tokens`.
        limit: usize,
        /// What is counted.
        what: &'static str,
    },
    /// The model could not go on with this request.
    #[error("generation failed: {0}")]
    Failed(String),
    /// The engine has stopped; no request can be served any more.
    #[error("the engine has stopped: {0}")]
    EngineDead(String),
}

impl RequestError {
    /// The request parameter at fault, as the HTTP API names it.
    pub fn param(&self) -> Option<&str> {
        match self {
            RequestError::EmptyPrompt | RequestError::TokenOutOfRange { .. } => Some("prompt"),
            RequestError::PromptTooLong { .. } | RequestError::PromptExceedsCache { .. } => {
                Some("input_tokens")
            }
            RequestError::Param(error) => Some(error.param()),
            RequestError::Chat(error) => Some(error.param),
            RequestError::Unsupported { param, .. }
            | RequestError::Invalid { param, .. }
            | RequestError::Grammar { param, .. } => Some(param),
            RequestError::QueueFull { .. }
            | RequestError::Failed(_)
            | RequestError::EngineDead(_) => None,
        }
    }

    /// Whether the request is at fault (HTTP 400), and not the engine (HTTP 500, or 503 for a
    /// full queue).
    pub fn is_client_error(&self) -> bool {
        !matches!(
            self,
            RequestError::QueueFull { .. } | RequestError::Failed(_) | RequestError::EngineDead(_)
        )
    }

    pub(crate) fn unsupported(param: &'static str, message: impl Into<String>) -> Self {
        RequestError::Unsupported {
            param,
            message: message.into(),
        }
    }
}

impl From<AddError> for RequestError {
    /// The front end has checked what the scheduler checks; this is for what slipped through.
    fn from(error: AddError) -> Self {
        match error {
            AddError::EmptyPrompt { .. } => RequestError::EmptyPrompt,
            AddError::PromptTooLong {
                prompt,
                max_model_len,
                ..
            } => RequestError::PromptTooLong {
                max_model_len,
                prompt_tokens: prompt,
            },
            AddError::NeverFits {
                prompt, capacity, ..
            } => RequestError::PromptExceedsCache {
                capacity,
                prompt_tokens: prompt,
            },
            other => RequestError::Failed(other.to_string()),
        }
    }
}
