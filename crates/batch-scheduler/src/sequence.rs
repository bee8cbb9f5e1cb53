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

/// The tokens that end a request's sequences. They are compared in every step, so few of the
/// others may cost a look at the list.
#[derive(Clone)]
pub(crate) struct StopTokens {
    /// Bit `id % 64` is set for each of them.
    sieve: u64,
    list: Arc<StopList>,
}

struct StopList {
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
        let ids: SmallVec<_> = eos.iter().chain(&stop.stop_token_ids).copied().collect();
        Self {
            sieve: ids.iter().fold(0, |sieve, id| sieve | 1u64 << (id % 64)),
            list: Arc::new(StopList {
                ids,
                num_eos: eos.len(),
            }),
        }
    }

    #[inline]
    fn reason(&self, token: TokenId) -> Option<FinishReason> {
        match self.sieve >> (token % 64) & 1 {
            0 => None,
            _ => self.search(token),
        }
    }

    #[cold]
    fn search(&self, token: TokenId) -> Option<FinishReason> {
        let at = self.list.ids.iter().position(|&id| id == token)?;
        Some(match at < self.list.num_eos {
            true => FinishReason::Eos,
            false => FinishReason::StopToken(token),
        })
    }
}

/// Tokens proposed to follow the last one known.
#[derive(Default)]
pub(crate) struct Drafts {
    pub(crate) tokens: Vec<TokenId>,
    /// How many tokens the sequence had then.
    pub(crate) at: u32,
}

/// The order of the fields is that of memory. A decode step reads the first three cache lines,
/// for each sequence twice, and with thousands of them the caches are what it waits for.
#[repr(C, align(64))]
pub(crate) struct Seq<P> {
    // The first line: where it stands.
    /// Prompt, then output as far as it is known.
    pub(crate) tokens: Vec<TokenId>,
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

    // The second line: what it is, and what few sequences have.
    pub(crate) id: RequestId,
    pub(crate) index: u32,
    pub(crate) preemptions: u32,
    pub(crate) stop: StopTokens,
    /// Drafts to verify.
    pub(crate) drafts: Option<Box<Drafts>>,
    /// The request's other sequences, by index, until the prompt is computed.
    pub(crate) fork: Vec<(u32, P)>,

    // The third line, and what no step reads.
    /// Set exactly while it holds a slot.
    pub(crate) table: Option<BlockTable>,
    /// Its first `num_computed` keys and values, in host memory; only while it waits.
    pub(crate) swapped: Option<SwappedTable>,
    pub(crate) order: Order,
    pub(crate) queue: u64,
    pub(crate) salt: Salt,
    pub(crate) use_cache: bool,
    /// Prompt hits of the first admission.
    pub(crate) cached: Option<u32>,
    /// Prompt positions whose extras were passed on.
    pub(crate) prompt_reported: u32,
    pub(crate) params: P,
}

impl<P> Seq<P> {
    /// Length once every sample in flight is in.
    #[inline]
    pub(crate) fn wanted(&self) -> u32 {
        self.tokens.len() as u32 + self.sampling
    }

    /// Forgets what was proposed.
    pub(crate) fn drop_drafts(&mut self) {
        if let Some(drafts) = &mut self.drafts {
            drafts.tokens.clear();
        }
    }

    /// Whether `token`, the last of `tokens`, ends the sequence.
    #[inline]
    pub(crate) fn stop_reason(&self, token: TokenId) -> Option<FinishReason> {
        let len = self.tokens.len() as u32;
        if len >= self.stop_from
            && let Some(reason) = self.stop.reason(token)
        {
            return Some(reason);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_reads_three_cache_lines_of_a_sequence() {
        use std::mem::offset_of;
        assert_eq!(offset_of!(Seq<()>, id), 64);
        assert_eq!(offset_of!(Seq<()>, table), 128);
    }
}
