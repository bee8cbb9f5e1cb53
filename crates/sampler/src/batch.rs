//! Sampling a batch: state by slot, rows in parallel.

use std::sync::Arc;
use std::thread;

use crate::error::{AdmitError, SampleError};
use crate::logprobs::TokenLogprobs;
use crate::params::SamplingParams;
use crate::row::RowSampler;
use crate::slots::Slots;
use crate::state::SeqState;

/// The outcome for one row.
#[derive(Clone, Debug, PartialEq)]
pub struct SampleResult {
    /// The sampled token; of no meaning if `error` is set.
    pub token: u32,
    /// Log-probabilities, if the parameters ask for them.
    pub logprobs: Option<TokenLogprobs>,
    /// This row could not be sampled and its sequence was not extended.
    pub error: Option<SampleError>,
}

impl From<Result<(u32, Option<TokenLogprobs>), SampleError>> for SampleResult {
    fn from(outcome: Result<(u32, Option<TokenLogprobs>), SampleError>) -> Self {
        match outcome {
            Ok((token, logprobs)) => Self {
                token,
                logprobs,
                error: None,
            },
            Err(error) => Self {
                token: 0,
                logprobs: None,
                error: Some(error),
            },
        }
    }
}

/// Samples batches of rows on the CPU. Sequences live in slots, `0..` as dense as possible; a
/// call names the slot of each row.
///
/// ```
/// use std::sync::Arc;
/// use sampler::{BatchSampler, SamplingParams};
///
/// let mut sampler = BatchSampler::new(4);
/// let prompt = [1, 2];
/// sampler.admit(0, Arc::new(SamplingParams::greedy()), 0, &prompt, prompt.len(), &[3]).unwrap();
/// let results = sampler.sample(&[0.1, 0.9, 0.3, 0.2], &[0]);
/// assert_eq!((results[0].token, &results[0].error), (1, &None));
/// sampler.release(0);
/// ```
#[derive(Debug)]
pub struct BatchSampler {
    slots: Slots,
    /// One a thread; the first belongs to the calling thread.
    workers: Vec<RowSampler>,
}

/// About how many nanoseconds a thread must save to be worth its start.
const THREAD_PAYS_NS: usize = 150_000;

impl BatchSampler {
    /// A sampler for rows of `vocab_size` logits that uses as many threads as the machine has
    /// cores, when there is enough to do.
    pub fn new(vocab_size: usize) -> Self {
        Self::with_threads(
            vocab_size,
            thread::available_parallelism().map_or(1, usize::from),
        )
    }

    /// As [`BatchSampler::new`], with at most `threads` threads (at least one).
    pub fn with_threads(vocab_size: usize, threads: usize) -> Self {
        let workers = (0..threads.max(1)).map(|_| RowSampler::default()).collect();
        Self {
            slots: Slots::new(vocab_size),
            workers,
        }
    }

    /// Puts a sequence into a free slot; see [`SeqState::new`] for the arguments.
    pub fn admit(
        &mut self,
        slot: u32,
        params: Arc<SamplingParams>,
        seed: u64,
        tokens: &[u32],
        num_prompt: usize,
        stop_ids_for_min_tokens: &[u32],
    ) -> Result<(), AdmitError> {
        self.slots.admit(
            slot,
            params,
            seed,
            tokens,
            num_prompt,
            stop_ids_for_min_tokens,
        )
    }

    /// Frees a slot. Freeing a free one does nothing.
    pub fn release(&mut self, slot: u32) {
        self.slots.release(slot);
    }

    /// The state of the sequence in a slot.
    pub fn state(&self, slot: u32) -> Option<&SeqState> {
        self.slots.get(slot)
    }

    /// Samples a token for each row (`slots.len()` rows of `vocab_size` logits) and appends it
    /// to the row's sequence. A slot that comes several times is sampled as if by several calls.
    ///
    /// # Panics
    /// If `logits` does not have `slots.len()` rows.
    pub fn sample(&mut self, logits: &[f32], slots: &[u32]) -> Vec<SampleResult> {
        self.sample_masked(logits, slots, &[])
    }

    /// As [`BatchSampler::sample`], where some rows may get only some tokens: `masks` are pairs of a
    /// row and a bit set, in the order of the rows, each row at most once. Token `t` can come if bit
    /// `t % 32` of word `t / 32` is set; there is no bit beyond the end. Masks join the parameters'
    /// own `allowed_token_ids`, and like those they do not show in log-probabilities.
    ///
    /// # Panics
    /// If `logits` does not have `slots.len()` rows, or a mask is for a row that is not there.
    pub fn sample_masked(
        &mut self,
        logits: &[f32],
        slots: &[u32],
        masks: &[(usize, &[u32])],
    ) -> Vec<SampleResult> {
        let vocab_size = self.slots.vocab_size();
        assert_eq!(
            logits.len(),
            slots.len() * vocab_size,
            "expected {} rows of {vocab_size} logits",
            slots.len()
        );
        debug_assert!(
            masks.is_sorted_by(|a, b| a.0 < b.0),
            "in the order of the rows"
        );
        let mut of_row: Vec<Option<&[u32]>> = vec![None; slots.len()];
        for &(row, mask) in masks {
            of_row[row] = Some(mask);
        }
        let mut results = Vec::with_capacity(slots.len());
        while results.len() < slots.len() {
            let rest = &slots[results.len()..];
            let wave = &rest[..distinct_prefix(rest)];
            let (from, to) = (results.len(), results.len() + wave.len());
            let logits = &logits[from * vocab_size..to * vocab_size];
            let sampled = self.sample_distinct(logits, wave, &of_row[from..to]);
            for (&slot, result) in wave.iter().zip(&sampled) {
                if let (None, Some(state)) = (&result.error, self.slots.get_mut(slot)) {
                    state.append(result.token);
                }
            }
            results.extend(sampled);
        }
        results
    }

    /// Samples rows of different slots, without appending.
    fn sample_distinct(
        &mut self,
        logits: &[f32],
        slots: &[u32],
        masks: &[Option<&[u32]>],
    ) -> Vec<SampleResult> {
        let vocab_size = self.slots.vocab_size();
        let states = &self.slots;
        let greedy = |slot: &u32| {
            states
                .get(*slot)
                .is_none_or(|state| state.params().is_greedy())
        };
        // A greedy row costs about a quarter of a nanosecond a token, another one four.
        let cost = slots
            .iter()
            .map(|slot| if greedy(slot) { 1 } else { 16 })
            .sum::<usize>();
        let pays = (cost * vocab_size / 4) / THREAD_PAYS_NS;
        let threads = self.workers.len().min(slots.len()).min(pays).max(1);
        let rows: Vec<Row<'_>> = logits
            .chunks_exact(vocab_size)
            .zip(slots.iter().copied())
            .zip(masks.iter().copied())
            .collect();
        let run = |worker: &mut RowSampler, rows: &[Row<'_>]| -> Vec<SampleResult> {
            let sample = |&((row, slot), mask): &Row<'_>| match states.get(slot) {
                Some(state) => worker.sample_masked(row, state, mask).into(),
                None => Err(SampleError::EmptySlot { slot }).into(),
            };
            rows.iter().map(sample).collect()
        };
        let (own, others) = self.workers.split_first_mut().expect("at least one worker");
        let share = rows.len().div_ceil(threads).max(1);
        let (mine, theirs) = rows.split_at(share.min(rows.len()));
        thread::scope(|scope| {
            let handles: Vec<_> = others
                .iter_mut()
                .zip(theirs.chunks(share))
                .map(|(worker, rows)| scope.spawn(|| run(worker, rows)))
                .collect();
            let mut results = run(own, mine);
            for handle in handles {
                results.extend(handle.join().expect("sampling a row does not panic"));
            }
            results
        })
    }
}

/// Logits, slot and mask.
type Row<'a> = ((&'a [f32], u32), Option<&'a [u32]>);

/// Length of the longest prefix in which no slot comes twice.
pub(crate) fn distinct_prefix(slots: &[u32]) -> usize {
    let mut seen = std::collections::HashSet::with_capacity(slots.len());
    slots
        .iter()
        .position(|slot| !seen.insert(slot))
        .unwrap_or(slots.len())
}
