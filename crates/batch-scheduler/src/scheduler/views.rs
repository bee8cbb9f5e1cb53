//! Figures and snapshots for metrics and views.

use paged_kv::KvAllocator;

use crate::plan::SlotId;
use crate::request::RequestId;
use crate::scheduler::Scheduler;
use crate::sequence::{Seq, Status};
use crate::stats::{SeqSnapshot, SeqState, Stats};

impl<K: KvAllocator, P: Clone> Scheduler<K, P> {
    /// Figures of now.
    pub fn stats(&self) -> Stats {
        let total = self.kv.num_blocks();
        Stats {
            running: self.running.len(),
            waiting: self.waiting.len(),
            steps_in_flight: self.in_flight.len(),
            kv_used_blocks: total - self.kv.num_available().min(total),
            kv_total_blocks: total,
            last_step: self.last_step,
            totals: self.totals,
        }
    }

    /// Every sequence: those that run in the order of service, those that wait, those that ended
    /// and are not out yet. Copies; meant for views, not for every step.
    pub fn snapshot(&self) -> Vec<SeqSnapshot> {
        let listed = self.running.iter().copied().chain(self.waiting.iter());
        let listed = listed.map(|key| &self.seqs[key]);
        let departing = self
            .seqs
            .iter()
            .filter(|seq| matches!(seq.status, Status::Yielding | Status::Leaving));
        listed.chain(departing).map(view).collect()
    }

    /// Whose slot this is: its request, which of the request's sequences, and the tokens in its
    /// prompt. Meant for the slots of the plan that was made last; copies nothing.
    pub fn occupant(&self, slot: SlotId) -> Option<(RequestId, u32, u32)> {
        let key = *self.slot_owner.get(slot.0 as usize)?;
        (key != u32::MAX).then(|| {
            let seq = &self.seqs[key];
            (seq.id, seq.index, seq.num_prompt)
        })
    }
}

fn view<P>(seq: &Seq<P>) -> SeqSnapshot {
    let state = match seq.status {
        Status::Waiting if seq.preemptions > 0 => SeqState::Preempted,
        Status::Waiting => SeqState::Waiting,
        Status::Running if seq.done + 1 < seq.tokens.len() => SeqState::Prefill,
        Status::Running if seq.tokens.len() == seq.num_prompt => SeqState::Prefill,
        Status::Running => SeqState::Running,
        Status::Yielding => SeqState::Preempted,
        Status::Leaving => SeqState::Finished,
    };
    SeqSnapshot {
        id: seq.id,
        index: seq.index,
        state,
        slot: (seq.slot != u32::MAX).then_some(seq.slot),
        num_prompt: seq.num_prompt,
        num_tokens: seq.tokens.len(),
        num_computed: seq.done,
        blocks: seq
            .table
            .as_ref()
            .map_or(Vec::new(), |t| t.blocks().to_vec()),
    }
}
