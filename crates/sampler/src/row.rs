//! Sampling one row.

use crate::error::SampleError;
use crate::filter::{FilterRoom, threshold};
use crate::logprobs::{TokenLogprobs, token_logprobs};
use crate::processors;
use crate::race::race;
use crate::scan::Scan;
use crate::state::SeqState;

/// Samples rows one after the other, reusing its memory. It computes what the
/// [`oracle`](crate::oracle) defines, without visiting the vocabulary more often than needed.
#[derive(Debug, Default)]
pub struct RowSampler {
    raw: Scan,
    scan: Scan,
    processed: Vec<f32>,
    filter: FilterRoom,
}

impl RowSampler {
    /// Samples the next token of a sequence from a row of logits, and the log-probabilities if
    /// its parameters ask for them. `state` is not changed: [`SeqState::append`] the token.
    ///
    /// The row must be as long as the vocabulary that `state` was made for.
    pub fn sample(
        &mut self,
        logits: &[f32],
        state: &SeqState,
    ) -> Result<(u32, Option<TokenLogprobs>), SampleError> {
        self.sample_masked(logits, state, None)
    }

    /// As [`RowSampler::sample`]; with `mask`, only tokens whose bit is set can come, as in
    /// [`BatchSampler::sample_masked`](crate::BatchSampler::sample_masked).
    pub fn sample_masked(
        &mut self,
        logits: &[f32],
        state: &SeqState,
        mask: Option<&[u32]>,
    ) -> Result<(u32, Option<TokenLogprobs>), SampleError> {
        // The raw row is checked even if processors would hide a NaN: the model is broken.
        self.raw.run(logits)?;
        let (row, scan) = if mask.is_some() || state.changes_logits() {
            processors::apply(state, mask, logits, &mut self.processed);
            self.scan.run(&self.processed)?;
            (self.processed.as_slice(), &self.scan)
        } else {
            (logits, &self.raw)
        };
        let params = state.params();
        let token = if params.is_greedy() {
            scan.argmax(row)
        } else {
            let threshold = threshold(params, row, scan, &mut self.filter);
            let temperature = f64::from(params.effective_temperature());
            race(row, scan, threshold, temperature, &state.noise())
        };
        let logprobs = params
            .logprobs
            .map(|n| token_logprobs(logits, &self.raw, token, n));
        Ok((token, logprobs))
    }
}
