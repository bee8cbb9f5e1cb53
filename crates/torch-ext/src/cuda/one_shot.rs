//! Sums and exchanges between ranks of one process in one trip, through memory that all of them
//! can read; and the sum fused with the residual addition and the norm behind it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::sys;
use tch::{Device, Kind, Tensor};

use super::check::{HALVES, Operand};
use super::compile::Source;
use super::kernels::{Arg, Kernels, Launch, check};
use super::one_shot_group::{Alarm, Group, OneShotAlarm, enable_access};
use super::rope::{element, same_kind};
use super::shim::shim;
use super::{CudaError, stream};
use crate::Error;

pub(crate) static SOURCE: Source = Source {
    name: "all_reduce_norm",
    text: include_str!("../../csrc/cuda/all_reduce_norm.cu"),
    variants: &[
        &["T_BF16=1", "WORLD=2"],
        &["T_HALF=1", "WORLD=4"],
        &["T_FLOAT=1", "WORLD=3"],
        &["T_BF16=1", "WORLD=8"],
    ],
};

// As in the source.
const CHANNELS: usize = 32;
const CHUNK: usize = 32_768;
const THREADS: usize = 512;
/// Flags of a rank pair, or an epoch, are one word a channel.
const WORD: usize = 4;

/// Most ranks of a group.
const MAX_RANKS: usize = 8;

/// One rank of a group whose GPUs can read each other's memory. Several ranks may have the same
/// GPU, each on a stream of its own: slower than one rank, but the same code, so that it can be
/// tested on one GPU.
///
/// Everything is put on libtorch's current stream of the calling thread, nothing waits, and all of
/// it can be captured in a graph: keep the group for as long as the graph. All ranks call the same
/// operations with the same shapes in the same order. A rank that waits longer than the group's
/// patience for another goes on with garbage, and rings the [alarm](OneShot::alarm).
#[derive(Debug)]
pub struct OneShot {
    group: Arc<Group>,
    kernels: Arc<Kernels>,
    rank: usize,
    /// `[world_size]` int64 on this rank's device: where everybody's buffer is.
    pointers: Tensor,
}

impl OneShot {
    /// The ranks of a group, in order: rank `r` has GPU `devices[r]`. Enables access between GPUs;
    /// fails if there is none.
    pub fn group(devices: &[usize], patience: Duration) -> Result<Vec<Self>, Error> {
        let world_size = devices.len();
        let wrong = |what: String| Err(Error::Cuda(CudaError(what)));
        if !(2..=MAX_RANKS).contains(&world_size) {
            return wrong(format!(
                "one-shot exchanges are for 2 to {MAX_RANKS} ranks, not {world_size}"
            ));
        }
        let mut kernels = BTreeMap::new();
        for &device in devices {
            if let std::collections::btree_map::Entry::Vacant(entry) = kernels.entry(device) {
                entry.insert(Arc::new(Kernels::new(device)?));
            }
        }
        let distinct: Vec<usize> = kernels.keys().copied().collect();
        enable_access(&distinct)?;
        let bytes = CHANNELS * (2 * CHUNK + WORD * (world_size + 1));
        let buffer = |&device: &usize| {
            Tensor::f_zeros([bytes as i64], (Kind::Uint8, Device::Cuda(device))).map_err(torch)
        };
        let buffers = devices.iter().map(buffer).collect::<Result<Vec<_>, _>>()?;
        let pointers: Vec<i64> = buffers.iter().map(|b| b.data_ptr() as i64).collect();
        let group = Arc::new(Group {
            alarm: Alarm(stream::pinned(1, Kind::Int)?),
            buffers,
            patience,
        });
        let rank = |(rank, device): (usize, &usize)| {
            Ok(Self {
                group: group.clone(),
                kernels: kernels[device].clone(),
                rank,
                pointers: Tensor::from_slice(&pointers)
                    .f_to_device(Device::Cuda(*device))
                    .map_err(torch)?,
            })
        };
        let ranks = devices.iter().enumerate().map(rank);
        let ranks = ranks.collect::<Result<Vec<_>, CudaError>>()?;
        let shim = shim().map_err(CudaError::from)?;
        for &device in &distinct {
            // The buffers are zero, whatever stream uses them next.
            // SAFETY: no pointers.
            unsafe { shim.device_synchronize(device as i32)? };
        }
        Ok(ranks)
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many ranks there are.
    pub fn world_size(&self) -> usize {
        self.group.buffers.len()
    }

    /// To know of a rank that is late, and to end the waiting for one.
    pub fn alarm(&self) -> OneShotAlarm {
        OneShotAlarm(self.group.clone())
    }

    /// Whether the current stream captures a graph, so that nothing runs yet.
    pub fn is_capturing(&self) -> Result<bool, Error> {
        let Device::Cuda(device) = self.kernels.device() else {
            unreachable!("kernels run on a GPU");
        };
        let stream = stream::current_stream(device)?;
        let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: a live stream, and a valid place for the result.
        let result = unsafe { sys::cuStreamIsCapturing(stream.cast(), &mut status) };
        check(result, "cuStreamIsCapturing")?;
        Ok(status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    /// The sum of all ranks' `x` (bfloat16, float16 or float32, contiguous, a multiple of 16 bytes),
    /// added in float32 in the order of ranks and rounded once: the same bits on every rank, and an
    /// element's do not depend on the others.
    pub fn all_reduce_sum(&self, x: &Tensor) -> Result<Tensor, Error> {
        const OP: &str = "all_reduce";
        let bytes = self.bytes(OP, x)?;
        if !matches!(x.kind(), Kind::BFloat16 | Kind::Half | Kind::Float) {
            return Err(self
                .operand(OP, "x", x)
                .argument("bfloat16, float16 or float32", format!("{:?}", x.kind())));
        }
        if bytes % 16 != 0 {
            let expected = "a multiple of 16 bytes";
            return Err(self.operand(OP, "x", x).argument(expected, bytes));
        }
        let out = self.empty(&x.size(), x.kind())?;
        let vectors = bytes / 16;
        if vectors == 0 {
            return Ok(out);
        }
        let (grid, slice) = shares(vectors);
        let mut args = vec![
            (&out).into(),
            x.into(),
            (vectors as i64).into(),
            (slice as i64).into(),
        ];
        args.extend(self.common());
        // SAFETY: as many bytes as both tensors have.
        unsafe { self.launch(x.kind(), "all_reduce", grid, &args)? };
        Ok(out)
    }

    /// `residual +=` the sum of all ranks' `x` (`[tokens, width]`, bfloat16 or float16), in place;
    /// returns the RMS norm of that times `weight` (`[width]`, the same type). Rounds where
    /// [`all_reduce_sum`](Self::all_reduce_sum) and [`Kernels::add_rms_norm`] do; only the norm's
    /// sum of squares is added in another order. `width` is a multiple of 8 and at most 16,384.
    ///
    /// The result for a row does not depend on the others.
    pub fn all_reduce_norm(
        &self,
        x: &Tensor,
        residual: &mut Tensor,
        weight: &Tensor,
        eps: f64,
    ) -> Result<Tensor, Error> {
        const OP: &str = "all_reduce_norm";
        let operand = |name, tensor| self.operand(OP, name, tensor);
        let [tokens, width] = operand("x", x).vectors(HALVES, [None, None])?;
        let kind = same_kind(x.kind());
        operand("residual", residual).vectors(kind, [Some(tokens), Some(width)])?;
        operand("weight", weight).vectors(kind, [Some(width)])?;
        if width * 2 > CHUNK {
            let expected = format!("at most {} columns", CHUNK / 2);
            return Err(operand("x", x).argument(expected, width));
        }
        let out = self.empty(&x.size(), x.kind())?;
        if tokens == 0 || width == 0 {
            return Ok(out);
        }
        let slice = tokens.div_ceil(CHANNELS);
        let mut args = vec![
            (&out).into(),
            x.into(),
            (&*residual).into(),
            weight.into(),
            Arg::from(eps as f32),
            (width as i32).into(),
            (tokens as i32).into(),
            (slice as i32).into(),
        ];
        args.extend(self.common());
        let grid = tokens.div_ceil(slice);
        // SAFETY: the shapes were checked above.
        unsafe { self.launch(x.kind(), "all_reduce_norm", grid, &args)? };
        Ok(out)
    }

    /// Whether [`OneShot::all_reduce_norm`] takes rows of so many columns.
    pub fn norms(width: usize) -> bool {
        width > 0 && width.is_multiple_of(8) && width * 2 <= CHUNK
    }

    /// All ranks' `x` (of any type, contiguous), one after the other: `[world_size, ...]`.
    pub fn all_gather(&self, x: &Tensor) -> Result<Tensor, Error> {
        self.exchange(x, 0, self.world_size(), u32::MAX)
    }

    /// As [`OneShot::all_gather`], on rank `root` alone; the others get `None`.
    pub fn gather(&self, x: &Tensor, root: usize) -> Result<Option<Tensor>, Error> {
        self.check_rank("gather", x, root)?;
        let all = self.exchange(x, 0, self.world_size(), 1 << root)?;
        Ok((self.rank == root).then_some(all))
    }

    /// Rank `root`'s `x`; the others' is only looked at for its shape and type.
    pub fn broadcast(&self, x: &Tensor, root: usize) -> Result<Tensor, Error> {
        self.check_rank("broadcast", x, root)?;
        Ok(self.exchange(x, root, root + 1, u32::MAX)?.squeeze_dim(0))
    }

    /// What ranks `from..to` have in `x`, for ranks in `readers` (bits).
    fn exchange(&self, x: &Tensor, from: usize, to: usize, readers: u32) -> Result<Tensor, Error> {
        let bytes = self.bytes("exchange", x)?;
        let element = x.kind().elt_size_in_bytes();
        // Each rank's part begins at a multiple of 16 bytes.
        let stride = bytes.div_ceil(16);
        let padded = (stride * 16 / element.max(1)) as i64;
        let reads = (readers >> self.rank) & 1 == 1;
        let parts = if reads { (to - from) as i64 } else { 0 };
        let out = self.empty(&[parts, padded], x.kind())?;
        if stride > 0 {
            let (grid, slice) = shares(stride);
            let mut args = vec![
                (&out).into(),
                x.into(),
                (bytes as i64).into(),
                (stride as i64).into(),
                (slice as i64).into(),
                (from as i32).into(),
                (to as i32).into(),
                Arg::from(readers as i32),
            ];
            args.extend(self.common());
            // SAFETY: `x` has `bytes` bytes, and `out` `stride` vectors for each part.
            unsafe { self.launch(Kind::BFloat16, "exchange", grid, &args)? };
        }
        let mut size = vec![parts];
        size.extend(x.size());
        let mut strides = vec![padded];
        strides.extend(x.stride());
        Ok(out.as_strided(size, strides, 0))
    }

    /// The last arguments of every kernel.
    fn common(&self) -> [Arg<'_>; 4] {
        let patience = i64::try_from(self.group.patience.as_nanos()).unwrap_or(i64::MAX);
        [
            (&self.pointers).into(),
            (&self.group.alarm.0).into(),
            patience.into(),
            (self.rank as i32).into(),
        ]
    }

    /// # Safety
    /// As [`Kernels::launch`].
    unsafe fn launch(
        &self,
        kind: Kind,
        entry: &'static str,
        grid: usize,
        args: &[Arg],
    ) -> Result<(), Error> {
        let element = match kind {
            Kind::Float => "T_FLOAT",
            kind => element(kind),
        };
        let defines = [(element, 1), ("WORLD", self.world_size() as i64)];
        let function = self.kernels.function(&SOURCE, entry, &defines)?;
        let launch = Launch::new([grid as u32, 1, 1], THREADS as u32).pdl();
        // SAFETY: the caller's.
        unsafe { self.kernels.launch(function, &launch, args) }
    }

    fn empty(&self, size: &[i64], kind: Kind) -> Result<Tensor, Error> {
        let made = Tensor::f_empty(size, (kind, self.kernels.device()));
        made.map_err(|e| torch(e).into())
    }

    fn operand<'a>(&self, op: &'static str, name: &'static str, tensor: &'a Tensor) -> Operand<'a> {
        Operand {
            op,
            name,
            tensor,
            device: self.kernels.device(),
        }
    }

    /// Bytes of a contiguous tensor of this device that starts at a multiple of 16.
    fn bytes(&self, op: &'static str, x: &Tensor) -> Result<usize, Error> {
        let operand = self.operand(op, "x", x);
        if x.device() != self.kernels.device() {
            return Err(Error::Device {
                op,
                operand: "x",
                expected: self.kernels.device(),
                found: x.device(),
            });
        }
        if !x.is_contiguous() {
            return Err(Error::NotContiguous {
                op,
                operand: "x",
                shape: x.size(),
            });
        }
        operand.aligned()?;
        Ok(x.numel() * x.kind().elt_size_in_bytes())
    }

    fn check_rank(&self, op: &'static str, x: &Tensor, rank: usize) -> Result<(), Error> {
        match rank < self.world_size() {
            true => Ok(()),
            false => {
                let expected = format!("from one of {} ranks", self.world_size());
                Err(self.operand(op, "x", x).argument(expected, rank))
            }
        }
    }
}

/// How many blocks go through `vectors` of 16 bytes, and how many each. All ranks come to the same.
fn shares(vectors: usize) -> (usize, usize) {
    let slice = vectors.div_ceil(CHANNELS).max(THREADS);
    (vectors.div_ceil(slice), slice)
}

fn torch(error: tch::TchError) -> CudaError {
    CudaError(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_vector_is_some_blocks_and_no_block_is_idle() {
        for vectors in [1, 2, 511, 512, 513, 16_383, 16_384, 16_385, 1_000_003] {
            let (grid, slice) = shares(vectors);
            assert!(grid * slice >= vectors && (grid - 1) * slice < vectors);
            assert!((1..=CHANNELS).contains(&grid), "{vectors}: {grid}");
        }
    }
}
