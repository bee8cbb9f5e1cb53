//! Runs steps with logits on the host, where they are sampled: the CPU's runner, and the GPU's for
//! what our CUDA kernels do not take (float32).

mod ranks;
mod rows;

use std::sync::Arc;

use batch_scheduler::{AdmittedSeq, ModelRunner, Sampled, SlotId, StepOutput, StepPlan};
use paged_kv::TokenId;
use sampler::{BatchSampler, TokenLogprobs, sequence_seed};
use tch::Tensor;

use self::rows::{SampledRows, sampled_rows};
use super::prompt_logprobs::PromptRows;
use super::tell::{refusal, tell, tell_failure};
use super::{
    RunnerConfig, SeqParams, failed, guarded, guarded_rows, guarded_together, outcome, prompt_rows,
    to_host,
};
use crate::comm::CommError;
use crate::distributed::Followers;
use crate::error::{ModelError, RunnerError};
use crate::input_batch::InputBatch;
use crate::kv_cache::KvCache;
use crate::model::Model;
use crate::step_input::StepInput;

/// A model with its cache and the state of all running sequences.
///
/// [`ModelRunner::launch`] computes the step and samples; the ticket is the result. If a later
/// pipeline stage samples, [`ModelRunner::launch`] computes this rank's layers, and
/// [`ModelRunner::collect`] waits for the result.
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

    /// Brings slots, block tables, cache and sampler up to the plan. Sequences in `refused` cannot be
    /// sampled: rank 0 has looked.
    fn apply(
        &mut self,
        plan: &mut StepPlan<Arc<SeqParams>>,
        refused: &[SlotId],
    ) -> Result<(), String> {
        for slot in &plan.released {
            self.sampler.release(slot.0);
        }
        self.apply_tables(plan, |sampler, seq| {
            if refused.contains(&seq.slot) {
                return Some("rank 0 refused it".to_owned());
            }
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

    /// As [`HostRunner::apply`], on a rank that does not sample: `refused` says why a sequence cannot
    /// be sampled.
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

    fn step(&mut self, mut plan: StepPlan<Arc<SeqParams>>) -> Result<HostTicket, RunnerError> {
        let step = plan.step;
        let contradiction = |what| RunnerError::Plan { step, what };
        let told = self.followers.is_some().then(|| plan.clone());
        if self.model.has_logits() {
            self.apply(&mut plan, &[])
        } else {
            let vocab = self.model.config().vocab_size;
            self.apply_tables(&mut plan, |_, seq| refusal(seq, vocab))
        }
        .map_err(contradiction)?;
        self.gather(&plan).map_err(contradiction)?;
        if let (Some(followers), Some(told)) = (&self.followers, told) {
            let sampled = std::mem::take(&mut self.untold);
            tell(
                followers,
                &self.batch,
                told,
                sampled,
                !self.model.has_logits(),
            )
            .map_err(|source| RunnerError::Comm { step, source })?;
        }
        // The other ranks are in the middle of the step by then.
        match self.followers.is_some() {
            true => guarded_together(step, || self.rows(&plan)),
            false => guarded_rows(step, || self.rows(&plan)),
        }
    }

    /// Computes the rows that were gathered, and samples them if this rank does.
    fn rows(&mut self, plan: &StepPlan<Arc<SeqParams>>) -> Result<HostTicket, RunnerError> {
        let step = plan.step;
        Ok(match self.run(plan)? {
            None => HostTicket::Done(StepOutput {
                step,
                samples: Vec::new(),
                prompt_extras: Vec::new(),
            }),
            Some(Run { hidden: None, .. }) => HostTicket::Elsewhere {
                step,
                slots: plan.samples.iter().map(|sample| sample.slot).collect(),
            },
            Some(run) => {
                let output = self.output(plan, &run);
                let output = output.map_err(|source| RunnerError::Comm { step, source })?;
                self.learn(plan.samples.iter().map(|sample| sample.slot), &output);
                HostTicket::Done(output)
            }
        })
    }

    /// Appends what was sampled to its sequences, and remembers to tell the others.
    fn learn(&mut self, slots: impl Iterator<Item = SlotId>, output: &StepOutput<TokenLogprobs>) {
        let leads = self.followers.is_some();
        for (slot, sampled) in slots.zip(&output.samples) {
            // A slot that holds nothing was reported with its sample.
            if let Ok(sequence) = self.batch.get_mut(slot) {
                sequence.tokens.extend(&sampled.tokens);
                if leads {
                    let told = sampled.tokens.iter().map(|token| (slot, *token));
                    self.untold.extend(told);
                }
            }
        }
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

    /// Samples, and looks up log-probabilities of prompts. Every rank of the last stage calls this
    /// for its part of the logits; those that do not get them return nothing of value.
    fn output(
        &mut self,
        plan: &StepPlan<Arc<SeqParams>>,
        run: &Run,
    ) -> Result<StepOutput<TokenLogprobs>, CommError> {
        let mut output = StepOutput {
            step: plan.step,
            samples: Vec::new(),
            prompt_extras: Vec::new(),
        };
        let Some(hidden) = &run.hidden else {
            return Ok(output);
        };
        let mut first = run.sampled.tokens.len() as i64;
        if !plan.samples.is_empty()
            && let Some(logits) = self.model.logits(&hidden.narrow(0, 0, first))?
        {
            output.samples = self.sample(plan, &run.sampled, logits)?;
        }
        for want in &run.wanted {
            let logprobs = want.logprobs(
                &self.model,
                hidden,
                first,
                self.followers.as_ref(),
                &mut self.logits,
            );
            output.prompt_extras.push(logprobs?);
            first += want.rows.len() as i64;
        }
        Ok(output)
    }

    fn sample(
        &mut self,
        plan: &StepPlan<Arc<SeqParams>>,
        sampled: &SampledRows,
        logits: Tensor,
    ) -> Result<Vec<Sampled<TokenLogprobs>>, CommError> {
        // Slots that share a row get a copy each.
        let logits = match sampled.shared {
            true => logits.index_select(
                0,
                &Tensor::from_slice(&sampled.of_sample).to_device(logits.device()),
            ),
            false => logits,
        };
        to_host(&logits, self.followers.as_ref(), &mut self.logits)?;
        let slots: Vec<u32> = plan.samples.iter().map(|sample| sample.slot.0).collect();
        let masks = plan.masks.iter();
        let masks: Vec<(usize, &[u32])> = masks
            .map(|mask| (mask.sample as usize, mask.allowed.as_slice()))
            .collect();
        let results = self.sampler.sample_masked(&self.logits, &slots, &masks);
        let outcomes = plan.samples.iter().zip(results);
        let outcomes = outcomes.map(|(sample, result)| match self.batch.get(sample.slot) {
            Ok(slot) => outcome(result, slot.refused.as_deref()),
            Err(what) => failed(what),
        });
        Ok(outcomes.collect())
    }
}

/// A launched step.
#[derive(Debug)]
pub enum HostTicket {
    /// It was sampled here.
    Done(StepOutput<TokenLogprobs>),
    /// Another rank samples it.
    Elsewhere {
        /// Its number.
        step: u64,
        /// Whose tokens it samples.
        slots: Vec<SlotId>,
    },
}

impl ModelRunner for HostRunner {
    type Params = Arc<SeqParams>;
    type Extra = TokenLogprobs;
    type Ticket = HostTicket;
    type Error = RunnerError;

    fn launch(&mut self, plan: StepPlan<Self::Params>) -> Result<HostTicket, RunnerError> {
        let step = plan.step;
        let _no_grad = tch::no_grad_guard();
        let result = guarded(step, || self.step(plan));
        tell_failure(self.followers.as_ref(), step, result)
    }

    fn collect(&mut self, ticket: HostTicket) -> Result<StepOutput<TokenLogprobs>, RunnerError> {
        match ticket {
            HostTicket::Done(output) => Ok(output),
            HostTicket::Elsewhere { step, slots } => {
                let result = self.receive(step, &slots);
                tell_failure(self.followers.as_ref(), step, result)
            }
        }
    }
}

/// The final hidden states of a step.
struct Run {
    /// Those to sample, then those of prompts' log-probabilities; `None` unless this is the last
    /// stage.
    hidden: Option<Tensor>,
    sampled: SampledRows,
    wanted: Vec<PromptRows>,
}
