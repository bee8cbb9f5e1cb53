//! The batched sampler: sequences' parameters on the device, and the kernels that draw tokens.
//!
//! Crate `sampler` says what is computed, turns its parameters into [`SampleSlot`]s and checks
//! this against its own CPU version.

use tch::{Device, Kind, Tensor};

use super::check::Operand;
use super::compile::Source;
use super::kernels::{Arg, Kernels, Launch};
use super::sample_state::SampleState;
use crate::Error;

/// A kernel file behind the text that all of them share.
macro_rules! source {
    ($name:literal, $variants:expr) => {
        Source {
            name: $name,
            text: concat!(
                include_str!("../../csrc/cuda/sample.cuh"),
                include_str!(concat!("../../csrc/cuda/", $name, ".cu"))
            ),
            variants: $variants,
        }
    };
}

const TYPES: &[&[&str]] = &[&["T_BF16=1"], &["T_HALF=1"], &["T_FLOAT=1"]];

pub(crate) static RACE: Source = source!(
    "sample_race",
    &[
        &["T_BF16=1", "RACE=0"],
        &["T_BF16=1", "RACE=1"],
        &["T_BF16=1", "RACE=2"],
        &["T_HALF=1", "RACE=1"],
        &["T_FLOAT=1", "RACE=2"],
    ]
);
pub(crate) static SCAN: Source = source!("sample_scan", TYPES);
pub(crate) static SELECT: Source = Source {
    name: "sample_select",
    text: concat!(
        include_str!("../../csrc/cuda/sample.cuh"),
        include_str!("../../csrc/cuda/sample_select.cuh"),
        include_str!("../../csrc/cuda/sample_select.cu")
    ),
    variants: TYPES,
};
pub(crate) static LOGPROBS: Source = source!("sample_logprobs", TYPES);
pub(crate) static UPDATE: Source = source!("sample_update", &[&["T_FLOAT=1"]]);
/// What [`UPDATE`] is compiled with: it has no logits.
pub(super) const UPDATE_DEFINES: &[(&str, i64)] = &[("T_FLOAT", 1)];

/// Sizes that `sample.cuh` has too.
const THREADS: u32 = 512;
const SLICE: usize = 8192;
const CHUNK: usize = 64;
const BUCKETS: usize = 1024;
const STATS_INTS: usize = 5;
const SELECTED_INTS: usize = 4;
/// Blocks of the kernels that share slices out, on a multiprocessor at a time.
const BLOCKS_PER_SM: usize = 2;
/// Largest vocabulary: what the tables in shared memory hold.
pub(super) const MAX_VOCAB: usize = 8192 * CHUNK;

/// What the rows of a batch need: the least that all of them agree with. A larger one gives the
/// same tokens, later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SampleMode {
    /// All rows are greedy: one kernel, one pass.
    Greedy,
    /// No row has min-p, top-k or top-p: one kernel, one pass.
    Race,
    /// No row has top-p without top-k: three kernels, the last of which is done at once where few
    /// tokens are left.
    Filter,
    /// Anything: five kernels, the last three of which are done at once where few tokens are left.
    Nucleus,
}

/// Why a row got no token; results of [`Kernels::sample`] below 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SampleFailure {
    /// The row has a negative slot.
    Padding,
    /// Every logit is -inf, as the model gave it or as the parameters left it.
    AllMasked,
    /// The slot holds no sequence.
    EmptySlot,
    /// The logit of this token is NaN or +inf.
    NotFinite(u32),
}

impl SampleFailure {
    /// A row's token, or why it has none.
    pub fn of(code: i32) -> Result<u32, Self> {
        match code {
            0.. => Ok(code as u32),
            -1 => Err(Self::Padding),
            -2 => Err(Self::AllMasked),
            -3 => Err(Self::EmptySlot),
            _ => Err(Self::NotFinite((-16 - code).max(0) as u32)),
        }
    }
}

/// The batch as all kernels take it, checked.
struct Batch {
    rows: usize,
    vocab: usize,
    dtype: &'static str,
    args: [Arg<'static>; 11],
}

impl Batch {
    fn slices(&self) -> usize {
        self.vocab.div_ceil(SLICE)
    }

    fn chunks(&self) -> usize {
        self.vocab.div_ceil(CHUNK)
    }

    /// A launch of as many blocks a row as run at a time, if a row has as many slices. Each takes
    /// several slices, and reads one while it works on the one before.
    fn shared_out(&self, num_sms: usize) -> Launch {
        let resident = BLOCKS_PER_SM * num_sms / self.rows.max(1);
        let each = self.slices().div_ceil(resident.clamp(1, self.slices()));
        let blocks = self.slices().div_ceil(each);
        Launch::new([blocks as u32, self.rows as u32, 1], THREADS).pdl()
    }

    /// A launch of a block for every slice of every row.
    fn sliced(&self) -> Launch {
        Launch::new([self.slices() as u32, self.rows as u32, 1], THREADS).pdl()
    }

    fn by_row(&self) -> Launch {
        Launch::new([self.rows as u32, 1, 1], THREADS).pdl()
    }

    fn with<'a>(&self, more: &[Arg<'a>]) -> Vec<Arg<'a>> {
        [&self.args, more].concat()
    }
}

impl Kernels {
    /// Draws a token for each row of `logits` and adds it to the row's sequence.
    ///
    /// * `logits`: bf16, fp16 or float32 `[rows, vocab]`; rows may lie apart (a view of wider ones).
    /// * `slots`: int32 `[rows]`, on the device: each row's slot, negative for padding. A slot may
    ///   come once.
    /// * `positions`: int32 `[rows]`, on the device: how many tokens each sequence has, which is
    ///   the position of the one that is drawn.
    ///
    /// Returns int32 `[rows]` on the device: tokens, or codes for [`SampleFailure::of`]. Waits for
    /// nothing and may be captured; a replay sees the slots' parameters as they are then, which
    /// `mode` must still fit. The token of a row depends on its logits, parameters, seed and
    /// position and on nothing else (but for sums in float64 whose order varies: two scores, or the border
    /// of a nucleus, that agree to 15 digits).
    pub fn sample(
        &self,
        state: &SampleState,
        logits: &Tensor,
        slots: &Tensor,
        positions: &Tensor,
        mode: SampleMode,
    ) -> Result<Tensor, Error> {
        let batch = self.sample_batch("sample", state, logits, slots, positions)?;
        let (rows, slices) = (batch.rows, batch.slices());
        let make = |len: usize, kind| room(len, kind, self.device());
        let tokens = make(rows, Kind::Int)?;
        if rows == 0 {
            return Ok(tokens);
        }
        let function = |source, entry| self.function(source, entry, &[(batch.dtype, 1)]);
        let filter = match mode {
            SampleMode::Greedy | SampleMode::Race => None,
            SampleMode::Filter | SampleMode::Nucleus => {
                let chunk_max = make(rows * batch.chunks(), Kind::Float)?;
                let stats = make(rows * slices * STATS_INTS, Kind::Int)?;
                let selected = make(rows * SELECTED_INTS, Kind::Int)?;
                let histogram = match mode {
                    SampleMode::Nucleus => Some(make(rows * BUCKETS, Kind::Int64)?),
                    _ => None,
                };
                let scan = function(&SCAN, "sample_scan")?;
                let select = function(&SELECT, "sample_select")?;
                let maxima: [Arg; 2] = [(&chunk_max).into(), (&stats).into()];
                let count = [Arg::from(slices as i32)];
                let select_args = |histogram: Option<&Tensor>| {
                    let more = [histogram.into(), (&selected).into(), (&tokens).into()];
                    batch.with(&[&count[..], &maxima, &more].concat())
                };
                // SAFETY: `sample_batch` has checked what these read; what they write is as large
                // as rows, slices and vocabulary demand.
                unsafe {
                    let args = [&count[..], &maxima, &[histogram.as_ref().into()]].concat();
                    self.launch(scan, &batch.shared_out(self.num_sms()), &batch.with(&args))?;
                    self.launch(select, &batch.by_row(), &select_args(None))?;
                    if let Some(histogram) = &histogram {
                        let sums = function(&SCAN, "sample_histogram")?;
                        let args = [&maxima[..], &[histogram.into(), (&selected).into()]].concat();
                        self.launch(sums, &batch.sliced(), &batch.with(&args))?;
                        self.launch(select, &batch.by_row(), &select_args(Some(histogram)))?;
                    }
                }
                Some((chunk_max, selected))
            }
        };
        let race = match mode {
            SampleMode::Greedy => 0,
            SampleMode::Race => 1,
            SampleMode::Filter | SampleMode::Nucleus => 2,
        };
        let function = self.function(&RACE, "sample_race", &[(batch.dtype, 1), ("RACE", race)])?;
        let winners = make(rows * slices * 4, Kind::Int64)?;
        let args = [
            Arg::from(slices as i32),
            filter.as_ref().map(|f| &f.0).into(),
            filter.as_ref().map(|f| &f.1).into(),
            (&winners).into(),
            state.counters().into(),
            (&tokens).into(),
        ];
        // SAFETY: as above; `state` has a counter for each row, zero between calls.
        unsafe {
            let launch = batch.shared_out(self.num_sms());
            self.launch(function, &launch, &batch.with(&args))?;
        }
        Ok(tokens)
    }

    /// Log-probabilities of `tokens` (what [`Kernels::sample`] returned for the same arguments) and
    /// of the most likely ones, from the raw logits.
    ///
    /// Returns int32 `[rows, 2 + 2 width]` on the device: a row's log-probability (the bits of a
    /// float32), its rank (how many tokens are at least as likely), up to `width` tokens, most
    /// likely first (of equal ones the lowest), and as many log-probabilities. Only as many as the
    /// slot asked for are written; the rest is 0, as are rows that asked for none or have no token.
    pub fn sample_logprobs(
        &self,
        state: &SampleState,
        logits: &Tensor,
        slots: &Tensor,
        positions: &Tensor,
        tokens: &Tensor,
        width: usize,
    ) -> Result<Tensor, Error> {
        const OP: &str = "sample_logprobs";
        let batch = self.sample_batch(OP, state, logits, slots, positions)?;
        let (rows, slices, device) = (batch.rows, batch.slices(), self.device());
        let operand = Operand {
            op: OP,
            name: "tokens",
            tensor: tokens,
            device,
        };
        operand.of(&[Kind::Int], [Some(rows)])?;
        if width > batch.vocab {
            return Err(Error::Argument {
                op: OP,
                operand: "width",
                expected: format!("at most the vocabulary, {}", batch.vocab),
                found: width.to_string(),
            });
        }
        let size = [rows as i64, 2 + 2 * width as i64];
        let out = Tensor::f_zeros(size, (Kind::Int, device)).map_err(torch)?;
        if rows == 0 {
            return Ok(out);
        }
        let chunk_max = room(rows * batch.chunks(), Kind::Float, device)?;
        let shares = room(rows * slices * 2, Kind::Int64, device)?;
        let function = |entry| self.function(&LOGPROBS, entry, &[(batch.dtype, 1)]);
        let (scan, list) = (function("sample_logprobs_scan")?, function(OP)?);
        let tables: [Arg; 3] = [tokens.into(), (&chunk_max).into(), (&shares).into()];
        // SAFETY: `sample_batch` has checked what these read; tokens outside of the vocabulary are
        // left alone, and what is written is as large as rows, slices and vocabulary demand.
        unsafe {
            self.launch(scan, &batch.sliced(), &batch.with(&tables))?;
            let args = [
                &[Arg::from(slices as i32)],
                &tables[..],
                &[Arg::from(width as i32), (&out).into()],
            ];
            self.launch(list, &batch.by_row(), &batch.with(&args.concat()))?;
        }
        Ok(out)
    }

    fn sample_batch(
        &self,
        op: &'static str,
        state: &SampleState,
        logits: &Tensor,
        slots: &Tensor,
        positions: &Tensor,
    ) -> Result<Batch, Error> {
        let device = self.device();
        let operand = |name, tensor| Operand {
            op,
            name,
            tensor,
            device,
        };
        let [rows] = operand("slots", slots).of(&[Kind::Int], [None])?;
        operand("positions", positions).of(&[Kind::Int], [Some(rows)])?;
        if state.device() != device {
            let (expected, found) = (device, state.device());
            return Err(Error::Device {
                op,
                operand: "state",
                expected,
                found,
            });
        }
        if rows > state.max_rows() {
            let most = format!("at most {} rows", state.max_rows());
            return Err(operand("slots", slots).argument(most, rows));
        }
        let vocab = state.vocab_size();
        let (dtype, bytes) = match logits.kind() {
            Kind::BFloat16 => ("T_BF16", 2),
            Kind::Half => ("T_HALF", 2),
            Kind::Float => ("T_FLOAT", 4),
            found => {
                return Err(Error::Dtype {
                    op,
                    operand: "logits",
                    expected: "BFloat16, Half or Float",
                    found,
                });
            }
        };
        if logits.device() != device {
            let found = logits.device();
            return Err(Error::Device {
                op,
                operand: "logits",
                expected: device,
                found,
            });
        }
        let shape = logits.size();
        if shape != [rows as i64, vocab as i64] {
            return Err(Error::Shape {
                op,
                operand: "logits",
                expected: format!("[{rows}, {vocab}]"),
                found: shape,
            });
        }
        let strides = logits.stride();
        let stride = if rows > 1 { strides[0] } else { vocab as i64 };
        if logits.is_sparse() || (vocab > 1 && strides[1] != 1) || stride < 0 {
            let operand = "logits";
            return Err(Error::NotContiguous { op, operand, shape });
        }
        let aligned = (logits.data_ptr() as usize).is_multiple_of(16) && stride * bytes % 16 == 0;
        let [slot_table, aux, tail, blocks] = state.tables();
        let args = [
            logits.into(),
            Arg::from(stride),
            Arg::from(vocab as i32),
            Arg::from(i32::from(aligned)),
            slots.into(),
            positions.into(),
            slot_table.into(),
            aux.into(),
            tail.into(),
            blocks.into(),
            Arg::from(state.max_slots() as i32),
        ];
        Ok(Batch {
            rows,
            vocab,
            dtype,
            args,
        })
    }
}

fn room(len: usize, kind: Kind, device: Device) -> Result<Tensor, Error> {
    Tensor::f_empty([len as i64], (kind, device)).map_err(torch)
}

pub(super) fn torch(error: tch::TchError) -> Error {
    Error::Cuda(super::CudaError(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::SampleFailure;

    #[test]
    fn codes_mean_what_the_kernels_say() {
        assert_eq!(SampleFailure::of(7), Ok(7));
        assert_eq!(SampleFailure::of(-1), Err(SampleFailure::Padding));
        assert_eq!(SampleFailure::of(-2), Err(SampleFailure::AllMasked));
        assert_eq!(SampleFailure::of(-3), Err(SampleFailure::EmptySlot));
        assert_eq!(SampleFailure::of(-16), Err(SampleFailure::NotFinite(0)));
        assert_eq!(SampleFailure::of(-21), Err(SampleFailure::NotFinite(5)));
    }
}
