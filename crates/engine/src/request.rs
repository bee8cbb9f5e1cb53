//! What a user asks for.

use std::time::Instant;

use sampler::SamplingParams;

use crate::chat_template::ChatInput;
use crate::structured::StructuredOutputs;

/// The beginning of the text to be generated.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// Plain text; needs a tokenizer.
    Text(String),
    /// Token ids, taken as they are.
    TokenIds(Vec<u32>),
    /// A conversation; needs a tokenizer and a chat template.
    Chat(ChatInput),
}

impl From<&str> for Prompt {
    fn from(text: &str) -> Self {
        Prompt::Text(text.to_string())
    }
}

impl From<String> for Prompt {
    fn from(text: String) -> Self {
        Prompt::Text(text)
    }
}

impl From<Vec<u32>> for Prompt {
    fn from(ids: Vec<u32>) -> Self {
        Prompt::TokenIds(ids)
    }
}

impl From<ChatInput> for Prompt {
    fn from(chat: ChatInput) -> Self {
        Prompt::Chat(chat)
    }
}

/// A request for one or several (`params.n`) continuations of a prompt.
#[derive(Clone, Debug)]
pub struct GenerateRequest {
    /// The caller's name for it. The engine hands it back and does not look at it.
    pub id: String,
    /// What to continue.
    pub prompt: Prompt,
    /// How to sample and when to stop.
    pub params: SamplingParams,
    /// What the text must look like.
    pub structured: Option<StructuredOutputs>,
    /// Lower is served first; other than 0 only with the priority policy.
    pub priority: i32,
    /// Who shares the machine with whom (a user, a tenant); see [`Policy::Fair`](crate::Policy) and
    /// [`QueueLimits`](crate::QueueLimits).
    pub class: u64,
    /// Requests share cached prefixes only among equal salts.
    pub cache_salt: Option<String>,
    /// Whether the tokenizer adds its special tokens to the prompt. Unset: yes for plain text, no
    /// for chats, whose template has put them there.
    pub add_special_tokens: Option<bool>,
    /// When it arrived: queueing time counts from here.
    pub arrival: Instant,
}

impl GenerateRequest {
    /// A request that arrives now, with everything else at its default.
    pub fn new(id: impl Into<String>, prompt: impl Into<Prompt>, params: SamplingParams) -> Self {
        GenerateRequest {
            id: id.into(),
            prompt: prompt.into(),
            params,
            structured: None,
            priority: 0,
            class: 0,
            cache_salt: None,
            add_special_tokens: None,
            arrival: Instant::now(),
        }
    }
}
