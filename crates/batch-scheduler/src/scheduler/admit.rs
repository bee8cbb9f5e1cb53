//! Waiting sequences that enter a step.

use paged_kv::KvAllocator;

use crate::plan::{AdmittedSeq, SlotId};
use crate::scheduler::Scheduler;
use crate::scheduler::step::Draft;
use crate::sequence::Status;

impl<K: KvAllocator, P: Clone> Scheduler<K, P> {
    /// Admits waiting sequences until the first that does not fit.
    pub(super) fn admit_waiting(&mut self, draft: &mut Draft<P>) {
        while draft.budget.min(draft.prompt_budget) > 0 && draft.samples_left > 0 {
            let Some(key) = self.waiting.head(self.policy.as_mut()) else {
                return;
            };
            if !self.admit(draft, key) {
                return;
            }
        }
    }

    /// Admits one sequence with blocks for all its tokens and the first of its rows, or leaves
    /// everything as it is.
    fn admit(&mut self, draft: &mut Draft<P>, key: u32) -> bool {
        let seq = &mut self.seqs[key];
        // All n sequences of a request get their slots at once, so that the fork cannot fail.
        if self.free_slots.len() - self.promised_slots < 1 + seq.fork.len() {
            return false;
        }
        // Who found no room finds none before blocks come back; do not hash the prompt again.
        if let Some((turned_away, available)) = self.turned_away
            && turned_away == seq.order
            && self.kv.num_available() <= available
        {
            return false;
        }
        let available = self.kv.num_available();
        let total = seq.tokens.len() as usize;
        let swapped = seq.swapped.as_ref().map(|held| held.num_computed());
        let cut = self.token_budget < self.config.max_num_batched_tokens;
        if !self.config.enable_chunked_prefill && !cut && total > draft.budget {
            let cached = match (swapped, seq.use_cache) {
                (Some(held), _) => held,
                (None, true) => self.kv.match_prefix(seq.tokens.whole(), seq.salt),
                (None, false) => 0,
            };
            if total - cached > draft.budget {
                return false;
            }
        }
        let keep_free = match self.running.is_empty() {
            true => 0,
            false => self.config.watermark_blocks,
        };
        let swap_ins = draft.plan.swap_ins.len();
        let (mut table, cached) = if let Some(swapped) = seq.swapped.take().map(|swapped| *swapped)
        {
            let held = swapped.num_computed();
            // What came back cannot be sent away again in the same step: look before.
            let most = total.div_ceil(self.block_size as usize);
            let moved = match available < most + keep_free && keep_free > 0 {
                true => Err(swapped),
                false => {
                    self.kv
                        .swap_in(swapped, seq.tokens.whole(), total, &mut draft.plan.swap_ins)
                }
            };
            match moved {
                Ok(table) => (table, held),
                Err(swapped) => {
                    seq.swapped = Some(Box::new(swapped));
                    self.turned_away = Some((seq.order, available));
                    return false;
                }
            }
        } else {
            let allocation = self
                .kv
                .allocate(seq.tokens.whole(), seq.salt, seq.use_cache, total);
            let Some(allocation) = allocation else {
                self.turned_away = Some((seq.order, available));
                return false;
            };
            if self.kv.num_available() < keep_free {
                self.kv.free(allocation.table);
                self.turned_away = Some((seq.order, available));
                return false;
            }
            (allocation.table, allocation.num_cached)
        };
        let mut len = (total - cached).min(draft.budget).min(draft.prompt_budget);
        if self.config.long_prefill_token_threshold > 0 && self.config.enable_chunked_prefill {
            len = len.min(self.config.long_prefill_token_threshold);
        }
        let blocks = table.blocks().to_vec();
        let copies = &mut draft.plan.copies;
        let Some(grown) = self.kv.extend(&mut table, cached, cached + len, copies) else {
            self.kv.free(table);
            draft.plan.swap_ins.truncate(swap_ins);
            self.turned_away = Some((seq.order, available));
            return false;
        };

        let (queue, order, forks) = (seq.queue, seq.order, seq.fork.len());
        self.waiting.remove(queue, order);
        self.turned_away = None;
        self.promised_slots += forks;
        let slot = self.take_slot();
        self.slot_owner[slot as usize] = key;
        let first_reclaim = self.first_reclaim();
        let seq = &mut self.seqs[key];
        seq.status = Status::Running;
        seq.slot = slot;
        seq.announced = true;
        seq.table = Some(table);
        seq.computed = cached as u32;
        seq.done = cached as u32;
        seq.settle_at = 0;
        seq.reclaim_at = first_reclaim;
        seq.cached.get_or_insert(cached as u32);
        if seq.use_cache && swapped.is_none() {
            draft.stats.prefix_queries += total;
            draft.stats.prefix_hits += cached;
        }
        draft.stats.admitted += 1;
        draft.plan.admitted.push(AdmittedSeq {
            slot: SlotId(slot),
            tokens: seq.tokens.whole().to_vec(),
            num_prompt: seq.num_prompt,
            num_computed: cached as u32,
            blocks,
            index: seq.index,
            params: seq.params.clone(),
        });
        draft.push_row(key, seq, grown.table_at, len as u32, 0);
        if self.policy.wants_service() {
            self.policy.served(queue, len);
        }
        self.join_running(key);
        true
    }

    pub(super) fn take_slot(&mut self) -> u32 {
        self.free_slots
            .pop()
            .expect("the number of free slots was checked before")
    }

    /// `done` from which on the first block is out of the window: position `done` is the next to
    /// be computed and sees `window` positions, its own included.
    pub(super) fn first_reclaim(&self) -> u32 {
        match self.config.sliding_window {
            Some(window) => window.saturating_add(self.block_size).saturating_sub(1),
            None => u32::MAX,
        }
    }
}
