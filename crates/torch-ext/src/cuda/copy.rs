//! Moving rows about: KV blocks for copy-on-write, and rows of an embedding.

use tch::{Kind, Tensor};

use super::activation::grid;
use super::check::{HALVES, Operand};
use super::compile::Source;
use super::kernels::{Arg, Kernels, Launch};
use super::rope::same_kind;
use crate::Error;

pub(crate) static SOURCE: Source = Source {
    name: "copy_blocks",
    text: include_str!("../../csrc/cuda/copy_blocks.cu"),
    variants: &[&["IDS=4"], &["IDS=8"]],
};

const THREADS: usize = 256;
/// Of a grid's second and third dimension.
const MAX_GRID: usize = 65_535;

/// The caches of all layers, for [`Kernels::copy_blocks`]. Holds the tensors.
#[derive(Debug)]
pub struct CacheSet {
    caches: Vec<Tensor>,
    /// `[caches]` int64: their addresses, on the device.
    addresses: Tensor,
    blocks: usize,
    /// 16-byte vectors in a block.
    vectors: usize,
}

impl Kernels {
    /// A set of caches, `[blocks, kv_heads, block_size, head_dim]` each, all of one shape and of
    /// one type (bfloat16 or float16), keys and values alike. A block must be a multiple of 16
    /// bytes. Waits for the device.
    pub fn cache_set<'a>(
        &self,
        caches: impl IntoIterator<Item = &'a Tensor>,
    ) -> Result<CacheSet, Error> {
        let caches: Vec<Tensor> = caches.into_iter().map(Tensor::shallow_clone).collect();
        let operand = |tensor| Operand {
            op: "cache_set",
            name: "caches",
            tensor,
            device: self.device(),
        };
        let mut shape = None;
        for cache in &caches {
            let dims = shape.unwrap_or([None; 4]);
            let kinds = same_kind(caches[0].kind());
            let kinds = if shape.is_none() { HALVES } else { kinds };
            shape = Some(operand(cache).of(kinds, dims)?.map(Some));
            operand(cache).aligned()?;
        }
        let [blocks, block @ ..] = shape.unwrap_or([Some(0); 4]).map(|n| n.unwrap_or(0));
        let elements: usize = block.iter().product();
        if !elements.is_multiple_of(8) || caches.len() > MAX_GRID {
            let (most, count) = (MAX_GRID, caches.len());
            let expected = format!("at most {most}, with blocks of a multiple of 8 elements");
            let found = format!("{count} with blocks of {elements}");
            return Err(Error::Argument {
                op: "cache_set",
                operand: "caches",
                expected,
                found,
            });
        }
        let addresses: Vec<i64> = caches.iter().map(|c| c.data_ptr() as i64).collect();
        let addresses = Tensor::from_slice(&addresses)
            .f_to_device(self.device())
            .map_err(|e| super::CudaError(e.to_string()))?;
        Ok(CacheSet {
            caches,
            addresses,
            blocks,
            vectors: elements / 8,
        })
    }

    /// Copies block `pairs[i][0]` onto block `pairs[i][1]` in every cache of the set. `pairs` is
    /// `[n, 2]` int64 on the device; pairs with an index out of range do nothing, so that -1 can
    /// fill up a list of fixed length. No block may be the source of one pair and the destination
    /// of another, nor the destination of two.
    pub fn copy_blocks(&self, set: &CacheSet, pairs: &Tensor) -> Result<(), Error> {
        let operand = Operand {
            op: "copy_blocks",
            name: "pairs",
            tensor: pairs,
            device: self.device(),
        };
        let [count, _] = operand.of(&[Kind::Int64], [None, Some(2)])?;
        if set.addresses.device() != self.device() {
            let (expected, found) = (self.device(), set.addresses.device());
            return Err(Error::Device {
                op: "copy_blocks",
                operand: "set",
                expected,
                found,
            });
        }
        if count > MAX_GRID {
            return Err(operand.argument(format!("at most {MAX_GRID} pairs"), count));
        }
        if count == 0 || set.caches.is_empty() || set.vectors == 0 {
            return Ok(());
        }
        let function = self.function(&SOURCE, "copy_blocks", &[("IDS", 8)])?;
        // Four vectors a thread, up to a point.
        let parts = set.vectors.div_ceil(THREADS * 4).clamp(1, 64);
        let size = [parts as u32, count as u32, set.caches.len() as u32];
        let launch = Launch::new(size, THREADS as u32).pdl();
        let args = [
            (&set.addresses).into(),
            pairs.into(),
            Arg::from(set.blocks as i64),
            Arg::from(set.vectors as i64),
        ];
        // SAFETY: the set holds the caches, whose shapes were checked; the kernel skips blocks
        // that are not there.
        unsafe { self.launch(function, &launch, &args) }
    }

    /// Rows `ids` of `table`: `[tokens, width]` of `[rows, width]` (bfloat16 or float16, `width` a
    /// multiple of 8), for `ids` (`[tokens]`, int32 or int64). An id out of range takes the
    /// nearest row.
    pub fn gather_rows(&self, table: &Tensor, ids: &Tensor) -> Result<Tensor, Error> {
        let operand = |name, tensor| Operand {
            op: "gather_rows",
            name,
            tensor,
            device: self.device(),
        };
        let [rows, width] = operand("table", table).vectors(HALVES, [None, None])?;
        let (kind, bytes): (&'static [Kind], i64) = match ids.kind() {
            Kind::Int => (&[Kind::Int], 4),
            _ => (&[Kind::Int64], 8),
        };
        let [tokens] = operand("ids", ids).of(kind, [None])?;
        if width > i32::MAX as usize || (rows == 0 && tokens > 0) {
            let expected = "at least one row of at most 2^31 columns";
            return Err(operand("table", table).argument(expected, format!("[{rows}, {width}]")));
        }
        let out = self.empty(&[tokens, width], table.kind())?;
        let vectors = width / 8;
        let blocks = (tokens * vectors).div_ceil(THREADS);
        if blocks == 0 {
            return Ok(out);
        }
        let function = self.function(&SOURCE, "gather_rows", &[("IDS", bytes)])?;
        let blocks = grid(operand("ids", ids), blocks)?;
        let launch = Launch::new([blocks, 1, 1], THREADS as u32).pdl();
        let args = [
            (&out).into(),
            table.into(),
            ids.into(),
            Arg::from(tokens as i64),
            Arg::from(rows as i64),
            Arg::from(vectors as i32),
        ];
        // SAFETY: the shapes were checked above; the kernel keeps ids within the table.
        unsafe { self.launch(function, &launch, &args)? };
        Ok(out)
    }
}
