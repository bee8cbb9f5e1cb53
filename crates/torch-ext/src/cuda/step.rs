//! Inputs of a step, built on the device from what the host packs into one upload.

use tch::{Kind, Tensor};

use super::check::Operand;
use super::compile::Source;
use super::kernels::{Arg, Kernels, Launch};
use super::stream::{HostInts, Readback};
use crate::Error;

pub(crate) static SOURCE: Source = Source {
    name: "step",
    text: include_str!("../../csrc/cuda/step.cu"),
    variants: &[&[]],
};

/// Integers of a row in [`Kernels::prepare_rows`]: slot (negative: padding), position of the first
/// token, number of tokens, where its tokens stand among the uploaded ones (negative: the token
/// that was sampled last), index of its first token in the flat batch.
pub const ROW_INTS: usize = 5;
/// Integers of a segment in [`Kernels::apply_tables`]: slot, first entry, where its blocks stand
/// among the uploaded ones, how many.
pub const SEGMENT_INTS: usize = 4;

/// What [`Kernels::prepare_rows`] writes. `T` and `R` are the most tokens and rows of a step, `W`
/// the width of a block table.
#[derive(Debug)]
pub struct StepTensors {
    /// `[T]` int64: token ids.
    pub ids: Tensor,
    /// `[T]` int64.
    pub positions: Tensor,
    /// `[T]` int64: place in the cache, `block * block_size + offset`; negative for padding.
    pub cache_slots: Tensor,
    /// `[R + 1]` int32: where each row's tokens begin.
    pub query_start: Tensor,
    /// `[R]` int32: tokens in the cache after the step; 0 for padding.
    pub context_len: Tensor,
    /// `[R, W]` int32.
    pub block_tables: Tensor,
    /// `[R]` int32: slot of each row, negative for padding.
    pub row_slots: Tensor,
    /// `[R]` int32: position after each row's last token, which is the sampled token's.
    pub row_ends: Tensor,
    /// `[R]` int32: `row_slots` if the step samples where it was captured, else all negative.
    pub sample_slots: Tensor,
    /// `[2]` int64: where on the host sampled tokens go, and how many of them.
    place: Tensor,
    /// That memory, for as long as `place` has its address.
    told: Option<Tensor>,
}

impl StepTensors {
    /// Room for `tokens` tokens in `rows` rows with tables of `width` blocks.
    pub fn new(
        tokens: usize,
        rows: usize,
        width: usize,
        kernels: &Kernels,
    ) -> Result<Self, tch::TchError> {
        let make = |size: &[i64], kind| Tensor::f_zeros(size, (kind, kernels.device()));
        let (tokens, rows, width) = (tokens as i64, rows as i64, width as i64);
        Ok(Self {
            ids: make(&[tokens], Kind::Int64)?,
            positions: make(&[tokens], Kind::Int64)?,
            cache_slots: make(&[tokens], Kind::Int64)?,
            query_start: make(&[rows + 1], Kind::Int)?,
            context_len: make(&[rows], Kind::Int)?,
            block_tables: make(&[rows, width], Kind::Int)?,
            row_slots: make(&[rows], Kind::Int)?,
            row_ends: make(&[rows], Kind::Int)?,
            sample_slots: make(&[rows], Kind::Int)?,
            place: make(&[2], Kind::Int64)?,
            told: None,
        })
    }
}

impl Kernels {
    fn ints<const N: usize>(
        &self,
        op: &'static str,
        name: &'static str,
        tensor: &Tensor,
        shape: [Option<usize>; N],
    ) -> Result<[usize; N], Error> {
        let device = self.device();
        Operand {
            op,
            name,
            tensor,
            device,
        }
        .of(&[Kind::Int], shape)
    }

    /// Changes block tables (`[slots, width]` int32): `segments` are [`SEGMENT_INTS`] each, on the
    /// device; `blocks` holds the ids that they point to.
    ///
    /// `host_segments` is what was uploaded as `segments`: the ranges are checked there.
    pub fn apply_tables(
        &self,
        host_segments: &[i32],
        segments: &Tensor,
        blocks: &Tensor,
        tables: &Tensor,
    ) -> Result<(), Error> {
        const OP: &str = "apply_tables";
        let count = host_segments.len() / SEGMENT_INTS;
        if count == 0 {
            return Ok(());
        }
        let [given] = self.ints(OP, "segments", segments, [None])?;
        let [room] = self.ints(OP, "blocks", blocks, [None])?;
        let [slots, width] = self.ints(OP, "tables", tables, [None, None])?;
        let fits = |s: &[i32]| match *s {
            [slot, at, offset, len] => {
                (0..slots as i64).contains(&i64::from(slot))
                    && at >= 0
                    && len >= 0
                    && offset >= 0
                    && i64::from(at) + i64::from(len) <= width as i64
                    && i64::from(offset) + i64::from(len) <= room as i64
            }
            _ => false,
        };
        if given < host_segments.len() || !host_segments.chunks(SEGMENT_INTS).all(fits) {
            return Err(Error::Argument {
                op: OP,
                operand: "segments",
                expected: format!("ranges of {slots} tables of {width} blocks"),
                found: "one outside".into(),
            });
        }
        let function = self.function(&SOURCE, "apply_tables", &[])?;
        let launch = Launch::new([count as u32, 1, 1], 128);
        let args = [
            segments.into(),
            blocks.into(),
            tables.into(),
            Arg::from(width as i32),
        ];
        // SAFETY: every segment lies within its table and its blocks.
        unsafe { self.launch(function, &launch, &args) }
    }

    /// Fills `out` for `num_rows` rows ([`ROW_INTS`] each, what was put into `rows` last), whose
    /// uploaded tokens are `tokens` (int32 on the device). The caller promises by [`RowLimits`] what
    /// the rows stay within, and has checked it ([`RowLimits::check`]). `samples`: whether
    /// [`StepTensors::sample_slots`] are the rows' slots. `host`: where [`Kernels::keep_tokens`] of this
    /// step puts tokens, and how many.
    #[allow(clippy::too_many_arguments, reason = "the tensors of a step")]
    pub fn prepare_rows(
        &self,
        num_rows: usize,
        rows: &mut HostInts,
        tokens: &Tensor,
        last_token: &Tensor,
        tables: &Tensor,
        limits: &RowLimits,
        samples: bool,
        host: Option<(&mut Readback, usize)>,
        out: &mut StepTensors,
    ) -> Result<(), Error> {
        const OP: &str = "prepare_rows";
        let ints = rows.tensor().numel();
        let [uploaded] = self.ints(OP, "tokens", tokens, [None])?;
        let [slots] = self.ints(OP, "last_token", last_token, [None])?;
        let [_, width] = self.ints(OP, "tables", tables, [Some(slots), None])?;
        let [room] = self.ints(OP, "context_len", &out.context_len, [None])?;
        self.ints(OP, "query_start", &out.query_start, [Some(room + 1)])?;
        self.ints(
            OP,
            "block_tables",
            &out.block_tables,
            [Some(room), Some(width)],
        )?;
        self.ints(OP, "row_slots", &out.row_slots, [Some(room)])?;
        self.ints(OP, "row_ends", &out.row_ends, [Some(room)])?;
        self.ints(OP, "sample_slots", &out.sample_slots, [Some(room)])?;
        let long = |name, tensor, len| {
            let device = self.device();
            Operand {
                op: OP,
                name,
                tensor,
                device,
            }
            .of(&[Kind::Int64], [len])
        };
        let [batch] = long("ids", &out.ids, None)?;
        long("positions", &out.positions, None)?;
        long("cache_slots", &out.cache_slots, None)?;
        let promised = limits.slots <= slots
            && limits.width <= width
            && limits.batch <= batch
            && out.positions.size() == out.ids.size()
            && out.cache_slots.size() == out.ids.size()
            && limits.uploaded <= uploaded
            && num_rows <= room
            && num_rows * ROW_INTS <= ints;
        if !promised || num_rows == 0 || limits.block_size == 0 {
            return Err(Error::Argument {
                op: OP,
                operand: "limits",
                expected: format!(
                    "at most {room} rows, {slots} slots, tables of {width}, {batch} tokens of which {uploaded} uploaded"
                ),
                found: format!("{num_rows} rows, {limits:?}"),
            });
        }
        let function = self.function(&SOURCE, "prepare_rows", &[])?;
        let (place, told) = match host {
            Some((readback, told)) => (Some(readback.promise(told)?), told),
            None => (None, 0),
        };
        let launch = Launch::new([num_rows as u32, 1, 1], 128);
        let args = [
            rows.tensor().into(),
            tokens.into(),
            last_token.into(),
            tables.into(),
            Arg::from(width as i32),
            Arg::from(limits.block_size as i32),
            (&out.ids).into(),
            (&out.positions).into(),
            (&out.cache_slots).into(),
            (&out.query_start).into(),
            (&out.context_len).into(),
            (&out.block_tables).into(),
            (&out.row_slots).into(),
            (&out.row_ends).into(),
            (&out.sample_slots).into(),
            Arg::from(i32::from(samples)),
            place.as_ref().into(),
            Arg::from(told as i32),
            (&out.place).into(),
        ];
        // SAFETY: the tensors have the room that the limits promise, and the rows keep to them. The
        // device reads pinned memory at its own address.
        unsafe { self.launch(function, &launch, &args)? };
        out.told = place;
        Ok(rows.hold()?)
    }

    /// `last_token[slots[i]] = tokens[i]` where the slot is not negative; all int32, on the device.
    /// Slots come from [`Kernels::prepare_rows`], which takes none beyond `last_token`. Tokens of such rows
    /// also go to the host, where `step` was told. May be captured; [`Readback::written`] follows each run,
    /// of which there is one for each [`Kernels::prepare_rows`] with a place on the host.
    pub fn keep_tokens(
        &self,
        tokens: &Tensor,
        slots: &Tensor,
        last_token: &Tensor,
        step: &StepTensors,
    ) -> Result<(), Error> {
        const OP: &str = "keep_tokens";
        let [count] = self.ints(OP, "tokens", tokens, [None])?;
        self.ints(OP, "slots", slots, [Some(count)])?;
        self.ints(OP, "last_token", last_token, [None])?;
        if count == 0 {
            return Ok(());
        }
        let function = self.function(&SOURCE, "keep_tokens", &[])?;
        let launch = Launch::new([count.div_ceil(128) as u32, 1, 1], 128).pdl();
        let args = [
            tokens.into(),
            slots.into(),
            Arg::from(count as i32),
            last_token.into(),
            (&step.place).into(),
        ];
        // SAFETY: `count` tokens and slots; slots are below the number of last tokens. `prepare_rows` put
        // the address of pinned memory with room for so many into `place`. `step` holds that until the next
        // `prepare_rows`, and its `Readback` until what was recorded behind this launch is done.
        unsafe { self.launch(function, &launch, &args) }
    }
}

/// What the rows of a step stay within.
#[derive(Clone, Copy, Debug)]
pub struct RowLimits {
    /// Slots are below this.
    pub slots: usize,
    /// Blocks in a table.
    pub width: usize,
    /// Tokens of a block.
    pub block_size: usize,
    /// Tokens of the flat batch.
    pub batch: usize,
    /// Tokens that were uploaded.
    pub uploaded: usize,
}

impl RowLimits {
    /// Checks rows ([`ROW_INTS`] each) before the device reads them.
    pub fn check(&self, rows: &[i32]) -> Result<(), String> {
        let within = |row: &[i32]| match *row {
            [slot, start, len, source, first] => {
                let end = i64::from(start) + i64::from(len);
                let known = source < 0 && len == 1
                    || source >= 0 && i64::from(source) + i64::from(len) <= self.uploaded as i64;
                i64::from(slot) < self.slots as i64
                    && start >= 0
                    && len >= 1
                    && first >= 0
                    && known
                    && end <= (self.width * self.block_size) as i64
                    && i64::from(first) + i64::from(len) <= self.batch as i64
            }
            _ => false,
        };
        match rows.chunks(ROW_INTS).position(|row| !within(row)) {
            None => Ok(()),
            Some(at) => {
                let row = rows.chunks(ROW_INTS).nth(at);
                Err(format!(
                    "row {at} of the step, {row:?}, is outside of {self:?}"
                ))
            }
        }
    }
}
