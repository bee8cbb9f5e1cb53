//! What crosses between the scheduler and whoever runs the model: plain data, never a tensor.
//!
//! A runner keeps the state of every running sequence in a *slot* (token ids, block table, sampling
//! state). A plan therefore carries only what changed since the plan before it: sequences that
//! left, sequences that arrived, blocks that were added, and which token ranges to compute now.

use std::ops::Range;

use paged_kv::{BlockCopy, BlockId, SwapIn, SwapOut, TokenId};

/// Index of a running sequence's state in the runner, `0..max_num_seqs`. Reused after release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotId(pub u32);

/// One step of work for the model. Apply the fields in the order in which they stand here.
#[derive(Clone, Debug)]
pub struct StepPlan<P> {
    /// Number of this step, counting from 0; plans are launched in this order.
    pub step: u64,
    /// Slots whose sequences finished, were aborted, preempted or given other tokens
    /// ([`Scheduler::rewrite`](crate::Scheduler::rewrite)) since the last plan.
    pub released: Vec<SlotId>,
    /// Sequences that take a slot in this step. A slot in `released` may appear here again.
    pub admitted: Vec<AdmittedSeq<P>>,
    /// Blocks to move to host memory, before any of `copies`: sequences that were preempted
    /// under [`PreemptionMode::Swap`](crate::PreemptionMode), and only then. A runner without host
    /// memory must refuse a plan in which this is not empty.
    pub swap_outs: Vec<SwapOut>,
    /// Whole-block copies to do, in this order, before any key or value of this step is written.
    pub copies: Vec<BlockCopy>,
    /// Blocks to bring back from host memory, after all of `copies` and before any key or value of
    /// this step is written.
    pub swap_ins: Vec<SwapIn>,
    /// Blocks that rows add to their block tables; rows point into this list.
    pub new_blocks: Vec<BlockId>,
    /// Draft tokens to verify; rows point into this list.
    pub drafts: Vec<TokenId>,
    /// The token ranges to compute.
    pub rows: Vec<Row>,
    /// The tokens to sample. The order is the order of [`StepOutput::samples`].
    pub samples: Vec<SampleRow>,
    /// What some of `samples` may be, in their order. The scheduler leaves this empty: a caller that
    /// constrains its sequences fills it in before the runner sees the plan, and sets
    /// [`Request::lockstep`](crate::Request::lockstep), since what may come next depends on what
    /// came last.
    pub masks: Vec<SampleMask>,
}

/// The tokens among which a sample is drawn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SampleMask {
    /// Index in [`StepPlan::samples`]; no two masks have the same.
    pub sample: u32,
    /// Bit `t % 32` of word `t / 32` is set if token `t` may come. Tokens beyond the end may not.
    pub allowed: Vec<u32>,
}

impl<P> Default for StepPlan<P> {
    /// Nothing to do, as step 0.
    fn default() -> Self {
        Self {
            step: 0,
            released: Vec::new(),
            admitted: Vec::new(),
            swap_outs: Vec::new(),
            copies: Vec::new(),
            swap_ins: Vec::new(),
            new_blocks: Vec::new(),
            drafts: Vec::new(),
            rows: Vec::new(),
            samples: Vec::new(),
            masks: Vec::new(),
        }
    }
}

/// Everything a runner must know of a sequence that enters a slot.
#[derive(Clone, Debug)]
pub struct AdmittedSeq<P> {
    /// The slot it takes.
    pub slot: SlotId,
    /// Prompt, followed by what was generated before a preemption.
    pub tokens: Vec<TokenId>,
    /// How many of `tokens` are the prompt.
    pub num_prompt: u32,
    /// How many tokens' keys and values are in `blocks` already (prefix hit, fork, or brought
    /// back by `swap_ins`).
    pub num_computed: u32,
    /// The block table; this step's row may replace the end of it.
    pub blocks: Vec<BlockId>,
    /// Which of the request's `n` sequences this is (0 for the first).
    pub index: u32,
    /// Sampling parameters: opaque to the scheduler. Clone it cheaply (an `Arc`).
    pub params: P,
}

/// A range of one sequence's tokens to run through the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The sequence's slot.
    pub slot: SlotId,
    /// Position of the first token to compute.
    pub start: u32,
    /// How many tokens to compute, drafts included (the last `drafts.len()` of them).
    pub len: u32,
    /// Where in the sequence's block table `new_blocks` go; later entries are overwritten
    /// (copy-on-write replaces the last block).
    pub table_at: u32,
    /// Range in [`StepPlan::new_blocks`].
    pub new_blocks: Range<u32>,
    /// Range in [`StepPlan::drafts`]; empty without speculation.
    pub drafts: Range<u32>,
}

/// One sampled position: `slot` samples from the logits of the last token(s) of `row`.
/// Several slots share a row when a request asked for `n` > 1 and its prompt just completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleRow {
    /// Whose parameters and seed to use, and whose token list the result extends.
    pub slot: SlotId,
    /// Index in [`StepPlan::rows`].
    pub row: u32,
}

/// What a step produced.
#[derive(Clone, Debug)]
pub struct StepOutput<L> {
    /// The plan's number.
    pub step: u64,
    /// One entry for each of [`StepPlan::samples`], in that order.
    pub samples: Vec<Sampled<L>>,
    /// Log-probabilities of prompt tokens, for slots whose parameters ask for them:
    /// `(slot, position of the first entry's token, entries)`.
    pub prompt_extras: Vec<(SlotId, u32, Vec<L>)>,
}

/// The outcome for one sampled sequence.
#[derive(Clone, Debug)]
pub struct Sampled<L> {
    /// Tokens in order: accepted drafts, then one sampled token. One token without speculation.
    /// Empty only if `error` is set.
    pub tokens: smallvec::SmallVec<[TokenId; 2]>,
    /// Per token, log-probabilities if the parameters ask for them, else empty.
    pub extras: Vec<L>,
    /// This sequence cannot go on (its logits are not finite, for instance); the others can.
    pub error: Option<String>,
}

/// One token, without log-probabilities.
impl<L> From<TokenId> for Sampled<L> {
    fn from(token: TokenId) -> Self {
        Self {
            tokens: smallvec::smallvec![token],
            extras: Vec::new(),
            error: None,
        }
    }
}
