//! The GPU's runner: nothing of a step passes through the host but integers.
//!
//! A step is launched without waiting for the one before it. Sampled tokens stay on the device as
//! the next step's input; their copies travel to pinned memory, where [`CudaRunner::collect`]
//! finds them. Steps in which every sequence decodes replay a CUDA graph.

mod apply;
mod copies;
mod graphs;
mod inputs;
mod masks;
mod measure;
mod ranks;
mod sampling;
mod step;

use std::collections::VecDeque;
use std::sync::Arc;

use batch_scheduler::{ModelRunner, SampleMask, SampleRow, SlotId, StepOutput, StepPlan};
use paged_kv::TokenId;
use sampler::TokenLogprobs;
use sampler::cuda::{CudaSampler, Sampling};
use tch::{Kind, Tensor};
use torch_ext::cuda::{
    DecodeWorkspace, GraphPool, Heads, HostInts, Kernels, Readback, RowLimits, StepTensors, Stream,
    Upload,
};

use self::copies::BlockCopies;
use self::graphs::{DecodeGraphs, capture_sizes};
use self::inputs::StepInts;
use self::masks::Masks;
use super::prompt_logprobs::prompt_rows;
use super::tell::{tell, tell_failure};
use super::{RunnerConfig, SeqParams, guarded, guarded_rows, guarded_together};
use crate::distributed::Followers;
use crate::error::{ModelError, RunnerError};
use crate::input_batch::InputBatch;
use crate::kv_cache::KvCache;
use crate::layers::Rotary;
use crate::model::Model;

/// Uploads that may wait for the device at a time: more than steps in flight.
const UPLOADS: usize = 4;

/// A model on a GPU with its cache and the state of all running sequences.
#[derive(Debug)]
pub(crate) struct CudaRunner {
    /// Dropped before the model: NCCL waits for graphs that hold its exchanges.
    graphs: DecodeGraphs,
    model: Model,
    config: RunnerConfig,
    kernels: Arc<Kernels>,
    /// Where everything runs.
    stream: Stream,
    cache: KvCache,
    batch: InputBatch,
    /// On the rank that has the logits.
    sampler: Option<CudaSampler>,
    ints: StepInts,
    limits: RowLimits,
    uploads: Uploads,
    heads: Heads,
    /// `[slots, width]` int32: every slot's block table.
    tables: Tensor,
    /// `[slots]` int32: the token that each slot sampled last.
    last_token: Tensor,
    tensors: StepTensors,
    /// Partial results of decode attention.
    workspace: DecodeWorkspace,
    /// Rotary angles of all positions.
    rope: (Tensor, Tensor),
    /// What the stage before gives for captured steps, `[slots, hidden]`; `None` on the first.
    input: Option<Tensor>,
    /// The other ranks, if this is rank 0 of several.
    followers: Option<Followers>,
    /// Tokens that the followers have not been told, by slot. With several stages: with one they
    /// stay on the GPUs.
    untold: Vec<(SlotId, TokenId)>,
    /// On a follower that samples: launched steps whose outputs rank 0 waits for, oldest first.
    owed: VecDeque<CudaTicket>,
    /// Free places for sampled tokens on the host.
    readbacks: Vec<Readback>,
    masks: Option<Masks>,
    copies: Option<BlockCopies>,
}

#[derive(Debug)]
struct Uploads {
    segments: Upload,
    blocks: Upload,
    rows: HostInts,
    tokens: Upload,
    samples: Upload,
    decode: Upload,
    tiles: Upload,
}

/// A step on its way.
#[derive(Debug)]
pub(crate) struct CudaTicket {
    step: u64,
    samples: Vec<SampleRow>,
    /// Whether another rank samples it.
    elsewhere: bool,
    /// What some of them may be.
    masks: Vec<SampleMask>,
    /// Where the tokens will be; `None` if nothing is sampled.
    tokens: Option<Readback>,
    sampling: Option<Sampling>,
    /// Per sample: why its sequence was refused, if it was.
    refused: Vec<Option<String>>,
    prompt_extras: Vec<(batch_scheduler::SlotId, u32, Vec<TokenLogprobs>)>,
}

fn options(error: impl std::fmt::Display) -> ModelError {
    ModelError::Options(error.to_string())
}

impl CudaRunner {
    /// Allocates cache and slots, and captures the decode graphs.
    pub(crate) fn new(
        model: Model,
        kernels: Arc<Kernels>,
        config: &RunnerConfig,
    ) -> Result<Self, ModelError> {
        let _no_grad = tch::no_grad_guard();
        let mut runner = Self::without_graphs(model, kernels, config)?;
        runner.meet_stages().map_err(options)?;
        // Largest first, so that the others find room in its memory.
        let sizes = match runner.model.enforce_eager() {
            true => Vec::new(),
            false => capture_sizes(config.max_num_seqs),
        };
        for size in sizes.into_iter().rev() {
            runner.capture_graph(size)?;
        }
        runner.graphs.graphs.reverse();
        Ok(runner)
    }

    fn without_graphs(
        model: Model,
        kernels: Arc<Kernels>,
        config: &RunnerConfig,
    ) -> Result<Self, ModelError> {
        let device = model.device();
        let tch::Device::Cuda(index) = device else {
            return Err(options(format!("{device:?} is not a GPU")));
        };
        let stream = Stream::new(index).map_err(options)?;
        stream.make_current().map_err(options)?;
        let width = config.max_model_len.div_ceil(config.block_size);
        let (slots, tokens) = (config.max_num_seqs, config.max_num_batched_tokens);
        // Rows of a step: sequences, or tokens if each is computed as if it were decoded.
        let rows = match model.deterministic() {
            true => tokens.max(slots),
            false => slots,
        };
        let zeros = |size: &[i64]| Tensor::f_zeros(size, (Kind::Int, device));
        let upload = |capacity| Upload::new(capacity, UPLOADS, index).map_err(options);
        let shape = model.kv_shape(config.block_size);
        let heads = Heads {
            heads: model.config().num_heads / model.shard().world_size,
            kv_heads: shape.num_kv_heads,
            head_dim: shape.head_dim,
        };
        let mut rotary = Rotary::new(&model.config().rope, device);
        let angles = rotary.rows(&[], &[config.max_model_len as i64 - 1]);
        Ok(Self {
            cache: KvCache::new(shape, config.num_blocks, device)?,
            heads,
            batch: InputBatch::new(slots, config.num_blocks),
            sampler: match model.has_logits() {
                true => Some(
                    CudaSampler::new(kernels.clone(), model.config().vocab_size, slots)
                        .map_err(options)?,
                ),
                false => None,
            },
            input: match model.stage().is_first() {
                true => None,
                false => Some(model.activations(slots as i64).zero_()),
            },
            followers: None,
            untold: Vec::new(),
            owed: VecDeque::new(),
            ints: StepInts::default(),
            limits: RowLimits {
                slots,
                width,
                block_size: config.block_size,
                batch: tokens.max(slots),
                uploaded: tokens,
            },
            uploads: Uploads {
                segments: upload(8 * slots)?,
                blocks: upload((4 * width).max(4 * slots))?,
                rows: HostInts::new(torch_ext::cuda::ROW_INTS * rows, UPLOADS, index)
                    .map_err(options)?,
                tokens: upload(tokens)?,
                samples: upload(3 * slots)?,
                decode: upload(rows)?,
                // A tile has at least one token; three integers each.
                tiles: upload(3 * (heads.kv_heads * tokens + 1))?,
            },
            tables: zeros(&[slots as i64, width as i64])?,
            last_token: zeros(&[slots as i64])?,
            tensors: StepTensors::new(tokens.max(slots), rows, width, &kernels)?,
            workspace: kernels
                .decode_workspace(heads, rows, config.max_model_len, model.deterministic())
                .map_err(options)?,
            rope: (angles.cos, angles.sin),
            graphs: DecodeGraphs {
                pool: GraphPool::new().map_err(options)?,
                graphs: Vec::new(),
            },
            readbacks: Vec::new(),
            masks: None,
            copies: None,
            config: *config,
            stream,
            kernels,
            model,
        })
    }

    pub(crate) fn model(&self) -> &Model {
        &self.model
    }

    pub(crate) fn config(&self) -> &RunnerConfig {
        &self.config
    }

    /// Launches a step. Sequences in `refused` cannot be sampled: rank 0 has looked.
    fn step(
        &mut self,
        mut plan: StepPlan<Arc<SeqParams>>,
        refused: &[SlotId],
    ) -> Result<CudaTicket, RunnerError> {
        let step = plan.step;
        let told = self.followers.is_some().then(|| plan.clone());
        let contradiction = |what| RunnerError::Plan { step, what };
        let device = |what| RunnerError::Device { step, what };
        self.ints.clear();
        self.apply(&mut plan, refused).map_err(contradiction)?;
        self.ints
            .gather(&plan, &self.batch, &self.config, self.model.deterministic())
            .map_err(contradiction)?;
        self.check_tokens().map_err(contradiction)?;
        let wanted = prompt_rows(&plan, &self.batch).map_err(contradiction)?;
        let mut ticket = CudaTicket {
            step,
            refused: Vec::with_capacity(plan.samples.len()),
            samples: std::mem::take(&mut plan.samples),
            elsewhere: false,
            masks: std::mem::take(&mut plan.masks),
            tokens: None,
            sampling: None,
            prompt_extras: Vec::new(),
        };
        for sample in &ticket.samples {
            let slot = self.batch.get(sample.slot).map_err(contradiction)?;
            ticket.refused.push(slot.refused.clone());
            if sample.row as usize >= plan.rows.len() {
                let what = format!("a sample of row {} of {}", sample.row, plan.rows.len());
                return Err(contradiction(what));
            }
        }
        if let (Some(followers), Some(told)) = (&self.followers, told) {
            let sampled = std::mem::take(&mut self.untold);
            let elsewhere = !self.model.has_logits();
            tell(followers, &self.batch, told, sampled, elsewhere)
                .map_err(|source| RunnerError::Comm { step, source })?;
        }
        if plan.rows.is_empty() {
            return Ok(ticket);
        }
        ticket.elsewhere = !self.model.has_logits();
        let rows = plan.rows.len();
        let alone = self.is_alone();
        let plain = wanted.is_empty()
            && ticket.samples.len() == rows
            && plan
                .rows
                .iter()
                .zip(&ticket.samples)
                .enumerate()
                .all(|(at, (row, sample))| {
                    row.len == 1 && sample.row as usize == at && sample.slot == row.slot
                });
        let run = || {
            match plain {
                true => self.decode_step(rows, &mut ticket),
                false => self.mixed_step(&wanted, &mut ticket),
            }
            .map_err(device)
        };
        let result = match alone {
            true => guarded_rows(step, run),
            // The other ranks are in the middle of the step by then.
            false => guarded_together(step, run),
        };
        if let Err(RunnerError::OutOfMemory { .. }) = result {
            // The next step is smaller: what fits no more in the pieces kept for this one may fit
            // in one piece.
            torch_ext::cuda::release_memory().map_err(|e| device(e.to_string()))?;
        }
        result.map(|()| ticket)
    }
}

impl ModelRunner for CudaRunner {
    type Params = Arc<SeqParams>;
    type Extra = TokenLogprobs;
    type Ticket = CudaTicket;
    type Error = RunnerError;

    fn launch(&mut self, plan: StepPlan<Self::Params>) -> Result<CudaTicket, RunnerError> {
        let step = plan.step;
        let _no_grad = tch::no_grad_guard();
        let result = guarded(step, || {
            // The engine may have moved to a thread of its own since the last call.
            self.stream
                .make_current()
                .map_err(|e| RunnerError::Device {
                    step,
                    what: e.to_string(),
                })?;
            self.step(plan, &[])
        });
        tell_failure(self.followers.as_ref(), step, result)
    }

    fn collect(&mut self, ticket: CudaTicket) -> Result<StepOutput<TokenLogprobs>, RunnerError> {
        let step = ticket.step;
        let result = guarded(step, || match ticket.elsewhere {
            true => self.hear(&ticket),
            false => self
                .finish(ticket)
                .map_err(|what| RunnerError::Device { step, what }),
        });
        tell_failure(self.followers.as_ref(), step, result)
    }
}
