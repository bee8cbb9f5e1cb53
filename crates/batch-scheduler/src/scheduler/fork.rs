//! Sequences that the caller branches and rewrites between steps: beams, guided decoding.

use paged_kv::{KvAllocator, TokenId};

use crate::plan::SlotId;
use crate::request::RequestId;
use crate::scheduler::Scheduler;
use crate::sequence::{Seq, Status};
use crate::tokens::Tokens;
use crate::waiting::Order;

/// Why a sequence cannot be forked or rewritten. The scheduler is unchanged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ForkError {
    /// There is none, or it ended.
    #[error("request {id} has no live sequence {index}")]
    NoSequence {
        /// The request.
        id: RequestId,
        /// The sequence asked for.
        index: u32,
    },
    /// A step in flight computes it: what it will be is not known.
    #[error(
        "sequence {index} of request {id} is in a step in flight; apply it first (with several \
         steps in flight, set Request::lockstep)"
    )]
    InFlight {
        /// The request.
        id: RequestId,
        /// The sequence.
        index: u32,
    },
    /// The request's `n` sequences do not exist yet.
    #[error("request {id}: its other sequences are yet to fork; its prompt is not computed")]
    PromptPending {
        /// The request.
        id: RequestId,
    },
    /// The prompt cannot be cut, and there is nothing to keep behind the last token.
    #[error(
        "sequence {index} of request {id}: cannot keep {keep} tokens; it has {num_tokens}, of \
         which {num_prompt} are the prompt"
    )]
    KeepOutOfRange {
        /// The request.
        id: RequestId,
        /// The sequence.
        index: u32,
        /// Tokens to keep.
        keep: usize,
        /// Tokens of the prompt.
        num_prompt: usize,
        /// Tokens there are.
        num_tokens: usize,
    },
    /// The sequence would end before it began.
    #[error("request {id}: the sequence would have {len} tokens, and ends with {limit}")]
    TooLong {
        /// The request.
        id: RequestId,
        /// Tokens it would have.
        len: usize,
        /// Tokens with which a sequence of the request ends.
        limit: usize,
    },
    /// A live sequence has that index.
    #[error("request {id} has a live sequence {index} already; choose another index")]
    IndexTaken {
        /// The request.
        id: RequestId,
        /// The index asked for.
        index: u32,
    },
}

impl<K: KvAllocator, P: Clone> Scheduler<K, P> {
    /// Replaces what a sequence has said: its first `keep` tokens (the prompt and at least none of
    /// the output) stay, `tail` follows. It goes on from there; what is computed of the kept
    /// tokens is not computed again. Between steps, and not while a step in flight names the
    /// sequence. `tail` is not compared with stop tokens, and brings no event.
    ///
    /// Under a sliding window, cutting tokens makes the sequence compute anew from its start
    /// (and counts as a preemption): what the window left behind is gone.
    pub fn rewrite(
        &mut self,
        id: RequestId,
        index: u32,
        keep: usize,
        tail: &[TokenId],
    ) -> Result<(), ForkError> {
        let key = self.check_branch(id, index, keep, tail.len())?;
        let seq = &mut self.seqs[key];
        if tail.is_empty() && keep as u32 == seq.tokens.len() {
            return Ok(());
        }
        seq.tokens.replace(keep as u32, tail);
        seq.drop_drafts();
        let kept = (keep as u32).min(seq.tokens.len() - 1);
        self.turned_away = None;
        if seq.status == Status::Waiting {
            let holds = |s: &paged_kv::SwappedTable| s.num_computed() > kept as usize;
            if let Some(swapped) = seq.swapped.take_if(|s| holds(s)) {
                self.kv.discard(*swapped);
            }
            return Ok(());
        }
        // The runner learns of the new tokens as if the sequence were new.
        if std::mem::take(&mut seq.announced) {
            self.released.push(SlotId(seq.slot));
        }
        if seq.done > kept && self.config.sliding_window.is_some() {
            seq.done = 0;
            let at = self.running.iter().position(|&k| k == key);
            self.preempt(at.expect("a running sequence is in the list"));
            return Ok(());
        }
        seq.done = seq.done.min(kept);
        seq.computed = seq.done;
        seq.settle_at = 0;
        Ok(())
    }

    /// Adds a sequence to a request: the first `keep` tokens of sequence `index`, then `tail`. It
    /// shares the blocks of what is computed of them, and is sequence `new_index` in events and in
    /// [`finish`](Self::finish); the index of a sequence that ended may serve again. Conditions as
    /// for [`rewrite`](Self::rewrite). Where no slot is free it waits for one.
    ///
    /// A forked sequence is one more in the order of service, like any other. Where beams go ahead
    /// together, slots and cache must hold the beams of all such requests at once. A beam that was
    /// preempted falls behind; cut the others back (`rewrite` with an empty tail) until it is there.
    ///
    /// Beam search: after each step, [`finish`](Self::finish) the beams that no candidate
    /// continues, `fork` those that several continue, and `rewrite` the last token of the others.
    /// `examples/beam.rs` does.
    pub fn fork(
        &mut self,
        id: RequestId,
        index: u32,
        new_index: u32,
        keep: usize,
        tail: &[TokenId],
        params: P,
    ) -> Result<(), ForkError> {
        let parent = self.check_branch(id, index, keep, tail.len())?;
        if self.find(id, new_index).is_some() {
            let index = new_index;
            return Err(ForkError::IndexTaken { id, index });
        }
        let of = &self.seqs[parent];
        let mut tokens = of.tokens.first(keep as u32, tail.len() + 1);
        tokens.extend_from_slice(tail);
        let shared = (of.done as usize).min(keep).min(tokens.len() - 1);
        let window_moved = self.config.sliding_window.is_some() && shared < of.done as usize;
        let slot_free = self.free_slots.len() > self.promised_slots;
        let table = match &mut self.seqs[parent].table {
            Some(table) if slot_free && !window_moved => Some(self.kv.fork(table, shared)),
            _ => None,
        };
        let of = &self.seqs[parent];
        let runs = table.is_some();
        let done = if runs { shared as u32 } else { 0 };
        let seq = Seq {
            status: Status::Waiting,
            speculating: false,
            lockstep: of.lockstep,
            announced: false,
            slot: u32::MAX,
            computed: done,
            done,
            settle_at: 0,
            sampling: 0,
            in_flight: 0,
            limit: of.limit,
            num_prompt: of.num_prompt,
            stop_from: of.stop_from,
            reclaim_at: self.first_reclaim(),
            tokens: Tokens::new(tokens),
            table,
            swapped: None,
            drafts: None,
            stop_sieve: of.stop_sieve,
            stop: of.stop.clone(),
            id,
            index: new_index,
            order: Order {
                index: new_index,
                ..of.order
            },
            queue: of.queue,
            salt: of.salt,
            use_cache: of.use_cache,
            params,
            fork: Vec::new(),
            cached: of.cached,
            preemptions: 0,
            prompt_reported: of.prompt_reported.max(done),
        };
        let (queue, order, tokens) = (seq.queue, seq.order, seq.tokens.len());
        let key = self.seqs.insert(seq);
        self.requests.entry(id).or_default().push((new_index, key));
        if runs {
            let slot = self.take_slot();
            self.slot_owner[slot as usize] = key;
            self.seqs[key].slot = slot;
            self.seqs[key].status = Status::Running;
            self.join_running(key);
        } else {
            let policy = self.policy.as_mut();
            self.waiting.insert(policy, queue, order, key, tokens);
        }
        Ok(())
    }

    /// Whether a step in flight computes any sequence of a request. If so, apply steps before
    /// planning further ones, until [`fork`](Self::fork) and [`rewrite`](Self::rewrite) can be had
    /// for all of them.
    pub fn is_in_flight(&self, id: RequestId) -> bool {
        let mut seqs = self.requests.get(&id).into_iter().flatten();
        seqs.any(|&(_, key)| self.seqs[key].in_flight > 0)
    }

    /// The sequence's key, if it may be branched so.
    fn check_branch(
        &self,
        id: RequestId,
        index: u32,
        keep: usize,
        tail: usize,
    ) -> Result<u32, ForkError> {
        let Some(key) = self.find(id, index) else {
            let mut live = self.requests.get(&id).into_iter().flatten();
            let yet_to_fork =
                |&(_, key): &(u32, u32)| self.seqs[key].fork.iter().any(|(i, _)| *i == index);
            return Err(match live.any(yet_to_fork) {
                true => ForkError::PromptPending { id },
                false => ForkError::NoSequence { id, index },
            });
        };
        let seq = &self.seqs[key];
        if seq.in_flight > 0 {
            return Err(ForkError::InFlight { id, index });
        }
        if !seq.fork.is_empty() {
            return Err(ForkError::PromptPending { id });
        }
        let (num_prompt, num_tokens) = (seq.num_prompt as usize, seq.tokens.len() as usize);
        if !(num_prompt..=num_tokens).contains(&keep) {
            return Err(ForkError::KeepOutOfRange {
                id,
                index,
                keep,
                num_prompt,
                num_tokens,
            });
        }
        let (len, limit) = (keep + tail, seq.limit as usize);
        if len >= limit {
            return Err(ForkError::TooLong { id, len, limit });
        }
        Ok(key)
    }
}
