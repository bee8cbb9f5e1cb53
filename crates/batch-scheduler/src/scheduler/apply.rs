//! What a step's result means for its sequences.

use paged_kv::KvAllocator;

use crate::config::SchedulerConfig;
use crate::event::{Event, FinishReason};
use crate::plan::{Sampled, SlotId, StepOutput};
use crate::scheduler::Scheduler;
use crate::sequence::{Seq, Status};

/// The output is not of the step that is next to be applied: runner and scheduler have lost each
/// other, and nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ApplyError {
    /// Outputs are applied in the order of their plans, each once.
    #[error("output of step {got} where that of step {expected:?} was expected")]
    WrongStep {
        /// Step of the output.
        got: u64,
        /// The oldest step in flight, if any is.
        expected: Option<u64>,
    },
    /// There must be one result for each of the plan's samples.
    #[error("step {step}: {got} samples where the plan asked for {expected}")]
    SampleCount {
        /// The step.
        step: u64,
        /// Samples in the output.
        got: usize,
        /// Samples in the plan.
        expected: usize,
    },
    /// A sample may hold one token more than the drafts of its row.
    #[error("step {step}: sample {sample} has {got} tokens, at most {max} can have been accepted")]
    TooManyTokens {
        /// The step.
        step: u64,
        /// Index of the sample.
        sample: usize,
        /// Tokens in it.
        got: usize,
        /// Most there can be.
        max: usize,
    },
}

impl<K: KvAllocator, P: Clone> Scheduler<K, P> {
    /// Takes in the result of the oldest step in flight: tokens are appended, full blocks become
    /// findable, ended sequences leave, and `events` tells of it. A sequence with a sample that
    /// failed ends; the others are not affected.
    pub fn apply<L>(
        &mut self,
        output: StepOutput<L>,
        events: &mut Vec<Event<L>>,
    ) -> Result<(), ApplyError> {
        self.check_output(&output)?;
        let Some(record) = self.in_flight.pop_front() else {
            return Ok(());
        };
        for (slot, start, extras) in output.prompt_extras {
            self.report_prompt(slot, start, extras, events);
        }
        let mut output_samples = output.samples;
        let mut samples = output_samples.iter_mut();
        for row in &record.rows {
            let seq = &mut self.seqs[row.key];
            let mut healthy = seq.status != Status::Leaving;
            if healthy {
                seq.done = row.end;
                seq.speculating &= row.drafts == 0;
            }
            let mut reason = None;
            if row.sampled
                && let Some(sampled) = samples.next()
            {
                healthy &= sampled.error.is_none();
                reason = seq.take_sample(sampled, events);
            }
            if healthy && seq.done >= seq.settle_at {
                settle_blocks(&mut self.kv, &self.config, seq, self.block_size);
            }
            self.settle_step(row.key, reason, events);
        }
        // What is left are the first tokens of sequences that forked.
        let forked = record.samples.len() - samples.len();
        for (of, sampled) in record.samples[forked..].iter().zip(samples) {
            let reason = self.seqs[of.key].take_sample(sampled, events);
            self.settle_step(of.key, reason, events);
        }
        self.sweep();
        self.spares.records.push(record);
        Ok(())
    }

    fn check_output<L>(&self, output: &StepOutput<L>) -> Result<(), ApplyError> {
        let step = output.step;
        let Some(record) = self.in_flight.front().filter(|r| r.step == step) else {
            return Err(ApplyError::WrongStep {
                got: step,
                expected: self.in_flight.front().map(|r| r.step),
            });
        };
        if output.samples.len() != record.samples.len() {
            return Err(ApplyError::SampleCount {
                step,
                got: output.samples.len(),
                expected: record.samples.len(),
            });
        }
        for (i, (of, sampled)) in record.samples.iter().zip(&output.samples).enumerate() {
            let max = record.rows[of.row as usize].drafts as usize + 1;
            if sampled.tokens.len() > max {
                return Err(ApplyError::TooManyTokens {
                    step,
                    sample: i,
                    got: sampled.tokens.len(),
                    max,
                });
            }
        }
        Ok(())
    }

    /// One step less in flight names the sequence; with it may come why it ends.
    #[inline(always)]
    fn settle_step<L>(
        &mut self,
        key: u32,
        reason: Option<FinishReason>,
        events: &mut Vec<Event<L>>,
    ) {
        if let Some(reason) = reason {
            self.end(key, reason, events);
        }
        let seq = &mut self.seqs[key];
        seq.in_flight -= 1;
        if seq.in_flight == 0 && seq.status != Status::Running {
            self.idle.push(key);
        }
    }

    fn report_prompt<L>(
        &mut self,
        slot: SlotId,
        start: u32,
        mut extras: Vec<L>,
        events: &mut Vec<Event<L>>,
    ) {
        let Some(&key) = self.slot_owner.get(slot.0 as usize) else {
            return;
        };
        if key == u32::MAX {
            return;
        }
        let seq = &mut self.seqs[key];
        if seq.status == Status::Leaving {
            return;
        }
        // A preempted sequence computes its prompt again; each position is reported once.
        let known = seq.prompt_reported.saturating_sub(start) as usize;
        if known >= extras.len() {
            return;
        }
        extras.drain(..known);
        let start = start + known as u32;
        seq.prompt_reported = start + extras.len() as u32;
        events.push(Event::PromptExtras {
            id: seq.id,
            index: seq.index,
            start,
            extras,
        });
    }
}

impl<P> Seq<P> {
    /// Appends what was sampled for the sequence, up to the token that ends it. Returns why it ends,
    /// if it does.
    #[inline(always)] // a call would move the sample and the reason through memory
    fn take_sample<L>(
        &mut self,
        sampled: &mut Sampled<L>,
        events: &mut Vec<Event<L>>,
    ) -> Option<FinishReason> {
        self.sampling -= 1;
        if self.status == Status::Leaving {
            return None;
        }
        let mut reason = None;
        let mut taken = 0;
        for &token in &sampled.tokens {
            self.tokens.push(token);
            taken += 1;
            reason = self.stop_reason(token);
            if reason.is_some() {
                break;
            }
        }
        if taken > 1 {
            // Accepted drafts were computed with the row; rejected ones are overwritten.
            self.done += taken as u32 - 1;
            self.computed += taken as u32 - 1;
        }
        if taken < sampled.tokens.len() {
            sampled.tokens.truncate(taken);
            sampled.extras.truncate(taken);
        }
        let error = sampled.error.take();
        if taken == 0 {
            // Only a failed sample may come without any token.
            let silent = || "the model returned no token for this sequence".to_owned();
            return Some(FinishReason::Error(error.unwrap_or_else(silent)));
        }
        // `push` would build the event elsewhere and copy it, in case that the list cannot grow.
        events.extend(std::iter::once_with(|| Event::Tokens {
            id: self.id,
            index: self.index,
            tokens: std::mem::take(&mut sampled.tokens),
            extras: std::mem::take(&mut sampled.extras),
        }));
        reason.or(error.map(FinishReason::Error))
    }
}

/// Publishes the blocks that became full and returns those that fell out of the window.
fn settle_blocks<P>(
    kv: &mut impl KvAllocator,
    config: &SchedulerConfig,
    seq: &mut Seq<P>,
    block_size: u32,
) {
    let done = seq.done;
    let Some(table) = seq.table.as_mut() else {
        return;
    };
    let next_block = |position: u32| (position / block_size + 1).saturating_mul(block_size);
    kv.publish(table, seq.tokens.whole(), done as usize);
    seq.settle_at = next_block(done);
    let Some(window) = config.sliding_window else {
        return;
    };
    if done >= seq.reclaim_at {
        // Steps in flight compute positions from `done` on and see no further back.
        let first_needed = done + 1 - window;
        kv.reclaim_before(table, first_needed as usize);
        seq.reclaim_at = next_block(first_needed).saturating_add(window - 1);
    }
    seq.settle_at = seq.settle_at.min(seq.reclaim_at);
}
