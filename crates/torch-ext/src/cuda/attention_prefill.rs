//! Causal attention of chunks of tokens over the paged cache.

use tch::{Kind, Tensor};

use super::attention::{Heads, PagedKv, Scores};
use super::check::Operand;
use super::compile::Source;
use super::kernels::{Arg, Defines, Kernels, Launch};
use super::rope::element;
use super::tensor_map::TensorMap;
use crate::Error;

pub(crate) static SOURCE: Source = Source {
    name: "attention_prefill",
    text: include_str!("../../csrc/cuda/attention_prefill.cu"),
    variants: &[
        &["T_BF16=1", "HEAD_DIM=128", "SOFT_CAP=0"],
        &["T_HALF=1", "HEAD_DIM=256", "SOFT_CAP=1"],
    ],
};

pub(crate) static SM90: Source = Source {
    name: "attention_prefill_sm90",
    text: concat!(
        include_str!("../../csrc/cuda/hopper.cuh"),
        include_str!("../../csrc/cuda/attention_prefill_sm90.cu")
    ),
    variants: &[
        &["T_BF16=1", "HEAD_DIM=128", "SOFT_CAP=0", "BOX=16"],
        &["T_HALF=1", "HEAD_DIM=64", "SOFT_CAP=0", "BOX=0"],
        &["T_HALF=1", "HEAD_DIM=256", "SOFT_CAP=1", "BOX=64"],
    ],
};

impl Kernels {
    /// The kernel for prefill on this device.
    fn prefill_kernel(&self, head_dim: usize) -> PrefillKernel {
        if self.capability() == (9, 0) && matches!(head_dim, 64 | 128 | 256) {
            let (rows, keys) = (128, if head_dim == 256 { 64 } else { 128 });
            return PrefillKernel {
                source: &SM90,
                rows,
                block: 384,
                // And room to begin at a multiple of 1024.
                shared: ((rows + 4 * keys) * head_dim * 2 + 1024) as u32,
                persistent: true,
                keys: Some(keys),
            };
        }
        let (warps, keys) = if head_dim > 128 { (4, 32) } else { (8, 64) };
        let rows = 16 * warps;
        PrefillKernel {
            source: &SOURCE,
            rows,
            block: 32 * warps as u32,
            shared: ((rows + 4 * keys) * head_dim * 2) as u32,
            persistent: false,
            keys: None,
        }
    }

    /// The tiles of a step's prefill, for [`Kernels::attention_prefill`]: pairs of a sequence's
    /// index and a tile's first token, heaviest first. `chunks` are (index of a sequence, number
    /// of its new tokens, its context with them).
    pub fn prefill_tiles(&self, heads: Heads, chunks: &[(usize, usize, usize)]) -> Vec<i32> {
        let ratio = (heads.heads / heads.kv_heads.max(1)).max(1);
        let step = (self.prefill_kernel(heads.head_dim).rows / ratio).max(1);
        let mut tiles: Vec<(usize, i32, i32)> = Vec::new();
        for &(seq, len, context) in chunks {
            for first in (0..len).step_by(step) {
                let weight = (context + first).saturating_sub(len);
                tiles.push((weight, seq as i32, first as i32));
            }
        }
        tiles.sort_by_key(|&(weight, ..)| std::cmp::Reverse(weight));
        tiles
            .iter()
            .flat_map(|&(_, seq, first)| [seq, first])
            .collect()
    }

    /// Causal attention of every token of the sequences that `tiles` names (`[n, 2]` int32: what
    /// [`Kernels::prefill_tiles`] returned for the same heads, on the device). Keys and values are
    /// read from the cache, where the new tokens' were written before. `q` is
    /// `[tokens, heads, head_dim]`; writes these tokens' rows of `out`,
    /// `[tokens, heads * head_dim]`. Any block size. A token's result depends neither on
    /// other sequences nor on how its own was cut into chunks, to the last bit.
    pub fn attention_prefill(
        &self,
        q: &Tensor,
        kv: &PagedKv,
        tiles: &Tensor,
        out: &Tensor,
        scores: &Scores,
    ) -> Result<(), Error> {
        const OP: &str = "attention_prefill";
        let shape = self.check_attention(OP, q, kv, out)?;
        let operand = Operand {
            op: OP,
            name: "tiles",
            tensor: tiles,
            device: self.device(),
        };
        let [count, _] = operand.of(&[Kind::Int], [None, Some(2)])?;
        let (window, soft_cap) = scores.checked(OP)?;
        let heads = shape.heads;
        let kernel = self.prefill_kernel(heads.head_dim);
        let ratio = heads.heads / heads.kv_heads;
        if ratio > kernel.rows {
            let expected = format!("at most {} for each KV head", kernel.rows);
            return Err(Error::Argument {
                op: OP,
                operand: "heads",
                expected,
                found: ratio.to_string(),
            });
        }
        let mut defines: Defines = smallvec::smallvec![
            (element(q.kind()), 1),
            ("HEAD_DIM", heads.head_dim as i64),
            ("SOFT_CAP", i64::from(scores.soft_cap.is_some())),
        ];
        let mut maps = None;
        if let Some(keys) = kernel.keys {
            let rows = box_rows(shape.block_size, keys);
            defines.push(("BOX", rows as i64));
            let (all, dim) = (shape.blocks * heads.kv_heads * shape.block_size, heads.head_dim);
            let map = |cache| TensorMap::new(cache, [dim, all], &[dim], [64, rows.max(8)]);
            maps = Some((map(kv.k)?, map(kv.v)?));
        }
        let function = self.function(kernel.source, kernel.source.name, &defines)?;
        // The grid's second dimension ends at 65535.
        for begin in (0..count).step_by(65535) {
            let len = 65535.min(count - begin);
            let grid = if kernel.persistent {
                [(heads.kv_heads * len).min(self.num_sms()) as u32, 1, 1]
            } else {
                [heads.kv_heads as u32, len as u32, 1]
            };
            let launch = Launch::new(grid, kernel.block).shared(kernel.shared).pdl();
            let tiles = tiles.narrow(0, begin as i64, len as i64);
            let mut args = vec![
                q.into(),
                kv.k.into(),
                kv.v.into(),
                kv.block_tables.into(),
                kv.query_start.into(),
                kv.context_len.into(),
                (&tiles).into(),
                out.into(),
                Arg::from(shape.tokens as i32),
                Arg::from(shape.seqs as i32),
                Arg::from(heads.heads as i32),
                Arg::from(heads.kv_heads as i32),
                Arg::from(shape.width as i32),
                Arg::from(shape.blocks as i32),
                Arg::from(shape.block_size as i32),
                Arg::from(window),
                Arg::from(scores.scale as f32),
                Arg::from(soft_cap),
                Arg::from(len as i32),
            ];
            if let Some((k, v)) = &maps {
                args.extend([Arg::from(k), Arg::from(v)]);
            }
            // SAFETY: the shapes were checked, and the maps are of the caches; what the device holds is
            // checked in the kernel.
            unsafe { self.launch(function, &launch, &args)? };
        }
        Ok(())
    }
}

struct PrefillKernel {
    source: &'static Source,
    rows: usize,
    block: u32,
    shared: u32,
    /// Its blocks walk over the tiles: as many as there are SMs will do.
    persistent: bool,
    /// In a step, if it copies them by TMA.
    keys: Option<usize>,
}

/// How many consecutive rows of the cache one TMA copy takes: all of a block, or of a step, if its
/// swizzled rows then begin at a multiple of eight. 0 if there is no such number.
fn box_rows(block_size: usize, keys: usize) -> usize {
    match block_size.min(keys) {
        rows if rows >= 8 && keys % rows == 0 && block_size % rows == 0 => rows,
        _ => 0,
    }
}
