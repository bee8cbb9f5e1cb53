//! The sequences of a batch, by slot.

use std::sync::Arc;

use crate::error::AdmitError;
use crate::params::SamplingParams;
use crate::state::SeqState;

/// Sequence states by dense slot index.
#[derive(Debug)]
pub(crate) struct Slots {
    vocab_size: usize,
    states: Vec<Option<SeqState>>,
}

impl Slots {
    pub fn new(vocab_size: usize) -> Self {
        assert!(vocab_size > 0, "a vocabulary has at least one token");
        Self {
            vocab_size,
            states: Vec::new(),
        }
    }

    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    pub fn admit(
        &mut self,
        slot: u32,
        params: Arc<SamplingParams>,
        seed: u64,
        tokens: &[u32],
        num_prompt: usize,
        stop_ids: &[u32],
    ) -> Result<(), AdmitError> {
        if self.get(slot).is_some() {
            return Err(AdmitError::SlotTaken { slot });
        }
        let state = SeqState::new(params, seed, tokens, num_prompt, stop_ids, self.vocab_size)?;
        let at = slot as usize;
        if at >= self.states.len() {
            self.states.resize_with(at + 1, || None);
        }
        self.states[at] = Some(state);
        Ok(())
    }

    pub fn release(&mut self, slot: u32) {
        if let Some(state) = self.states.get_mut(slot as usize) {
            *state = None;
        }
    }

    pub fn get(&self, slot: u32) -> Option<&SeqState> {
        self.states.get(slot as usize)?.as_ref()
    }

    /// Appends a token to the sequence in a slot, if there is one.
    pub fn append(&mut self, slot: u32, token: u32) {
        if let Some(Some(state)) = self.states.get_mut(slot as usize) {
            state.append(token);
        }
    }
}
