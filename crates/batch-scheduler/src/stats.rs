//! Figures for metrics and views.

use paged_kv::BlockId;

use crate::request::RequestId;

/// What one step does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepStats {
    /// The step.
    pub step: u64,
    /// Sequences with a slot after it was planned.
    pub running: usize,
    /// Sequences without, those yet to fork not counted.
    pub waiting: usize,
    /// Sequences that entered.
    pub admitted: usize,
    /// Tokens of prompts (and of preempted sequences) it computes.
    pub prefill_tokens: usize,
    /// Tokens it computes for sequences that decode, drafts included.
    pub decode_tokens: usize,
    /// Sequences preempted for it.
    pub preemptions: usize,
    /// Blocks moved to host memory before it.
    pub swapped_out_blocks: usize,
    /// Blocks brought back from host memory for it.
    pub swapped_in_blocks: usize,
    /// Tokens looked up in the prefix cache.
    pub prefix_queries: usize,
    /// Tokens found there.
    pub prefix_hits: usize,
}

/// Sums over all steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Steps planned.
    pub steps: u64,
    /// Sequences that ended, for whatever reason.
    pub finished: u64,
    /// See [`StepStats::prefill_tokens`].
    pub prefill_tokens: u64,
    /// See [`StepStats::decode_tokens`].
    pub decode_tokens: u64,
    /// See [`StepStats::preemptions`].
    pub preemptions: u64,
    /// See [`StepStats::swapped_out_blocks`].
    pub swapped_out_blocks: u64,
    /// See [`StepStats::swapped_in_blocks`].
    pub swapped_in_blocks: u64,
    /// See [`StepStats::prefix_queries`].
    pub prefix_queries: u64,
    /// See [`StepStats::prefix_hits`].
    pub prefix_hits: u64,
}

impl Totals {
    pub(crate) fn add(&mut self, step: &StepStats) {
        self.steps += 1;
        self.prefill_tokens += step.prefill_tokens as u64;
        self.decode_tokens += step.decode_tokens as u64;
        self.swapped_out_blocks += step.swapped_out_blocks as u64;
        self.swapped_in_blocks += step.swapped_in_blocks as u64;
        self.prefix_queries += step.prefix_queries as u64;
        self.prefix_hits += step.prefix_hits as u64;
    }
}

/// The state of things between two calls.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stats {
    /// Sequences with a slot.
    pub running: usize,
    /// Sequences without, those yet to fork not counted.
    pub waiting: usize,
    /// Steps planned and not yet applied.
    pub steps_in_flight: usize,
    /// Blocks that sequences hold.
    pub kv_used_blocks: usize,
    /// Blocks there are.
    pub kv_total_blocks: usize,
    /// The step planned last.
    pub last_step: StepStats,
    /// Sums over all steps.
    pub totals: Totals,
}

impl Stats {
    /// Share of the KV cache that sequences hold, 0 to 1.
    pub fn kv_usage(&self) -> f64 {
        self.kv_used_blocks as f64 / self.kv_total_blocks.max(1) as f64
    }

    /// Share of looked-up tokens that the prefix cache had, 0 to 1.
    pub fn prefix_hit_rate(&self) -> f64 {
        self.totals.prefix_hits as f64 / self.totals.prefix_queries.max(1) as f64
    }
}

/// Where a sequence stands in its life. The crate's front page has the diagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SeqState {
    /// Not admitted yet.
    Waiting,
    /// Has a slot; more than its last token is still to be computed.
    Prefill,
    /// Has a slot and decodes.
    Running,
    /// Lost its slot to a sequence with more claim; waits to be computed again.
    Preempted,
    /// Ended; keeps its blocks until the steps in flight are applied.
    Finished,
}

/// One sequence, for a view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeqSnapshot {
    /// Its request.
    pub id: RequestId,
    /// Which of the request's sequences.
    pub index: u32,
    /// Where it stands.
    pub state: SeqState,
    /// Its slot, if it has one.
    pub slot: Option<u32>,
    /// Tokens in the prompt.
    pub num_prompt: u32,
    /// Tokens known: prompt and output.
    pub num_tokens: u32,
    /// Tokens computed by the steps applied so far.
    pub num_computed: u32,
    /// Its block table.
    pub blocks: Vec<BlockId>,
}
