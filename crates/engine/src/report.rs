//! What a step did, sequence by sequence: for views such as the `demo` command.

use std::collections::HashMap;
use std::sync::Arc;

use batch_scheduler::{Event, FinishReason, RequestId, SeqSnapshot, SeqState, Stats, StepPlan};
use sampler::TokenLogprobs;
use tp_model::SeqParams;

/// One of a request's sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SeqId {
    /// The request.
    pub request: RequestId,
    /// Which of its `n` sequences.
    pub index: u32,
}

/// Tokens that a step computes for a sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowReport {
    /// The sequence.
    pub seq: SeqId,
    /// Its slot in the batch.
    pub slot: u32,
    /// Position of the first token.
    pub start: u32,
    /// How many.
    pub len: u32,
    /// Tokens in its prompt.
    pub num_prompt: u32,
    /// Whether it decodes; otherwise it computes its prompt (or computes again what a preemption
    /// threw away).
    pub decode: bool,
}

/// A sequence that enters the batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdmissionReport {
    /// The sequence.
    pub seq: SeqId,
    /// The slot it takes.
    pub slot: u32,
    /// Whose place that was.
    pub replaces: Option<SeqId>,
    /// Tokens whose keys and values are there already.
    pub num_cached: u32,
}

/// What happened between two reports.
#[derive(Clone, Debug)]
pub struct StepReport {
    /// The step that was launched, if one was.
    pub step: Option<u64>,
    /// What it computes.
    pub rows: Vec<RowReport>,
    /// Sequences that enter with it.
    pub admitted: Vec<AdmissionReport>,
    /// Sequences that gave way.
    pub preempted: Vec<SeqId>,
    /// Sequences that ended.
    pub finished: Vec<(SeqId, FinishReason)>,
    /// Figures after all this.
    pub stats: Stats,
}

/// Gathers a [`StepReport`].
#[derive(Default)]
pub(crate) struct Tracer {
    /// Who had a slot last.
    last: HashMap<u32, SeqId>,
    step: Option<u64>,
    rows: Vec<RowReport>,
    admitted: Vec<AdmissionReport>,
    preempted: Vec<SeqId>,
    finished: Vec<(SeqId, FinishReason)>,
}

impl Tracer {
    /// `snapshot` is the scheduler's, after it made the plan.
    pub(crate) fn planned(&mut self, plan: &StepPlan<Arc<SeqParams>>, snapshot: &[SeqSnapshot]) {
        let seq_id = |seq: &SeqSnapshot| SeqId {
            request: seq.id,
            index: seq.index,
        };
        let in_slot: HashMap<u32, &SeqSnapshot> = snapshot
            .iter()
            .filter(|seq| seq.state != SeqState::Finished)
            .filter_map(|seq| Some((seq.slot?, seq)))
            .collect();
        self.step = Some(plan.step);
        for slot in &plan.released {
            let preempted = self.last.get(&slot.0).filter(|last| {
                snapshot
                    .iter()
                    .any(|seq| seq.state == SeqState::Preempted && seq_id(seq) == **last)
            });
            self.preempted.extend(preempted);
        }
        for admitted in &plan.admitted {
            if let Some(seq) = in_slot.get(&admitted.slot.0) {
                self.admitted.push(AdmissionReport {
                    seq: seq_id(seq),
                    slot: admitted.slot.0,
                    replaces: self.last.insert(admitted.slot.0, seq_id(seq)),
                    num_cached: admitted.num_computed,
                });
            }
        }
        for row in &plan.rows {
            if let Some(seq) = in_slot.get(&row.slot.0) {
                self.rows.push(RowReport {
                    seq: seq_id(seq),
                    slot: row.slot.0,
                    start: row.start,
                    len: row.len,
                    num_prompt: seq.num_prompt,
                    decode: row.start >= seq.num_prompt && row.len == 1,
                });
            }
        }
    }

    pub(crate) fn happened(&mut self, events: &[Event<TokenLogprobs>]) {
        for event in events {
            if let Event::Finished {
                id, index, reason, ..
            } = event
            {
                let seq = SeqId {
                    request: *id,
                    index: *index,
                };
                self.finished.push((seq, reason.clone()));
            }
        }
    }

    pub(crate) fn take(&mut self, stats: Stats) -> StepReport {
        StepReport {
            step: self.step.take(),
            rows: std::mem::take(&mut self.rows),
            admitted: std::mem::take(&mut self.admitted),
            preempted: std::mem::take(&mut self.preempted),
            finished: std::mem::take(&mut self.finished),
            stats,
        }
    }
}
