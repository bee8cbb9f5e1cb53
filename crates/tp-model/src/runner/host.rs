//! Runs steps with logits on the host, where they are sampled: the CPU's runner, and the GPU's for
//! what our CUDA kernels do not take (float32).

use std::sync::Arc;

use batch_scheduler::{ModelRunner, SampleRow, Sampled, StepOutput, StepPlan};
use sampler::{BatchSampler, TokenLogprobs, sequence_seed};
use tch::Tensor;

use super::{RunnerConfig, SeqParams, failed, guarded, outcome, prompt_rows, to_host};
use crate::error::{ModelError, RunnerError};
use crate::input_batch::InputBatch;
use crate::kv_cache::KvCache;
use crate::model::Model;
use crate::step_input::StepInput;

/// A model with its cache and the state of all running sequences.
///
/// [`ModelRunner::launch`] computes the step and samples; the ticket is the result.
#[derive(Debug)]
pub struct HostRunner {
    model: Model,
    config: RunnerConfig,
    cache: KvCache,
    batch: InputBatch,
    input: StepInput,
    sampler: BatchSampler,
    /// Logits on the host, reused.
    logits: Vec<f32>,
}

impl HostRunner {
    /// Allocates the cache and the slots.
    pub fn new(model: Model, config: &RunnerConfig) -> Result<Self, ModelError> {
        let shape = model.kv_shape(config.block_size);
        Ok(Self {
            cache: KvCache::new(shape, config.num_blocks, model.device())?,
            batch: InputBatch::new(config.max_num_seqs, config.num_blocks),
            input: StepInput::new(model.config(), config.block_size, model.device()),
            sampler: BatchSampler::new(model.config().vocab_size),
            logits: Vec::new(),
            config: *config,
            model,
        })
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The sizes.
    pub fn config(&self) -> &RunnerConfig {
        &self.config
    }

    /// Brings slots, block tables and cache up to the plan.
    fn apply(&mut self, plan: &mut StepPlan<Arc<SeqParams>>) -> Result<(), String> {
        for &slot in &plan.released {
            self.batch.release(slot)?;
            self.sampler.release(slot.0);
        }
        for seq in plan.admitted.drain(..) {
            let params = &seq.params;
            let admitted = self.sampler.admit(
                seq.slot.0,
                params.sampling.clone(),
                sequence_seed(params.seed, seq.index),
                &seq.tokens,
                seq.num_prompt as usize,
                &params.eos_token_ids,
            );
            let refused = admitted.err().map(|e| e.to_string());
            self.batch.admit(seq, refused)?;
        }
        let copies: Vec<(u32, u32)> = plan
            .copies
            .iter()
            .map(|copy| (copy.src.get(), copy.dst.get()))
            .collect();
        self.cache.copy_blocks(&copies)?;
        for row in &plan.rows {
            self.batch.extend(row, &plan.new_blocks)?;
        }
        Ok(())
    }

    /// Collects the flat inputs of all rows.
    fn gather(&mut self, plan: &StepPlan<Arc<SeqParams>>) -> Result<(), String> {
        if !plan.drafts.is_empty() {
            return Err("draft tokens are not supported by this runner".to_owned());
        }
        self.input.clear();
        for row in &plan.rows {
            let end = row.start as usize + row.len as usize;
            if end > self.config.max_model_len {
                let (slot, most) = (row.slot.0, self.config.max_model_len);
                return Err(format!(
                    "slot {slot} would have {end} tokens of at most {most}"
                ));
            }
            let sequence = self.batch.sequence(row, self.config.block_size)?;
            self.input.push(&sequence);
        }
        let (tokens, most) = (self.input.num_tokens(), self.config.max_num_batched_tokens);
        match tokens <= most {
            true => Ok(()),
            false => Err(format!("{tokens} tokens in a step of at most {most}")),
        }
    }

    fn step(
        &mut self,
        mut plan: StepPlan<Arc<SeqParams>>,
    ) -> Result<StepOutput<TokenLogprobs>, RunnerError> {
        let step = plan.step;
        let contradiction = |what| RunnerError::Plan { step, what };
        self.apply(&mut plan).map_err(contradiction)?;
        self.gather(&plan).map_err(contradiction)?;
        let mut output = StepOutput {
            step,
            samples: Vec::with_capacity(plan.samples.len()),
            prompt_extras: Vec::new(),
        };
        if plan.rows.is_empty() {
            return match plan.samples.is_empty() {
                true => Ok(output),
                false => Err(contradiction("samples without rows".to_owned())),
            };
        }
        let sampled = sampled_rows(&plan, self.input.row_ends()).map_err(contradiction)?;
        let wanted = prompt_rows(&plan, &self.batch).map_err(contradiction)?;

        // Rows of the hidden states: those to sample, then those of prompts' log-probabilities.
        let prompt_rows = wanted.iter().flat_map(|w| w.rows.clone());
        let rows: Vec<i64> = sampled
            .tokens
            .iter()
            .copied()
            .chain(prompt_rows.map(|row| row as i64))
            .collect();
        let device = self.model.device();
        let rows = Tensor::from_slice(&rows).to_device(device);
        let (ids, batch) = self.input.finish();
        let hidden = self
            .model
            .forward(&ids, Some(&rows), &self.cache, batch)
            .map_err(|e| RunnerError::Device {
                step,
                what: e.to_string(),
            })?;
        let count = sampled.tokens.len() as i64;
        output.samples = self.sample(&plan.samples, &sampled, &hidden.narrow(0, 0, count));
        let mut first = count;
        for want in &wanted {
            let logprobs = want.logprobs(&self.model, &hidden, first, &mut self.logits);
            output.prompt_extras.push(logprobs);
            first += want.rows.len() as i64;
        }
        Ok(output)
    }

    fn sample(
        &mut self,
        samples: &[SampleRow],
        sampled: &SampledRows,
        hidden: &Tensor,
    ) -> Vec<Sampled<TokenLogprobs>> {
        if samples.is_empty() {
            return Vec::new();
        }
        let logits = self.model.logits(hidden);
        // Slots that share a row get a copy each.
        let logits = match sampled.shared {
            true => logits.index_select(
                0,
                &Tensor::from_slice(&sampled.of_sample).to_device(logits.device()),
            ),
            false => logits,
        };
        to_host(&logits, &mut self.logits);
        let slots: Vec<u32> = samples.iter().map(|sample| sample.slot.0).collect();
        let results = self.sampler.sample(&self.logits, &slots);
        let outcomes = samples.iter().zip(results);
        outcomes
            .map(|(sample, result)| match self.batch.get_mut(sample.slot) {
                Ok(slot) => {
                    let outcome = outcome(result, slot.refused.as_deref());
                    slot.tokens.extend(&outcome.tokens);
                    outcome
                }
                Err(what) => failed(what),
            })
            .collect()
    }
}

impl ModelRunner for HostRunner {
    type Params = Arc<SeqParams>;
    type Extra = TokenLogprobs;
    type Ticket = StepOutput<TokenLogprobs>;
    type Error = RunnerError;

    fn launch(&mut self, plan: StepPlan<Self::Params>) -> Result<Self::Ticket, RunnerError> {
        let step = plan.step;
        let _no_grad = tch::no_grad_guard();
        guarded(step, || self.step(plan))
    }

    fn collect(&mut self, ticket: Self::Ticket) -> Result<Self::Ticket, RunnerError> {
        Ok(ticket)
    }
}

/// Which hidden states are sampled.
struct SampledRows {
    /// Flat index of each row's last token, for rows that are sampled at all.
    tokens: Vec<i64>,
    /// Per sample, which of `tokens`.
    of_sample: Vec<i64>,
    /// Whether `of_sample` is anything but `0, 1, 2...`.
    shared: bool,
}

fn sampled_rows<P>(plan: &StepPlan<P>, row_ends: &[i32]) -> Result<SampledRows, String> {
    let mut at_row: Vec<Option<i64>> = vec![None; plan.rows.len()];
    let mut sampled = SampledRows {
        tokens: Vec::with_capacity(plan.samples.len()),
        of_sample: Vec::with_capacity(plan.samples.len()),
        shared: false,
    };
    for (index, sample) in plan.samples.iter().enumerate() {
        let row = sample.row as usize;
        let Some(at) = at_row.get_mut(row) else {
            return Err(format!("a sample of row {row} of {}", plan.rows.len()));
        };
        let at = *at.get_or_insert_with(|| {
            sampled.tokens.push(i64::from(row_ends[row]) - 1);
            sampled.tokens.len() as i64 - 1
        });
        sampled.shared |= at != index as i64;
        sampled.of_sample.push(at);
    }
    Ok(sampled)
}
