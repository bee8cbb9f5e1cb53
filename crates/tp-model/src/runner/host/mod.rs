//! Runs steps with logits on the host, where they are sampled: the CPU's runner, and the GPU's for
//! what our CUDA kernels do not take (float32).

use std::sync::Arc;

use batch_scheduler::{AdmittedSeq, ModelRunner, SampleRow, Sampled, SlotId, StepOutput, StepPlan};
use paged_kv::TokenId;
use sampler::{BatchSampler, TokenLogprobs, sequence_seed};
use tch::Tensor;

use super::prompt_logprobs::PromptRows;
use super::{
    RunnerConfig, SeqParams, failed, guarded, guarded_rows, outcome, prompt_rows, to_host,
};
use crate::comm::CommError;
use crate::distributed::{Followers, StepMessage};
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
    /// The other ranks, if this is rank 0 of several.
    followers: Option<Followers>,
    /// Tokens that the followers have not been told, by slot.
    untold: Vec<(SlotId, TokenId)>,
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
            followers: None,
            untold: Vec::new(),
        })
    }

    /// Makes this the runner of rank 0, which `followers` do as.
    pub(crate) fn lead(&mut self, followers: Followers) {
        self.followers = Some(followers);
    }

    /// The ranks that follow this one, if any do.
    pub(crate) fn followers(&self) -> Option<&Followers> {
        self.followers.as_ref()
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
        for slot in &plan.released {
            self.sampler.release(slot.0);
        }
        self.apply_tables(plan, |sampler, seq| {
            let params = &seq.params;
            let admitted = sampler.admit(
                seq.slot.0,
                params.sampling.clone(),
                sequence_seed(params.seed, seq.index),
                &seq.tokens,
                seq.num_prompt as usize,
                &params.eos_token_ids,
            );
            admitted.err().map(|e| e.to_string())
        })
    }

    /// As [`HostRunner::apply`], but for the sampler: `refused` says why a sequence cannot be
    /// sampled.
    fn apply_tables(
        &mut self,
        plan: &mut StepPlan<Arc<SeqParams>>,
        mut refused: impl FnMut(&mut BatchSampler, &AdmittedSeq<Arc<SeqParams>>) -> Option<String>,
    ) -> Result<(), String> {
        for &slot in &plan.released {
            self.batch.release(slot)?;
        }
        for seq in plan.admitted.drain(..) {
            let refused = refused(&mut self.sampler, &seq);
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
        let message = self.followers.is_some().then(|| StepMessage {
            sampled: std::mem::take(&mut self.untold),
            refused: Vec::new(),
            plan: plan.clone(),
        });
        self.apply(&mut plan).map_err(contradiction)?;
        self.gather(&plan).map_err(contradiction)?;
        if let Some(message) = message {
            self.tell(message)
                .map_err(|source| RunnerError::Comm { step, source })?;
        }
        // The other ranks are in the middle of the step by then.
        match self.followers.is_some() {
            true => self.rows(&plan),
            false => guarded_rows(step, || self.rows(&plan)),
        }
    }

    /// Computes and samples the rows that were gathered.
    fn rows(
        &mut self,
        plan: &StepPlan<Arc<SeqParams>>,
    ) -> Result<StepOutput<TokenLogprobs>, RunnerError> {
        let step = plan.step;
        let mut output = StepOutput {
            step,
            samples: Vec::with_capacity(plan.samples.len()),
            prompt_extras: Vec::new(),
        };
        let Some(run) = self.run(plan)? else {
            return Ok(output);
        };
        let failed = |source| RunnerError::Comm { step, source };
        output.samples = self.sample(&plan.samples, &run).map_err(failed)?;
        let mut first = run.count();
        for want in &run.wanted {
            let logprobs = want.logprobs(&self.model, &run.hidden, first, &mut self.logits);
            output.prompt_extras.push(logprobs.map_err(failed)?);
            first += want.rows.len() as i64;
        }
        Ok(output)
    }

    /// Gives the other ranks their part of a step.
    fn tell(&self, mut message: StepMessage) -> Result<(), CommError> {
        let Some(followers) = &self.followers else {
            return Ok(());
        };
        let admitted = message.plan.admitted.iter().map(|seq| seq.slot);
        let refused = |slot: &SlotId| self.batch.get(*slot).is_ok_and(|s| s.refused.is_some());
        message.refused = admitted.filter(refused).collect();
        followers.send(message.encode())
    }

    /// Takes part in a step that rank 0 tells of: this rank's share of the model, and no sampling.
    pub(crate) fn follow(&mut self, message: &[u8]) -> Result<(), RunnerError> {
        let _no_grad = tch::no_grad_guard();
        let unreadable = |what| RunnerError::Plan { step: 0, what };
        let message = StepMessage::decode(message).map_err(unreadable)?;
        let mut plan = message.plan;
        let step = plan.step;
        let contradiction = |what| RunnerError::Plan { step, what };
        for (slot, token) in message.sampled {
            let slot = self.batch.get_mut(slot).map_err(contradiction)?;
            slot.tokens.push(token);
        }
        self.apply_tables(&mut plan, |_, seq| {
            let refused = message.refused.contains(&seq.slot);
            refused.then(|| "rank 0 refused it".to_owned())
        })
        .map_err(contradiction)?;
        self.gather(&plan).map_err(contradiction)?;
        let Some(run) = self.run(&plan)? else {
            return Ok(());
        };
        let failed = |source| RunnerError::Comm { step, source };
        if !plan.samples.is_empty() {
            let logits = self.model.logits(&run.sampled_hidden());
            logits.map_err(failed)?;
        }
        let mut first = run.count();
        for want in &run.wanted {
            let none = want.logprobs(&self.model, &run.hidden, first, &mut self.logits);
            none.map_err(failed)?;
            first += want.rows.len() as i64;
        }
        Ok(())
    }

    /// Computes what was gathered; `None` if that is nothing.
    fn run(&mut self, plan: &StepPlan<Arc<SeqParams>>) -> Result<Option<Run>, RunnerError> {
        let step = plan.step;
        let contradiction = |what| RunnerError::Plan { step, what };
        if plan.rows.is_empty() {
            return match plan.samples.is_empty() {
                true => Ok(None),
                false => Err(contradiction("samples without rows".to_owned())),
            };
        }
        let sampled = sampled_rows(plan, self.input.row_ends()).map_err(contradiction)?;
        let wanted = prompt_rows(plan, &self.batch).map_err(contradiction)?;

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
        let hidden = self.model.forward(&ids, Some(&rows), &self.cache, batch);
        Ok(Some(Run {
            hidden: hidden.map_err(|source| RunnerError::Comm { step, source })?,
            sampled,
            wanted,
        }))
    }

    fn sample(
        &mut self,
        samples: &[SampleRow],
        run: &Run,
    ) -> Result<Vec<Sampled<TokenLogprobs>>, CommError> {
        if samples.is_empty() {
            return Ok(Vec::new());
        }
        let logits = self.model.logits(&run.sampled_hidden())?;
        let logits = logits.ok_or_else(|| CommError {
            rank: self.model.shard().rank,
            world_size: self.model.shard().world_size,
            what: "was told to sample, which rank 0 does".to_owned(),
        })?;
        let sampled = &run.sampled;
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
        let leads = self.followers.is_some();
        let outcomes = outcomes.map(|(sample, result)| match self.batch.get_mut(sample.slot) {
            Ok(slot) => {
                let outcome = outcome(result, slot.refused.as_deref());
                slot.tokens.extend(&outcome.tokens);
                if leads {
                    let told = outcome.tokens.iter().map(|token| (sample.slot, *token));
                    self.untold.extend(told);
                }
                outcome
            }
            Err(what) => failed(what),
        });
        Ok(outcomes.collect())
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
        let result = guarded(step, || self.step(plan));
        if let (Err(error), Some(followers)) = (&result, &self.followers) {
            // If a follower failed first, that is known already.
            followers.fail(error.to_string());
        }
        result
    }

    fn collect(&mut self, ticket: Self::Ticket) -> Result<Self::Ticket, RunnerError> {
        Ok(ticket)
    }
}

/// The final hidden states of a step.
struct Run {
    /// Those to sample, then those of prompts' log-probabilities.
    hidden: Tensor,
    sampled: SampledRows,
    wanted: Vec<PromptRows>,
}

impl Run {
    /// How many are sampled.
    fn count(&self) -> i64 {
        self.sampled.tokens.len() as i64
    }

    fn sampled_hidden(&self) -> Tensor {
        self.hidden.narrow(0, 0, self.count())
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
