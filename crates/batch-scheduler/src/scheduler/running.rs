//! The running sequences' part of a step: rows, drafts, forks, and room for all of it.

use paged_kv::{Grown, KvAllocator};

use crate::plan::{AdmittedSeq, SlotId};
use crate::policy::Candidate;
use crate::scheduler::Scheduler;
use crate::scheduler::step::Draft;
use crate::sequence::{Drafts, Seq, Status};
use crate::tokens::Tokens;
use crate::waiting::Order;

impl<K: KvAllocator, P: Clone> Scheduler<K, P> {
    /// Gives every running sequence its share of the step. Returns whether all of them found
    /// room and nobody was preempted.
    pub(super) fn schedule_running(&mut self, draft: &mut Draft<P>) -> bool {
        let mut all_served = true;
        let micro_batches = self.config.micro_batches;
        let wants_service = self.policy.wants_service();
        let mut at = 0;
        while let Some(&key) = self.running.get(at) {
            at += 1;
            let seq = &mut self.seqs[key];
            let wanted = seq.wanted();
            // With its last token in flight it may be as long as it gets, or of unknown length.
            if seq.speculating
                || (seq.sampling > 0 && (seq.lockstep || micro_batches || wanted >= seq.limit))
            {
                continue;
            }
            // Whatever a prompt or drafts take, one token is left for everyone behind.
            // (A budget that was cut may not reach that far.)
            let behind = self.running.len() - at;
            let share = draft.budget.saturating_sub(behind).max(1).min(draft.budget);
            let mut len = ((wanted - seq.computed) as usize).min(share);
            if len > 1 && self.config.long_prefill_token_threshold > 0 {
                len = len.min(self.config.long_prefill_token_threshold);
            }
            if !seq.decodes() {
                len = len.min(draft.prompt_budget);
            }
            let samples = len == (wanted - seq.computed) as usize;
            if len == 0 || (samples && draft.samples_left == 0) {
                continue;
            }
            let mut drafts = usable_drafts(seq, len, share);
            let mut grown = extend(&mut self.kv, seq, len + drafts, draft);
            if grown.is_none() {
                let room = self.make_room(draft, at, key, len, drafts, &mut all_served);
                (grown, drafts) = room.map_or((None, 0), |(grown, n)| (Some(grown), n));
            }
            let Some(grown) = grown else {
                all_served = false;
                continue;
            };
            let seq = &mut self.seqs[key];
            draft.push_row(key, seq, grown.table_at, len as u32, drafts as u32);
            seq.drop_drafts();
            if wants_service {
                self.policy.served(seq.queue, len + drafts);
            }
        }
        all_served
    }

    /// Extends a table that was refused `len` tokens and so many drafts: without drafts, or by
    /// preempting sequences from `behind` on in the running list. `None`: not in this step.
    #[cold]
    fn make_room(
        &mut self,
        draft: &mut Draft<P>,
        behind: usize,
        key: u32,
        len: usize,
        mut drafts: usize,
        all_served: &mut bool,
    ) -> Option<(Grown, usize)> {
        loop {
            let seq = &mut self.seqs[key];
            if let Some(grown) = extend(&mut self.kv, seq, len + drafts, draft) {
                return Some((grown, drafts));
            }
            if drafts > 0 {
                drafts = 0;
                continue;
            }
            // Blocks are about to come back: preempting more would be a waste.
            if self.departing > 0 {
                return None;
            }
            // The last in order keeps what it has and waits: those in front will finish, or
            // preempt it when they need its blocks.
            if behind == self.running.len() {
                return None;
            }
            *all_served = false;
            let victim = self.choose_victim(behind);
            draft.stats.preemptions += 1;
            self.preempt(victim);
        }
    }

    fn choose_victim(&mut self, behind: usize) -> usize {
        self.candidates.clear();
        for &key in &self.running[behind..] {
            let seq = &self.seqs[key];
            self.candidates.push(Candidate {
                id: seq.id,
                index: seq.index,
                rank: seq.order.rank,
                arrival: seq.order.arrival,
                num_computed: seq.computed,
            });
        }
        let last = self.candidates.len() - 1;
        behind + self.policy.victim(&self.candidates).min(last)
    }

    /// Makes the other sequences of requests whose prompt this step completes. They share the
    /// prompt's blocks and sample from the row that completes it.
    pub(super) fn fork_completed(&mut self, draft: &mut Draft<P>) {
        for (parent, row) in std::mem::take(&mut draft.forking) {
            for (index, params) in std::mem::take(&mut self.seqs[parent].fork) {
                let slot = self.take_slot();
                self.promised_slots -= 1;
                let of = &mut self.seqs[parent];
                let prompt = of.num_prompt;
                let table = of
                    .table
                    .as_mut()
                    .expect("a sequence with a row has a table");
                let table = self.kv.fork(table, prompt as usize);
                let of = &self.seqs[parent];
                let tokens = of.tokens.first(of.tokens.len(), 1);
                draft.plan.admitted.push(AdmittedSeq {
                    slot: SlotId(slot),
                    tokens: tokens.clone(),
                    num_prompt: prompt,
                    num_computed: prompt,
                    blocks: table.blocks().to_vec(),
                    index,
                    params: params.clone(),
                });
                let key = self.seqs.insert(Seq {
                    status: Status::Running,
                    speculating: false,
                    lockstep: of.lockstep,
                    announced: true,
                    slot,
                    computed: prompt,
                    done: prompt,
                    settle_at: 0,
                    sampling: 0,
                    in_flight: 1,
                    limit: of.limit,
                    num_prompt: prompt,
                    reclaim_at: self.first_reclaim(),
                    tokens: Tokens::new(tokens),
                    table: Some(table),
                    swapped: None,
                    drafts: None,
                    stop_from: of.stop_from,
                    stop_sieve: of.stop_sieve,
                    stop: of.stop.clone(),
                    id: of.id,
                    index,
                    order: Order { index, ..of.order },
                    queue: of.queue,
                    salt: of.salt,
                    use_cache: of.use_cache,
                    params,
                    fork: Vec::new(),
                    cached: of.cached,
                    preemptions: 0,
                    prompt_reported: prompt,
                });
                draft.push_sample(key, &mut self.seqs[key], row);
                self.slot_owner[slot as usize] = key;
                let id = self.seqs[key].id;
                self.requests.entry(id).or_default().push((index, key));
                self.join_running(key);
            }
        }
    }
}

/// How many of a sequence's drafts go into its row of `len` tokens.
#[inline]
fn usable_drafts<P>(seq: &Seq<P>, len: usize, share: usize) -> usize {
    let Some(Drafts(drafts)) = seq.drafts.as_deref() else {
        return 0;
    };
    debug_assert!(drafts.is_empty() || seq.sampling == 0, "proposed too early");
    // A verified row adds one token more than it accepts drafts.
    let room = (seq.limit - seq.tokens.len() - 1) as usize;
    drafts.len().min(share - len).min(room)
}

/// Room for the next `len` tokens of a sequence. `None`: does not fit.
#[inline]
fn extend<P>(
    kv: &mut impl KvAllocator,
    seq: &mut Seq<P>,
    len: usize,
    draft: &mut Draft<P>,
) -> Option<Grown> {
    let from = seq.computed as usize;
    let table = seq.table.as_mut()?;
    kv.extend(table, from, from + len, &mut draft.plan.copies)
}
