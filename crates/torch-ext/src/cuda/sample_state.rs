//! What the sampling kernels know of sequences, by slot.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use super::kernels::{Arg, Kernels, Launch};
use super::sample::{MAX_VOCAB, UPDATE, UPDATE_DEFINES, torch};
use super::stream::Upload;
use crate::Error;

/// Sizes that `sample.cuh` has too.
const THREADS: u32 = 512;
const SLOT_INTS: usize = 32;
const AUX: usize = 1024;
const TAIL: usize = 64;
const ROWS_IN_BLOCK: usize = 16;
/// Head of a change in `sample_update.cu`.
const CHANGE_INTS: usize = 16;
/// Uploads that may wait for the device at a time.
const UPLOADS: usize = 4;
const OP: &str = "sample_admit";

/// The parameters of a sequence, as the kernels take them. Crate `sampler` says what they mean.
#[derive(Clone, Debug)]
pub struct SampleSlot<'a> {
    /// Seed of the noise.
    pub seed: u64,
    /// 0 for greedy.
    pub temperature: f32,
    /// Below 1: off.
    pub top_k: i32,
    /// 1: off.
    pub top_p: f32,
    /// 0: off.
    pub min_p: f32,
    /// 1: off.
    pub repetition_penalty: f32,
    /// 0: off.
    pub frequency_penalty: f32,
    /// 0: off.
    pub presence_penalty: f32,
    /// If set, only these tokens can come.
    pub allowed: Option<&'a [u32]>,
    /// Added to logits.
    pub bias: &'a [(u32, f32)],
    /// Tokens that never come.
    pub banned: &'a [u32],
    /// Tokens that do not come before `min_tokens` were generated.
    pub stops: &'a [u32],
    /// See `stops`.
    pub min_tokens: u32,
    /// The last token of each does not come after the others.
    pub bad_words: &'a [Vec<u32>],
    /// How many log-probabilities are asked for.
    pub logprobs: Option<u32>,
    /// The sequence so far.
    pub tokens: &'a [u32],
    /// How many of them are the prompt.
    pub num_prompt: usize,
}

/// Rows of the vocabulary's size that a slot holds.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    counts: Option<u32>,
    bias: Option<u32>,
}

/// Sequences by slot, on the device. Changes are collected on the host until
/// [`SampleState::flush`].
#[derive(Debug)]
pub struct SampleState {
    device: Device,
    index: usize,
    vocab_size: usize,
    held: Vec<Held>,
    /// `[max_slots, 32]` int32.
    slots: Tensor,
    /// `[max_slots, AUX]` int32: stop tokens and bad words.
    aux: Tensor,
    /// `[max_slots, TAIL]` int32: last tokens.
    tail: Tensor,
    /// int64: addresses of `dense`. Kernels read it when they run, so it may grow under a graph.
    blocks: Tensor,
    /// `[max_slots]` int32, zero between calls.
    counters: Tensor,
    /// `[ROWS_IN_BLOCK, vocab]` int32 each: counts and biases of slots that have some.
    dense: Vec<Tensor>,
    /// Rows that were ever handed out (two a slot at most), and those that came back.
    rows: u32,
    free: Vec<u32>,
    changes: BTreeMap<u32, Vec<i32>>,
    upload: Option<Upload>,
}

impl SampleState {
    /// Room for `max_slots` sequences over a vocabulary, and for batches of as many rows. Slots
    /// with penalties or with bias, allowed or banned tokens take `4 vocab_size` bytes more for
    /// each of the two, when they come.
    pub fn new(kernels: &Kernels, vocab_size: usize, max_slots: usize) -> Result<Self, Error> {
        let wrong = |operand, expected, found: usize| Error::Argument {
            op: "sample_state",
            operand,
            expected,
            found: found.to_string(),
        };
        if vocab_size == 0 || vocab_size > MAX_VOCAB {
            let expected = format!("1 to {MAX_VOCAB}");
            return Err(wrong("vocab_size", expected, vocab_size));
        }
        if max_slots == 0 || max_slots > 65_535 {
            return Err(wrong("max_slots", "1 to 65535".into(), max_slots));
        }
        let device = kernels.device();
        let Device::Cuda(index) = device else {
            unreachable!("kernels have a CUDA device");
        };
        let zeros = |len: usize, kind| Tensor::f_zeros([len as i64], (kind, device)).map_err(torch);
        Ok(Self {
            device,
            index,
            vocab_size,
            held: vec![Held::default(); max_slots],
            slots: zeros(max_slots * SLOT_INTS, Kind::Int)?,
            aux: zeros(max_slots * AUX, Kind::Int)?,
            tail: zeros(max_slots * TAIL, Kind::Int)?,
            blocks: zeros((2 * max_slots).div_ceil(ROWS_IN_BLOCK), Kind::Int64)?,
            counters: zeros(max_slots, Kind::Int)?,
            dense: Vec::new(),
            rows: 0,
            free: Vec::new(),
            changes: BTreeMap::new(),
            upload: None,
        })
    }

    /// Tokens in the vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Slots.
    pub fn max_slots(&self) -> usize {
        self.held.len()
    }

    pub(super) fn max_rows(&self) -> usize {
        self.held.len()
    }

    pub(super) fn device(&self) -> Device {
        self.device
    }

    pub(super) fn counters(&self) -> &Tensor {
        &self.counters
    }

    pub(super) fn tables(&self) -> [&Tensor; 4] {
        [&self.slots, &self.aux, &self.tail, &self.blocks]
    }

    /// Puts a sequence into a slot, in place of what it held.
    ///
    /// # Errors
    /// A slot or token out of range, or more stop tokens and bad words than a slot has room for
    /// (1,024 integers in all; bad words have at most 64 tokens). Nothing has changed then.
    pub fn admit(&mut self, slot: u32, sequence: &SampleSlot<'_>) -> Result<(), Error> {
        self.check(slot, sequence)?;
        self.release(slot);
        let penalties = sequence.repetition_penalty != 1.0
            || sequence.frequency_penalty != 0.0
            || sequence.presence_penalty != 0.0;
        let edits = sequence.allowed.is_some()
            || !sequence.bias.is_empty()
            || !sequence.banned.is_empty()
            || sequence.bad_words.iter().any(|word| word.len() == 1);
        let mut row = |wanted: bool| wanted.then(|| self.take_row());
        let held = Held {
            counts: row(penalties),
            bias: row(edits),
        };
        self.held[slot as usize] = held;
        self.changes.insert(slot, pack(slot, sequence, held));
        Ok(())
    }

    /// Frees a slot. Freeing a free one does nothing.
    pub fn release(&mut self, slot: u32) {
        let Some(held) = self.held.get_mut(slot as usize) else {
            return;
        };
        let held = std::mem::take(held);
        self.free.extend(held.counts.into_iter().chain(held.bias));
        self.changes.insert(slot, vec![slot as i32, 0]);
    }

    /// A free row of the vocabulary's size; its memory may come with the next flush.
    fn take_row(&mut self) -> u32 {
        if let Some(row) = self.free.pop() {
            return row;
        }
        self.rows += 1;
        self.rows - 1
    }

    fn check(&self, slot: u32, sequence: &SampleSlot<'_>) -> Result<(), Error> {
        let wrong = |operand, expected: String, found: String| Error::Argument {
            op: OP,
            operand,
            expected,
            found,
        };
        let slots = self.max_slots();
        if slot as usize >= slots {
            return Err(wrong("slot", format!("below {slots}"), slot.to_string()));
        }
        let bias: Vec<u32> = sequence.bias.iter().map(|entry| entry.0).collect();
        let words = sequence.bad_words.iter().flatten();
        let lists: [(&'static str, Option<u32>); 6] = [
            ("tokens", sequence.tokens.iter().copied().max()),
            ("bias", bias.iter().copied().max()),
            (
                "allowed",
                sequence.allowed.unwrap_or(&[]).iter().copied().max(),
            ),
            ("banned", sequence.banned.iter().copied().max()),
            ("stops", sequence.stops.iter().copied().max()),
            ("bad_words", words.copied().max()),
        ];
        for (operand, most) in lists {
            if let Some(token) = most.filter(|&token| token as usize >= self.vocab_size) {
                let expected = format!("tokens below {}", self.vocab_size);
                return Err(wrong(operand, expected, token.to_string()));
            }
        }
        if sequence.num_prompt > sequence.tokens.len() {
            let expected = format!("at most the {} tokens", sequence.tokens.len());
            return Err(wrong(
                "num_prompt",
                expected,
                sequence.num_prompt.to_string(),
            ));
        }
        if sequence.tokens.len() > i32::MAX as usize / 2 {
            let found = sequence.tokens.len().to_string();
            return Err(wrong("tokens", "less than 2^30".into(), found));
        }
        if let Some(word) = sequence
            .bad_words
            .iter()
            .find(|w| w.is_empty() || w.len() > TAIL)
        {
            let found = format!("one of {}", word.len());
            return Err(wrong(
                "bad_words",
                format!("sequences of 1 to {TAIL} tokens"),
                found,
            ));
        }
        let needed = aux(sequence).len();
        if needed > AUX {
            let expected = format!("at most {AUX} integers for stop tokens and bad words");
            return Err(wrong("bad_words", expected, needed.to_string()));
        }
        Ok(())
    }

    /// Sends what changed to the device: one upload and one kernel, or nothing at all. Not to be
    /// captured.
    pub fn flush(&mut self, kernels: &Kernels) -> Result<(), Error> {
        if self.changes.is_empty() {
            return Ok(());
        }
        self.grow()?;
        let count = self.changes.len();
        let mut ints = vec![0; count.next_multiple_of(4)];
        for (i, change) in self.changes.values().enumerate() {
            ints[i] = ints.len() as i32;
            ints.extend(change);
            // The kernel reads a structure with 8-byte members.
            ints.resize(ints.len().next_multiple_of(4), 0);
        }
        if i32::try_from(ints.len()).is_err() {
            return Err(Error::Argument {
                op: OP,
                operand: "tokens",
                expected: "less than 2^31 integers between steps".into(),
                found: ints.len().to_string(),
            });
        }
        let roomy = |upload: &Upload| upload.device.size()[0] >= ints.len() as i64;
        if !self.upload.as_ref().is_some_and(roomy) {
            let capacity = ints.len().next_power_of_two().max(1 << 14);
            self.upload = Some(Upload::new(capacity, UPLOADS, self.index)?);
        }
        let upload = self.upload.as_mut().expect("made above");
        upload.send(&ints)?;
        let function = kernels.function(&UPDATE, "sample_update", UPDATE_DEFINES)?;
        let args = [
            (&upload.device).into(),
            Arg::from(self.vocab_size as i32),
            (&self.slots).into(),
            (&self.aux).into(),
            (&self.tail).into(),
            (&self.blocks).into(),
        ];
        // SAFETY: `check` has seen every slot, token and length; `grow` made the rows.
        unsafe { kernels.launch(function, &Launch::new([count as u32, 1, 1], THREADS), &args)? };
        self.changes.clear();
        Ok(())
    }

    /// Asks for the kernel that [`SampleState::flush`] launches, in a rehearsal.
    pub fn rehearse(&self, kernels: &Kernels) -> Result<(), Error> {
        let function = kernels.function(&UPDATE, "sample_update", UPDATE_DEFINES);
        function.map(|_| ())
    }

    /// Allocates rows that were handed out and are not there.
    fn grow(&mut self) -> Result<(), Error> {
        let needed = (self.rows as usize).div_ceil(ROWS_IN_BLOCK);
        if needed <= self.dense.len() {
            return Ok(());
        }
        while self.dense.len() < needed {
            let size = ROWS_IN_BLOCK * self.vocab_size.next_multiple_of(8);
            let on = (Kind::Int, self.device);
            self.dense
                .push(Tensor::f_zeros([size as i64], on).map_err(torch)?);
        }
        let mut addresses: Vec<i64> = self.dense.iter().map(|t| t.data_ptr() as i64).collect();
        addresses.resize(self.blocks.size()[0] as usize, 0);
        let addresses = Tensor::from_slice(&addresses);
        self.blocks.f_copy_(&addresses).map_err(torch)
    }
}

/// Stop tokens and bad words of two and more tokens; empty if there are none.
///
/// `[stops, stop..., words, offset of each word..., (length, token...)...]`
fn aux(sequence: &SampleSlot<'_>) -> Vec<i32> {
    let words = sequence.bad_words.iter().filter(|word| word.len() > 1);
    let stops = match sequence.min_tokens {
        0 => &[],
        _ => sequence.stops,
    };
    let count = words.clone().count();
    if stops.is_empty() && count == 0 {
        return Vec::new();
    }
    let mut out = vec![stops.len() as i32];
    out.extend(stops.iter().map(|&token| token as i32));
    out.push(count as i32);
    let offsets = out.len();
    out.resize(offsets + count, 0);
    for (i, word) in words.enumerate() {
        out[offsets + i] = out.len() as i32;
        out.push(word.len() as i32);
        out.extend(word.iter().map(|&token| token as i32));
    }
    out
}

/// A change as `sample_update.cu` reads it.
fn pack(slot: u32, sequence: &SampleSlot<'_>, held: Held) -> Vec<i32> {
    let (prompt, output) = sequence.tokens.split_at(sequence.num_prompt);
    let aux = aux(sequence);
    let tail = &output[output.len().saturating_sub(TAIL)..];
    let counted = held.counts.is_some();
    let prompt = match counted && sequence.repetition_penalty != 1.0 {
        true => prompt,
        false => &[],
    };
    let counted_output = if counted { output } else { &[] };
    let singles = sequence.bad_words.iter().filter(|word| word.len() == 1);
    let banned: Vec<u32> = (sequence.banned.iter())
        .chain(singles.flatten())
        .copied()
        .collect();
    let row = |row: Option<u32>| row.map_or(-1, |row| row as i32);
    let until = sequence.num_prompt as u64 + u64::from(sequence.min_tokens);
    let ln_min_p = match sequence.min_p > 0.0 {
        true => f64::from(sequence.min_p).ln(),
        false => f64::NEG_INFINITY,
    }
    .to_bits();
    let mut out = vec![
        slot as i32,
        1,
        aux.len() as i32,
        tail.len() as i32,
        sequence.allowed.map_or(-1, |allowed| allowed.len() as i32),
        sequence.bias.len() as i32,
        banned.len() as i32,
        prompt.len() as i32,
        counted_output.len() as i32,
        sequence.tokens.len() as i32,
    ];
    out.resize(CHANGE_INTS, 0);
    out.extend([
        1,
        sequence.seed as i32,
        (sequence.seed >> 32) as i32,
        row(held.counts),
        row(held.bias),
        sequence.num_prompt as i32,
        until.min(i32::MAX as u64) as i32,
        i32::from(!aux.is_empty()),
        sequence.top_k,
        sequence.temperature.to_bits() as i32,
        sequence.top_p.to_bits() as i32,
        sequence.repetition_penalty.to_bits() as i32,
        sequence.frequency_penalty.to_bits() as i32,
        sequence.presence_penalty.to_bits() as i32,
        sequence
            .logprobs
            .map_or(-1, |n| n.min(i32::MAX as u32) as i32),
        0,
        ln_min_p as i32,
        (ln_min_p >> 32) as i32,
    ]);
    out.resize(CHANGE_INTS + SLOT_INTS, 0);
    let ints = |tokens: &[u32]| tokens.iter().map(|&t| t as i32).collect::<Vec<i32>>();
    out.extend(aux);
    out.extend(ints(tail));
    out.extend(ints(sequence.allowed.unwrap_or(&[])));
    for &(token, bias) in sequence.bias {
        out.extend([token as i32, bias.to_bits() as i32]);
    }
    out.extend(ints(&banned));
    out.extend(ints(prompt));
    out.extend(ints(counted_output));
    out
}
