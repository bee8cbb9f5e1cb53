//! One sequence through the paged cache, without a scheduler: for tests and for evaluation.

use tch::{Device, Kind, Tensor};

use crate::error::ModelError;
use crate::kv_cache::KvCache;
use crate::model::Model;
use crate::step_input::{SequenceInput, StepInput};

/// A sequence that grows by [`Session::forward`].
#[derive(Debug)]
pub struct Session<'a> {
    model: &'a Model,
    cache: KvCache,
    input: StepInput,
    blocks: Vec<i32>,
    num_prompt: usize,
    len: usize,
    capacity: usize,
}

impl Model {
    /// A sequence with room for `capacity` tokens in blocks of `block_size`. `num_prompt`, the
    /// length of the prompt, matters to dynamic NTK alone, whose frequencies depend on it.
    pub fn session(
        &self,
        num_prompt: usize,
        capacity: usize,
        block_size: usize,
    ) -> Result<Session<'_>, ModelError> {
        let num_blocks = capacity.div_ceil(block_size.max(1)).max(1);
        let cache = KvCache::new(self.kv_shape(block_size), num_blocks, self.device())?;
        Ok(Session {
            model: self,
            cache,
            input: StepInput::new(self.config(), block_size, self.device()),
            // Backwards, so that a block table that is not followed does not go unnoticed.
            blocks: (0..num_blocks as i32).rev().collect(),
            num_prompt,
            len: 0,
            capacity,
        })
    }

    /// Logits of every token, float32 `[tokens, vocab]` on the CPU, computed `chunk` tokens at a
    /// time.
    pub fn forward_logits(&self, tokens: &[u32], chunk: usize) -> Result<Tensor, ModelError> {
        let mut session = self.session(tokens.len(), tokens.len(), 16)?;
        let logits = tokens
            .chunks(chunk.max(1))
            .map(|chunk| session.forward(chunk))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Tensor::cat(&logits, 0))
    }

    /// The `n` most likely tokens after `prompt`, one after the other, whatever they are.
    pub fn generate_greedy(
        &self,
        prompt: &[u32],
        n: usize,
        block_size: usize,
    ) -> Result<Vec<u32>, ModelError> {
        let mut session = self.session(prompt.len(), prompt.len() + n, block_size)?;
        let mut next = prompt.to_vec();
        let mut generated = Vec::with_capacity(n);
        while generated.len() < n {
            let logits = session.forward(&next)?;
            let token = logits.get(-1).argmax(0, false).int64_value(&[]) as u32;
            generated.push(token);
            next = vec![token];
        }
        Ok(generated)
    }
}

impl Session<'_> {
    /// Runs the next tokens of the sequence; their logits, float32 `[tokens, vocab]` on the CPU.
    /// Every rank of a divided model calls this with the same tokens; those without logits
    /// ([`Model::has_logits`]) get no rows.
    pub fn forward(&mut self, tokens: &[u32]) -> Result<Tensor, ModelError> {
        let _no_grad = tch::no_grad_guard();
        let vocab = self.model.config().vocab_size;
        if let Some(id) = tokens.iter().find(|id| **id as usize >= vocab) {
            return Err(ModelError::Options(format!(
                "token id {id} is not below the vocabulary size ({vocab})"
            )));
        }
        let (have, more, room) = (self.len, tokens.len(), self.capacity);
        if more == 0 || have + more > room {
            return Err(ModelError::Options(format!(
                "expected between 1 and {} more tokens, got {more}",
                room - have
            )));
        }
        self.input.clear();
        self.input.push(&SequenceInput {
            tokens,
            start: self.len,
            num_prompt: self.num_prompt,
            blocks: &self.blocks,
        });
        let device = self.model.device();
        let rows = Tensor::arange(more as i64, (Kind::Int64, device));
        let (ids, batch) = self.input.finish();
        let hidden = self.model.forward(&ids, Some(&rows), &self.cache, batch)?;
        self.len += more;
        let logits = match hidden {
            Some(hidden) => self.model.logits(&hidden)?,
            None => None,
        };
        Ok(logits.map_or_else(
            || Tensor::zeros([0, vocab as i64], (Kind::Float, Device::Cpu)),
            |logits| logits.to_device(Device::Cpu),
        ))
    }
}
