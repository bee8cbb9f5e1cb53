//! The sequences of a batch, by slot.

use std::sync::Arc;

use crate::error::AdmitError;
use crate::params::SamplingParams;
use crate::state::SeqState;

/// Sequence states by dense slot index.
#[derive(Debug)]
pub(crate) struct Slots {
    vocab_size: usize,
    /// Beside each state the number of its admission, counted over all slots.
    states: Vec<Option<(u64, SeqState)>>,
    admissions: u64,
}

impl Slots {
    pub fn new(vocab_size: usize) -> Self {
        assert!(vocab_size > 0, "a vocabulary has at least one token");
        Self {
            vocab_size,
            states: Vec::new(),
            admissions: 0,
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
        self.admissions += 1;
        self.states[at] = Some((self.admissions, state));
        Ok(())
    }

    pub fn release(&mut self, slot: u32) {
        if let Some(state) = self.states.get_mut(slot as usize) {
            *state = None;
        }
    }

    pub fn get(&self, slot: u32) -> Option<&SeqState> {
        self.states
            .get(slot as usize)?
            .as_ref()
            .map(|(_, state)| state)
    }

    pub fn get_mut(&mut self, slot: u32) -> Option<&mut SeqState> {
        self.states
            .get_mut(slot as usize)?
            .as_mut()
            .map(|(_, state)| state)
    }

    /// The number of the admission that a slot holds, 0 if it is free.
    #[cfg(feature = "torch")]
    pub fn admission(&self, slot: u32) -> u64 {
        let held = self.states.get(slot as usize).and_then(Option::as_ref);
        held.map_or(0, |(admission, _)| *admission)
    }
}
