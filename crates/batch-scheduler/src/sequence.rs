//! One sequence: what is known of it, computed of it and under way for it.

use std::sync::Arc;

use paged_kv::{BlockTable, Salt, SwappedTable, TokenId};
use smallvec::SmallVec;

use crate::event::{FinishReason, Usage};
use crate::request::{RequestId, StopCriteria};
use crate::tokens::Tokens;
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

/// The tokens that end a request's sequences.
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

    /// Bit `id % 32` is set for each of them: most other tokens need no look at the list.
    pub(crate) fn sieve(&self) -> u32 {
        self.ids.iter().fold(0, |sieve, id| sieve | 1 << (id % 32))
    }

    #[cold]
    fn reason(&self, token: TokenId) -> Option<FinishReason> {
        let at = self.ids.iter().position(|&id| id == token)?;
        Some(match at < self.num_eos {
            true => FinishReason::Eos,
            false => FinishReason::StopToken(token),
        })
    }
}

/// Tokens proposed to follow the last one known. There are none while a sample is in flight: they
/// are refused then, and the sequence's next row takes or drops them.
#[derive(Default)]
pub(crate) struct Drafts(pub(crate) Vec<TokenId>);

/// The order of the fields is that of memory. A decode step reads the first four cache lines, some
/// of them twice, and with thousands of sequences the caches are what it waits for.
#[repr(C, align(64))]
pub(crate) struct Seq<P> {
    // The first line.
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
    /// Tokens computed by steps that were applied. Whoever lowers it sets `settle_at` to 0.
    pub(crate) done: u32,
    /// `done` from which on a block may be full or out of the window.
    pub(crate) settle_at: u32,
    /// Samples in flight; each will add a token.
    pub(crate) sampling: u32,
    /// Steps in flight that name the sequence.
    pub(crate) in_flight: u32,
    pub(crate) num_prompt: u32,
    /// Length from which on stop tokens count.
    pub(crate) stop_from: u32,
    /// Length at which it ends.
    pub(crate) limit: u32,
    pub(crate) id: RequestId,
    pub(crate) index: u32,
    /// See [`StopTokens::sieve`].
    pub(crate) stop_sieve: u32,
    /// Prompt, then output as far as it is known. The second line holds the newest.
    pub(crate) tokens: Tokens,

    // The third line.
    /// Drafts to verify.
    pub(crate) drafts: Option<Box<Drafts>>,
    /// The request's other sequences, by index, until the prompt is computed.
    pub(crate) fork: Vec<(u32, P)>,
    pub(crate) stop: Arc<StopTokens>,

    // The fourth line, and what no step reads.
    /// Set exactly while it holds a slot.
    pub(crate) table: Option<BlockTable>,
    /// `done` from which on another block has left the window.
    pub(crate) reclaim_at: u32,
    pub(crate) preemptions: u32,
    /// Its first `num_computed` keys and values, in host memory; only while it waits.
    pub(crate) swapped: Option<Box<SwappedTable>>,
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
        self.tokens.len() + self.sampling
    }

    /// Whether its next row is that of its newest token alone, behind which it samples.
    #[inline]
    pub(crate) fn decodes(&self) -> bool {
        let wanted = self.wanted();
        wanted > self.num_prompt && self.computed + 1 == wanted
    }

    /// Forgets what was proposed.
    pub(crate) fn drop_drafts(&mut self) {
        if let Some(drafts) = &mut self.drafts {
            drafts.0.clear();
        }
    }

    /// Whether `token`, the last of `tokens`, ends the sequence.
    #[inline]
    pub(crate) fn stop_reason(&self, token: TokenId) -> Option<FinishReason> {
        let len = self.tokens.len();
        if len >= self.stop_from
            && self.stop_sieve >> (token % 32) & 1 != 0
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
            output_tokens: self.tokens.len() - self.num_prompt,
            preemptions: self.preemptions,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_reads_four_cache_lines_of_a_sequence() {
        use std::mem::offset_of;
        assert_eq!(offset_of!(Seq<()>, tokens), 56);
        assert_eq!(offset_of!(Seq<()>, drafts), 152);
        assert_eq!(offset_of!(Seq<()>, table), 192);
        // With an even number of lines the four would crowd into a part of the cache's sets.
        assert_eq!(size_of::<Seq<()>>(), 7 * 64);
        assert_eq!(size_of::<Seq<Arc<()>>>(), 7 * 64);
    }
}
