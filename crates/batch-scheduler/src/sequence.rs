//! One sequence: what is known of it, computed of it and under way for it.

use std::sync::Arc;

use paged_kv::{BlockTable, Salt, SwappedTable, TokenId};
use smallvec::SmallVec;

use crate::event::{FinishReason, Usage};
use crate::request::{RequestId, StopCriteria};
use crate::waiting::Order;

/// Where a sequence stands in the scheduler's books.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    /// In the waiting queues; no slot, no block.
    Waiting,
    /// In the running list; has a slot and a block table.
    Running,
    /// Preempted while a step in flight still reads its blocks.
    Yielding,
    /// Finished while a step in flight still reads its blocks.
    Leaving,
}

/// The tokens that end a request's sequences, side by side: they are compared in every step.
pub(crate) struct StopTokens {
    /// End-of-sequence tokens, then stop tokens.
    ids: SmallVec<[TokenId; 8]>,
    num_eos: usize,
}

impl StopTokens {
    pub(crate) fn new(stop: &StopCriteria) -> Self {
        let eos = match stop.ignore_eos {
            true => &[][..],
            false => &stop.eos_token_ids,
        };
        Self {
            ids: eos.iter().chain(&stop.stop_token_ids).copied().collect(),
            num_eos: eos.len(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }
}

pub(crate) struct Seq<P> {
    pub(crate) status: Status,
    /// Has a row of several drafts in flight: how long it is comes with that row.
    pub(crate) speculating: bool,
    /// Takes part in no step while a sample of it is in flight.
    pub(crate) lockstep: bool,
    /// Whether the runner was told what is in the slot.
    pub(crate) announced: bool,
    pub(crate) slot: u32,
    /// Tokens computed once all steps in flight are done, drafts left out.
    pub(crate) computed: u32,
    /// Tokens computed by steps that were applied.
    pub(crate) done: u32,
    /// Samples in flight; each will add a token.
    pub(crate) sampling: u32,
    /// Steps in flight that name the sequence.
    pub(crate) in_flight: u32,
    /// Length at which it ends.
    pub(crate) limit: u32,
    pub(crate) num_prompt: u32,
    /// Length from which on stop tokens count.
    pub(crate) stop_from: u32,
    /// `done` from which on another block has left the window.
    pub(crate) reclaim_at: u32,
    /// Prompt, then output as far as it is known.
    pub(crate) tokens: Vec<TokenId>,
    /// Set exactly while it holds a slot.
    pub(crate) table: Option<BlockTable>,
    /// Its first `num_computed` keys and values, in host memory; only while it waits.
    pub(crate) swapped: Option<SwappedTable>,
    /// Drafts to verify, proposed when it had `drafts_at` tokens.
    pub(crate) drafts: Vec<TokenId>,
    pub(crate) drafts_at: u32,
    pub(crate) stop: Arc<StopTokens>,
    pub(crate) id: RequestId,
    pub(crate) index: u32,
    pub(crate) order: Order,
    pub(crate) queue: u64,
    pub(crate) salt: Salt,
    pub(crate) use_cache: bool,
    pub(crate) params: P,
    /// The request's other sequences, by index, until the prompt is computed.
    pub(crate) fork: Vec<(u32, P)>,
    /// Prompt hits of the first admission.
    pub(crate) cached: Option<u32>,
    pub(crate) preemptions: u32,
    /// Prompt positions whose extras were passed on.
    pub(crate) prompt_reported: u32,
}

impl<P> Seq<P> {
    /// Length once every sample in flight is in.
    #[inline]
    pub(crate) fn wanted(&self) -> u32 {
        self.tokens.len() as u32 + self.sampling
    }

    /// Whether `token`, the last of `tokens`, ends the sequence.
    #[inline]
    pub(crate) fn stop_reason(&self, token: TokenId) -> Option<FinishReason> {
        let len = self.tokens.len() as u32;
        if len >= self.stop_from
            && let Some(at) = self.stop.ids.iter().position(|&id| id == token)
        {
            return Some(match at < self.stop.num_eos {
                true => FinishReason::Eos,
                false => FinishReason::StopToken(token),
            });
        }
        (len >= self.limit).then_some(FinishReason::Length)
    }

    pub(crate) fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.num_prompt,
            cached_tokens: self.cached.unwrap_or(0),
            output_tokens: self.tokens.len() as u32 - self.num_prompt,
            preemptions: self.preemptions,
        }
    }
}
