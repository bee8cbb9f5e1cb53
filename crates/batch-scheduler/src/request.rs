//! What a caller hands in: a prompt, how many sequences, and when each of them stops.

use std::fmt;

use paged_kv::{Salt, TokenId};

/// Name of a request, chosen by the caller. Free for reuse once all its sequences finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// When a sequence ends by itself. Stop *strings* need text and therefore live with the caller,
/// who ends the sequence through [`Scheduler::finish`](crate::Scheduler::finish).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopCriteria {
    /// Most tokens to generate; at least 1.
    pub max_tokens: u32,
    /// End-of-sequence and stop tokens count only from this many generated tokens on (the one
    /// in question included).
    pub min_tokens: u32,
    /// Tokens that end the sequence with [`FinishReason::StopToken`](crate::FinishReason).
    pub stop_token_ids: Vec<TokenId>,
    /// The model's end-of-sequence tokens; they end it with [`FinishReason::Eos`](crate::FinishReason).
    pub eos_token_ids: Vec<TokenId>,
    /// Disregard `eos_token_ids` (benchmarks of a fixed length).
    pub ignore_eos: bool,
}

impl StopCriteria {
    /// Stops after `max_tokens` tokens and for no other reason.
    pub fn max_tokens(max_tokens: u32) -> Self {
        Self {
            max_tokens,
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            eos_token_ids: Vec::new(),
            ignore_eos: false,
        }
    }
}

/// Sampling parameters of a request's sequences; the scheduler only passes them on.
#[derive(Clone, Debug)]
pub enum SeqParams<P> {
    /// Every sequence gets a clone.
    Shared(P),
    /// Sequence `i` gets entry `i` (its own seed, for instance); there must be `n` entries.
    PerSequence(Vec<P>),
}

impl<P: Clone> SeqParams<P> {
    pub(crate) fn get(&self, index: u32) -> P {
        match self {
            Self::Shared(params) => params.clone(),
            Self::PerSequence(params) => params[index as usize].clone(),
        }
    }
}

/// A prompt to continue.
#[derive(Clone, Debug)]
pub struct Request<P> {
    /// Its name in events and in [`Scheduler::abort`](crate::Scheduler::abort).
    pub id: RequestId,
    /// Token ids of the prompt; at least one.
    pub prompt: Vec<TokenId>,
    /// How many sequences continue the prompt. The prompt is computed once.
    pub n: u32,
    /// When each sequence ends.
    pub stop: StopCriteria,
    /// For the [`Priority`](crate::Priority) policy: lower is served first.
    pub priority: i32,
    /// For the [`WeightedFair`](crate::WeightedFair) policy: who shares the machine with whom
    /// (a user, a tenant).
    pub class: u64,
    /// Separates prefix caches: blocks are shared among equal salts only.
    pub salt: Salt,
    /// Whether the prompt may start from cached blocks. Switch it off where every prompt position
    /// must be computed (prompt log-probabilities); blocks are still shared *from* this request.
    pub use_prefix_cache: bool,
    /// With several steps in flight: plan no step of a sequence before its last sample is in. For
    /// callers that choose among the samples and [`rewrite`](crate::Scheduler::rewrite) or
    /// [`fork`](crate::Scheduler::fork) the sequence between steps (beam search, guided decoding).
    /// Its own tokens come more slowly, other requests' do not.
    pub lockstep: bool,
    /// Sampling parameters.
    pub params: SeqParams<P>,
}

impl<P> Request<P> {
    /// One sequence, priority 0, class 0, default salt, prefix cache in use.
    pub fn new(id: u64, prompt: Vec<TokenId>, stop: StopCriteria, params: P) -> Self {
        Self {
            id: RequestId(id),
            prompt,
            n: 1,
            stop,
            priority: 0,
            class: 0,
            salt: Salt::default(),
            use_prefix_cache: true,
            lockstep: false,
            params: SeqParams::Shared(params),
        }
    }
}

/// Why a request was refused. The scheduler is unchanged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AddError {
    /// The prompt has no token to compute logits from.
    #[error("request {id}: the prompt is empty; it needs at least one token")]
    EmptyPrompt {
        /// The request.
        id: RequestId,
    },
    /// Prompt and one generated token exceed the model's length.
    #[error(
        "request {id}: the prompt has {prompt} tokens, but max_model_len is {max_model_len} and \
         at least one token must be left to generate"
    )]
    PromptTooLong {
        /// The request.
        id: RequestId,
        /// Tokens in the prompt.
        prompt: usize,
        /// The configured limit.
        max_model_len: usize,
    },
    /// The prompt would not fit the KV pool even with nothing else in it.
    #[error(
        "request {id}: the prompt has {prompt} tokens, but the whole KV cache holds {capacity}; \
         enlarge the cache"
    )]
    NeverFits {
        /// The request.
        id: RequestId,
        /// Tokens in the prompt.
        prompt: usize,
        /// Tokens the pool holds.
        capacity: usize,
    },
    /// `n` is 0.
    #[error("request {id}: n is 0; ask for at least one sequence")]
    ZeroSequences {
        /// The request.
        id: RequestId,
    },
    /// More sequences than can ever run together.
    #[error("request {id}: n is {n}, but at most {max_num_seqs} sequences run at once")]
    TooManySequences {
        /// The request.
        id: RequestId,
        /// Sequences asked for.
        n: u32,
        /// The configured limit.
        max_num_seqs: usize,
    },
    /// `max_tokens` is 0.
    #[error("request {id}: max_tokens is 0; it must be at least 1")]
    ZeroMaxTokens {
        /// The request.
        id: RequestId,
    },
    /// `min_tokens` exceeds `max_tokens`.
    #[error("request {id}: min_tokens ({min_tokens}) exceeds max_tokens ({max_tokens})")]
    MinAboveMaxTokens {
        /// The request.
        id: RequestId,
        /// Least tokens asked for.
        min_tokens: u32,
        /// Most tokens asked for.
        max_tokens: u32,
    },
    /// [`SeqParams::PerSequence`] has not `n` entries.
    #[error("request {id}: {given} entries of parameters for n = {n} sequences")]
    ParamsCount {
        /// The request.
        id: RequestId,
        /// Entries given.
        given: usize,
        /// Sequences asked for.
        n: u32,
    },
    /// A request of that name is still running.
    #[error("request {id}: a request of that id is not finished yet")]
    DuplicateId {
        /// The request.
        id: RequestId,
    },
}
