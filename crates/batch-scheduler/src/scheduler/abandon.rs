//! A step that was planned and could not be run.

use paged_kv::KvAllocator;

use crate::request::RequestId;
use crate::scheduler::Scheduler;
use crate::sequence::Status;

impl<K: KvAllocator, P: Clone> Scheduler<K, P> {
    /// Takes back the newest plan, `step`: the runner has carried out everything in it that stands
    /// in front of its rows, and computed none of the rows. Memory that ran out is the case in mind
    /// ([`ModelRunner::is_out_of_memory`](crate::ModelRunner::is_out_of_memory)).
    ///
    /// The plan's sequences are preempted: they give up slots and blocks, and come again in front
    /// of what came later. Older steps in flight are not affected and must be applied. Planned
    /// again with the same [token budget](Self::set_token_budget) the step would most likely fail
    /// again. Returns the sequences of the plan's rows, in their order; `None`, and nothing
    /// changes, if `step` is not the newest in flight.
    pub fn abandon(&mut self, step: u64) -> Option<Vec<(RequestId, u32)>> {
        if self.in_flight.back()?.step != step {
            return None;
        }
        let record = self.in_flight.pop_back()?;
        for sample in &record.samples {
            self.seqs[sample.key].sampling -= 1;
        }
        let mut rows = Vec::with_capacity(record.rows.len());
        for row in &record.rows {
            let seq = &mut self.seqs[row.key];
            seq.speculating &= row.drafts == 0;
            rows.push((seq.id, seq.index));
            self.give_way(row.key);
        }
        // Sequences that forked in this step have a sample and no row. The prompt they share is
        // computed as far as it was before.
        for sample in &record.samples {
            let parent = record.rows[sample.row as usize].key;
            if parent != sample.key {
                self.seqs[sample.key].done = self.seqs[parent].done;
                self.give_way(sample.key);
            }
        }
        self.turned_away = None;
        self.sweep();
        self.spares.records.push(record);
        Some(rows)
    }

    /// One step less names the sequence, and it is preempted. `sweep` must follow.
    fn give_way(&mut self, key: u32) {
        let seq = &mut self.seqs[key];
        seq.in_flight -= 1;
        if seq.status == Status::Running {
            seq.status = Status::Yielding;
            seq.preemptions += 1;
            seq.drop_drafts();
            self.promised_slots -= seq.fork.len();
            self.departing += 1;
            self.totals.preemptions += 1;
            self.stale = true;
        }
        if seq.in_flight == 0 {
            self.idle.push(key);
        }
    }

    /// Most tokens that plans from now on compute: at least 1, and no more than
    /// [`max_num_batched_tokens`](crate::SchedulerConfig::max_num_batched_tokens), which it is at
    /// first. Below that, prompts are chunked even where the configuration says not to, and the
    /// last of the running sequences may have to wait for those in front of them.
    pub fn set_token_budget(&mut self, tokens: usize) {
        self.token_budget = tokens.clamp(1, self.config.max_num_batched_tokens);
    }

    /// Most tokens that the next plan computes.
    pub fn token_budget(&self) -> usize {
        self.token_budget
    }
}
