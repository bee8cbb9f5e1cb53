//! How sequences lose their place: preempted, finished, aborted.

use paged_kv::KvAllocator;

use crate::config::PreemptionMode;
use crate::event::{Event, FinishReason, Usage};
use crate::plan::SlotId;
use crate::request::RequestId;
use crate::scheduler::Scheduler;
use crate::sequence::Status;

impl<K: KvAllocator, P: Clone> Scheduler<K, P> {
    /// Ends all sequences of a request with [`FinishReason::Aborted`]; at any time, also while
    /// steps in flight compute them. Returns whether there was such a request.
    pub fn abort<L>(&mut self, id: RequestId, events: &mut Vec<Event<L>>) -> bool {
        let Some(seqs) = self.requests.get(&id) else {
            return false;
        };
        for (_, key) in seqs.clone() {
            let seq = &mut self.seqs[key];
            let usage = seq.usage();
            let fork = std::mem::take(&mut seq.fork);
            if seq.status == Status::Running {
                self.promised_slots -= fork.len();
            }
            self.end(key, FinishReason::Aborted, events);
            for (index, _) in fork {
                self.report_end(id, index, FinishReason::Aborted, usage, events);
            }
        }
        self.sweep();
        true
    }

    /// Ends one sequence for a reason that only the caller can see (a stop string, a client that
    /// left); at any time. Tokens in flight for it are discarded. Returns whether there was such
    /// a sequence.
    pub fn finish<L>(
        &mut self,
        id: RequestId,
        index: u32,
        reason: FinishReason,
        events: &mut Vec<Event<L>>,
    ) -> bool {
        if let Some(key) = self.find(id, index) {
            if self.seqs[key].fork.is_empty() {
                self.end(key, reason, events);
                self.sweep();
            } else {
                let usage = self.seqs[key].usage();
                self.hand_over_prompt(key);
                self.report_end(id, index, reason, usage, events);
            }
            return true;
        }
        // It may be one that is yet to fork; then one sequence computes the prompt for all.
        let Some(&[(_, key)]) = self.requests.get(&id).map(|seqs| seqs.as_slice()) else {
            return false;
        };
        let seq = &mut self.seqs[key];
        let Some(at) = seq.fork.iter().position(|(i, _)| *i == index) else {
            return false;
        };
        seq.fork.remove(at);
        let usage = seq.usage();
        if seq.status == Status::Running {
            self.promised_slots -= 1;
        }
        self.report_end(id, index, reason, usage, events);
        true
    }

    /// The sequence that computes a prompt for others ends: the next of them takes over. The
    /// runner knows the slot under the old index, so it starts again (from the prefix cache).
    fn hand_over_prompt(&mut self, key: u32) {
        if self.seqs[key].status == Status::Running {
            let at = self.running.iter().position(|&k| k == key);
            self.preempt(at.expect("a running sequence is in the list"));
        }
        let seq = &mut self.seqs[key];
        let (id, queue, old) = (seq.id, seq.queue, seq.order);
        let (index, params) = seq.fork.remove(0);
        seq.index = index;
        seq.params = params;
        seq.order.index = index;
        let order = seq.order;
        if seq.status == Status::Waiting {
            let policy = self.policy.as_mut();
            self.waiting.remove(queue, old);
            let tokens = seq.tokens.len();
            self.waiting.insert(policy, queue, order, key, tokens);
        }
        if let Some(seqs) = self.requests.get_mut(&id) {
            seqs.clear();
            seqs.push((index, key));
        }
    }

    /// Ends a sequence: it takes part in nothing any more and is reported. `sweep` must follow.
    pub(super) fn end<L>(&mut self, key: u32, reason: FinishReason, events: &mut Vec<Event<L>>) {
        let seq = &mut self.seqs[key];
        let (id, index, usage) = (seq.id, seq.index, seq.usage());
        match seq.status {
            Status::Waiting => {
                self.waiting.remove(seq.queue, seq.order);
                if let Some(swapped) = seq.swapped.take() {
                    self.kv.discard(*swapped);
                }
                self.seqs.remove(key);
            }
            Status::Running => {
                seq.status = Status::Leaving;
                self.stale = true;
                self.departing += 1;
                if seq.in_flight == 0 {
                    self.idle.push(key);
                }
            }
            Status::Yielding => seq.status = Status::Leaving,
            Status::Leaving => return,
        }
        if let Some(seqs) = self.requests.get_mut(&id) {
            seqs.retain(|(_, k)| *k != key);
            if seqs.is_empty() {
                self.requests.remove(&id);
            }
        }
        self.report_end(id, index, reason, usage, events);
    }

    fn report_end<L>(
        &mut self,
        id: RequestId,
        index: u32,
        reason: FinishReason,
        usage: Usage,
        events: &mut Vec<Event<L>>,
    ) {
        self.totals.finished += 1;
        events.push(Event::Finished {
            id,
            index,
            reason,
            usage,
        });
    }

    /// Sends a running sequence back to waiting; its keys and values are given up or go to the
    /// host.
    pub(super) fn preempt(&mut self, at: usize) {
        let key = self.running.remove(at);
        let seq = &mut self.seqs[key];
        seq.status = Status::Yielding;
        seq.preemptions += 1;
        seq.drop_drafts();
        self.promised_slots -= seq.fork.len();
        self.departing += 1;
        if seq.in_flight == 0 {
            self.vacate(key);
        }
    }

    /// Drops ended sequences from the running list, all in one pass, and takes slot and blocks
    /// from those that no step in flight reads.
    pub(super) fn sweep(&mut self) {
        if std::mem::take(&mut self.stale) {
            let seqs = &self.seqs;
            self.running
                .retain(|&key| seqs[key].status == Status::Running);
        }
        while let Some(key) = self.idle.pop() {
            self.vacate(key);
        }
    }

    fn vacate(&mut self, key: u32) {
        let seq = &mut self.seqs[key];
        self.departing -= 1;
        if std::mem::take(&mut seq.announced) {
            self.released.push(SlotId(seq.slot));
        }
        self.free_slots.push(seq.slot);
        self.slot_owner[seq.slot as usize] = u32::MAX;
        if let Some(table) = seq.table.take() {
            let swap = self.config.preemption_mode == PreemptionMode::Swap
                && seq.status == Status::Yielding
                && seq.done > 0;
            let moved = match swap {
                true => self
                    .kv
                    .swap_out(table, seq.done as usize, &mut self.swap_outs),
                false => Err(table),
            };
            match moved {
                Ok(swapped) => seq.swapped = Some(Box::new(swapped)),
                Err(table) => self.kv.free(table),
            }
        }
        if seq.status == Status::Leaving {
            self.seqs.remove(key);
            return;
        }
        seq.status = Status::Waiting;
        seq.slot = u32::MAX;
        seq.computed = 0;
        seq.done = 0;
        let (queue, order, tokens) = (seq.queue, seq.order, seq.tokens.len());
        let policy = self.policy.as_mut();
        self.waiting.insert(policy, queue, order, key, tokens);
    }
}
