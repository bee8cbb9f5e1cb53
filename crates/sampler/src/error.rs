//! Why a sequence cannot be sampled or admitted.

use crate::params::ParamError;

/// Why one row could not be sampled. The other rows of the call are not affected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
    /// A logit is NaN or +inf: the model's output is broken.
    #[error("the logit of token {token} is NaN or +inf: the model produced no usable output")]
    NotFinite {
        /// The first such token.
        token: u32,
    },
    /// Every token is masked or has a logit of -inf.
    #[error(
        "no token can be sampled: allowed_token_ids, bad words, bad_token_ids, min_tokens and \
         the model's own -inf logits leave none"
    )]
    AllMasked,
    /// No sequence was admitted to this slot.
    #[error("slot {slot} holds no sequence: admit one before sampling")]
    EmptySlot {
        /// The slot.
        slot: u32,
    },
    /// A token id is outside of the vocabulary.
    #[error("token id {token} is outside of the vocabulary of {vocab_size} tokens")]
    TokenOutOfRange {
        /// The token.
        token: u32,
        /// Number of tokens in the vocabulary.
        vocab_size: usize,
    },
    /// The next token depends on one that was launched but not collected.
    #[error(
        "slot {slot} has penalties or bad words and a sampled token that was not collected: \
         collect it before launching the next"
    )]
    NotCollected {
        /// The slot.
        slot: u32,
    },
}

/// Why a sequence could not take a slot.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdmitError {
    /// The slot holds another sequence.
    #[error("slot {slot} is taken: release it first")]
    SlotTaken {
        /// The slot.
        slot: u32,
    },
    /// `num_prompt` exceeds the number of tokens.
    #[error("num_prompt is {num_prompt}, but the sequence has only {num_tokens} tokens")]
    PromptLength {
        /// The given prompt length.
        num_prompt: usize,
        /// Number of tokens given.
        num_tokens: usize,
    },
    /// A parameter is out of its range.
    #[error(transparent)]
    Params(#[from] ParamError),
    /// A token of the sequence or a stop token is outside of the vocabulary.
    #[error("token id {token} is outside of the vocabulary of {vocab_size} tokens")]
    TokenOutOfRange {
        /// The token.
        token: u32,
        /// Number of tokens in the vocabulary.
        vocab_size: usize,
    },
    /// The sampler of this device cannot do what the parameters ask for.
    #[error("not supported on this device: {what}")]
    Unsupported {
        /// What, and what would be.
        what: String,
    },
}
