//! Limits of the scheduler, checked once at construction.

/// Limits and switches of a [`Scheduler`](crate::Scheduler). Immutable once the scheduler stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Sequences that may hold a runner slot at once. Each of a request's `n` sequences counts.
    pub max_num_seqs: usize,
    /// Tokens a step may compute, over all sequences. At least `max_num_seqs`, so that a step can
    /// always decode everything that runs.
    pub max_num_batched_tokens: usize,
    /// Longest sequence, prompt and output together, in tokens.
    pub max_model_len: usize,
    /// Whether a prompt may be computed over several steps. Without it a prompt enters only when
    /// the rest of the step's token budget takes all of it, and `max_num_batched_tokens` must
    /// reach `max_model_len`.
    pub enable_chunked_prefill: bool,
    /// Most prompt tokens of one sequence in a step; 0 sets no limit beside the token budget.
    /// Bounds how long one long prompt can hold up the decoding of the others.
    pub long_prefill_token_threshold: usize,
    /// Tokens up to which prompts fill a step in which sequences decode, at least a twelfth of so many and fewer than a
    /// quarter; of more prompts than twelve such steps take, a step computes what is more at once. With other numbers of
    /// sequences, with 0, and without `enable_chunked_prefill`, the token budget is the only limit.
    pub mixed_step_tokens: usize,
    /// Most plans between [`schedule`](crate::Scheduler::schedule) and
    /// [`apply`](crate::Scheduler::apply): 1 is lockstep, 2 overlaps scheduling with the model.
    pub max_steps_in_flight: usize,
    /// For runners whose steps pass from one pipeline stage to the next, where the first must know
    /// a sampled token before it can go on from it: a sequence takes part in no step while a sample
    /// of it is in flight, and a step samples for its share of the sequences alone, one in
    /// `max_steps_in_flight`, so that the rest fill the steps behind it. A prompt needs no sample
    /// before its end: its chunks follow each other at once.
    pub micro_batches: bool,
    /// Width of the model's attention window in tokens, where *every* layer has one. Blocks that
    /// fell out of it are returned while the sequence runs.
    pub sliding_window: Option<u32>,
    /// Admission leaves this many blocks available to the sequences that already run, so that a
    /// newcomer is not preempted in the step after. Ignored while nothing runs.
    pub watermark_blocks: usize,
    /// What becomes of a preempted sequence's keys and values.
    pub preemption_mode: PreemptionMode,
}

/// What becomes of the keys and values of a sequence that is preempted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PreemptionMode {
    /// They are given up, and computed again when there is room (less what the prefix cache still
    /// has by then).
    #[default]
    Recompute,
    /// They are moved to host memory and back. Where the host has no room, as `Recompute`. Needs
    /// a KV allocator with host blocks, and a runner that carries out
    /// [`swap_outs`](crate::StepPlan::swap_outs) and [`swap_ins`](crate::StepPlan::swap_ins).
    Swap,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self {
            max_num_seqs: 256,
            max_num_batched_tokens: 8192,
            max_model_len: 4096,
            enable_chunked_prefill: true,
            long_prefill_token_threshold: 0,
            mixed_step_tokens: 0,
            max_steps_in_flight: 2,
            micro_batches: false,
            sliding_window: None,
            watermark_blocks: 0,
            preemption_mode: PreemptionMode::Recompute,
        }
    }
}

/// Why a [`SchedulerConfig`] cannot work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A limit that must be at least 1 is 0.
    #[error("{field} is 0; it must be at least 1")]
    Zero {
        /// Name of the field in [`SchedulerConfig`].
        field: &'static str,
    },
    /// A limit exceeds what positions and slots are stored in (`u32`).
    #[error("{field} is {value}; it must be at most {max}")]
    TooLarge {
        /// Name of the field in [`SchedulerConfig`].
        field: &'static str,
        /// What it was set to.
        value: usize,
        /// The most it may be.
        max: usize,
    },
    /// A step could not decode all running sequences.
    #[error(
        "max_num_batched_tokens ({tokens}) is smaller than max_num_seqs ({seqs}): a step could \
         not give every running sequence one token; raise the former or lower the latter"
    )]
    BudgetBelowSeqs {
        /// `max_num_batched_tokens`.
        tokens: usize,
        /// `max_num_seqs`.
        seqs: usize,
    },
    /// Without chunked prefill the longest prompt would never enter.
    #[error(
        "max_num_batched_tokens ({tokens}) is smaller than max_model_len ({len}) while chunked \
         prefill is off: longer prompts could never be scheduled; enable chunked prefill, raise \
         the former or lower the latter"
    )]
    BudgetBelowModelLen {
        /// `max_num_batched_tokens`.
        tokens: usize,
        /// `max_model_len`.
        len: usize,
    },
    /// The KV pool has no block to give.
    #[error("the KV pool has no available block; size it to at least one")]
    EmptyPool,
    /// Preemption by swap without a place to swap to.
    #[error(
        "preemption_mode is Swap, but the KV allocator has no host blocks; give it some \
         (paged_kv::Config::host_blocks) or preempt by recompute"
    )]
    NoHostBlocks,
    /// The watermark alone takes the whole pool.
    #[error(
        "watermark_blocks ({watermark}) leaves nothing of the {blocks} blocks of the KV pool; \
         lower it"
    )]
    WatermarkTooHigh {
        /// `watermark_blocks`.
        watermark: usize,
        /// Blocks in the pool.
        blocks: usize,
    },
}

impl SchedulerConfig {
    /// Checks the limits against each other and against a pool of `available_blocks` blocks.
    pub fn validate(&self, available_blocks: usize) -> Result<(), ConfigError> {
        for (field, value) in [
            ("max_num_seqs", self.max_num_seqs),
            ("max_num_batched_tokens", self.max_num_batched_tokens),
            ("max_model_len", self.max_model_len),
            ("max_steps_in_flight", self.max_steps_in_flight),
        ] {
            if value == 0 {
                return Err(ConfigError::Zero { field });
            }
            // Positions and slots travel as u32; the headroom keeps `len + drafts` in range.
            let max = (u32::MAX / 4) as usize;
            if value > max {
                return Err(ConfigError::TooLarge { field, value, max });
            }
        }
        if self.sliding_window == Some(0) {
            return Err(ConfigError::Zero {
                field: "sliding_window",
            });
        }
        if self.max_num_batched_tokens < self.max_num_seqs {
            return Err(ConfigError::BudgetBelowSeqs {
                tokens: self.max_num_batched_tokens,
                seqs: self.max_num_seqs,
            });
        }
        if !self.enable_chunked_prefill && self.max_num_batched_tokens < self.max_model_len {
            return Err(ConfigError::BudgetBelowModelLen {
                tokens: self.max_num_batched_tokens,
                len: self.max_model_len,
            });
        }
        if available_blocks == 0 {
            return Err(ConfigError::EmptyPool);
        }
        if self.watermark_blocks >= available_blocks {
            return Err(ConfigError::WatermarkTooHigh {
                watermark: self.watermark_blocks,
                blocks: available_blocks,
            });
        }
        Ok(())
    }
}
