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
        include_str!("../../csrc/cuda/attention_tiles.cuh"),
        include_str!("../../csrc/cuda/attention_prefill_sm90.cu")
    ),
    variants: &[
        &["T_BF16=1", "HEAD_DIM=128", "SOFT_CAP=0", "BOX=16"],
        &["T_HALF=1", "HEAD_DIM=64", "SOFT_CAP=0", "BOX=128"],
        &["T_HALF=1", "HEAD_DIM=256", "SOFT_CAP=1", "BOX=64"],
    ],
};

impl Kernels {
    /// The kernel for prefill on this device.
    fn prefill_kernel(&self, head_dim: usize, block_size: usize) -> PrefillKernel {
        let (rows, keys) = (128, if head_dim == 256 { 64 } else { 128 });
        let box_rows = match matches!(head_dim, 64 | 128 | 256) {
            true => box_rows(block_size, keys),
            false => None,
        };
        if let (Some(box_rows), (9, 0)) = (box_rows, self.capability()) {
            return PrefillKernel {
                source: &SM90,
                rows,
                block: 384,
                // And room to begin at a multiple of 1024.
                shared: ((rows + 4 * keys) * head_dim * 2 + 1024) as u32,
                box_rows: Some(box_rows),
            };
        }
        let (warps, keys) = if head_dim > 128 { (4, 32) } else { (8, 64) };
        let rows = 16 * warps;
        PrefillKernel {
            source: &SOURCE,
            rows,
            block: 32 * warps as u32,
            shared: ((rows + 4 * keys) * head_dim * 2) as u32,
            box_rows: None,
        }
    }

    /// The tiles of a step's prefill, for [`Kernels::attention_prefill`]: triples of a sequence's
    /// index, a tile's first token and a KV head, and a triple of zeros in which the kernel counts; none
    /// if there is nothing to do. `chunks` are (index of a sequence, number of its
    /// new tokens, its context with them); `block_size` is that of the cache.
    ///
    /// Tiles that read the same keys and values follow one another, so that these are in the L2 cache,
    /// heaviest first, and the shortest sequence comes last, so that all multiprocessors end at about
    /// the same time.
    pub fn prefill_tiles(
        &self,
        heads: Heads,
        block_size: usize,
        chunks: &[(usize, usize, usize)],
    ) -> Vec<i32> {
        /// Bytes of keys and values that stay in the L2 cache beside what streams through it.
        const CACHED: usize = 12 << 20;
        let kv_heads = heads.kv_heads.max(1);
        let ratio = (heads.heads / kv_heads).max(1);
        let kernel = self.prefill_kernel(heads.head_dim, block_size);
        let step = (kernel.rows / ratio).max(1);
        let mut chunks: Vec<_> = chunks.iter().filter(|(_, len, _)| *len > 0).collect();
        chunks.sort_by_key(|(_, _, context)| std::cmp::Reverse(*context));
        let mut tiles = Vec::new();
        for &&(seq, len, context) in &chunks {
            let bytes = context * heads.head_dim * 4; // of one head, in two bytes an element
            let together = (CACHED / bytes.max(1)).clamp(1, kv_heads);
            for first_head in (0..kv_heads).step_by(together) {
                let heads = first_head..kv_heads.min(first_head + together);
                for first in (0..len).step_by(step).rev() {
                    for head in heads.clone() {
                        tiles.extend([seq as i32, first as i32, head as i32]);
                    }
                }
            }
        }
        if !tiles.is_empty() {
            tiles.extend([0; 3]);
        }
        tiles
    }

    /// Causal attention of every token of the sequences that `tiles` names (`[n + 1, 3]` int32: what
    /// [`Kernels::prefill_tiles`] returned for the same heads and blocks, on the device, for one kernel at a
    /// time). Keys and values are
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
        let [rows, _] = operand.of(&[Kind::Int], [None, Some(3)])?;
        // Less the row that counts.
        let count = rows.saturating_sub(1);
        if count == 0 {
            return Ok(());
        }
        let (window, soft_cap) = scores.checked(OP)?;
        let heads = shape.heads;
        let kernel = self.prefill_kernel(heads.head_dim, shape.block_size);
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
        let mut args: Vec<Arg> = vec![
            q.into(),
            kv.k.into(),
            kv.v.into(),
            kv.block_tables.into(),
            kv.query_start.into(),
            kv.context_len.into(),
            tiles.into(),
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
        ];
        let (mut grid, maps);
        grid = count;
        if let Some(rows) = kernel.box_rows {
            defines.push(("BOX", rows as i64));
            let (all, dim) = (
                shape.blocks * heads.kv_heads * shape.block_size,
                heads.head_dim,
            );
            let panels = dim / 64;
            let cache = |cache| {
                TensorMap::new(
                    cache,
                    [64, 8, panels, all / 8],
                    &[dim, 64, 8 * dim],
                    [64, 8, panels, rows / 8],
                )
            };
            let q = TensorMap::new(
                q,
                [dim, heads.heads, shape.tokens],
                &[dim, heads.heads * dim],
                [64, ratio, kernel.rows / ratio],
            )?;
            maps = [q, cache(kv.k)?, cache(kv.v)?];
            args.push(Arg::from(count as i32));
            args.extend(maps.iter().map(Arg::from));
            grid = count.min(self.num_sms());
        }
        let function = self.function(kernel.source, kernel.source.name, &defines)?;
        let launch = Launch::new([grid as u32, 1, 1], kernel.block)
            .shared(kernel.shared)
            .pdl();
        // SAFETY: the shapes were checked, and the maps are of the tensors; what the device holds is
        // checked in the kernel.
        unsafe { self.launch(function, &launch, &args)? };
        Ok(())
    }
}

struct PrefillKernel {
    source: &'static Source,
    rows: usize,
    block: u32,
    shared: u32,
    /// If it copies by TMA, so many rows of the cache at a time. Its blocks then walk over the tiles: as
    /// many as there are multiprocessors will do.
    box_rows: Option<usize>,
}

/// How many consecutive rows of the cache one TMA copy takes: all of a block, or of a step of `keys`,
/// in parts that begin at multiples of eight, as the swizzle wants. `None` if there is no such number.
fn box_rows(block_size: usize, keys: usize) -> Option<usize> {
    let mut rows = keys;
    while rows >= 8 {
        if block_size.is_multiple_of(rows) {
            return Some(rows);
        }
        rows /= 2;
    }
    None
}
