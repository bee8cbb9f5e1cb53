//! Attention over the paged cache: decode (one query for each sequence) and prefill (chunks).

use tch::{Kind, Tensor};

use super::CudaError;
use super::check::{HALVES, Operand};
use super::compile::Source;
use super::kernels::{Arg, Kernels, Launch};
use super::rope::{element, same_kind};
use crate::Error;

pub(crate) static DECODE: Source = Source {
    name: "attention_decode",
    text: include_str!("../../csrc/cuda/attention_decode.cu"),
    variants: &[
        &[
            "T_BF16=1",
            "HEAD_DIM=128",
            "STAGES=3",
            "WIDE=0",
            "ANY_BLOCK=0",
            "SOFT_CAP=0",
        ],
        &[
            "T_HALF=1",
            "HEAD_DIM=80",
            "STAGES=2",
            "WIDE=1",
            "ANY_BLOCK=1",
            "SOFT_CAP=1",
        ],
    ],
};
pub(crate) static PREFILL: Source = Source {
    name: "attention_prefill",
    text: include_str!("../../csrc/cuda/attention_prefill.cu"),
    variants: &[
        &["T_BF16=1", "HEAD_DIM=128", "SOFT_CAP=0"],
        &["T_HALF=1", "HEAD_DIM=256", "SOFT_CAP=1"],
    ],
};

pub(crate) static PREFILL_SM90: Source = Source {
    name: "attention_prefill_sm90",
    text: include_str!("../../csrc/cuda/attention_prefill_sm90.cu"),
    variants: &[
        &["T_BF16=1", "HEAD_DIM=128", "SOFT_CAP=0"],
        &["T_HALF=1", "HEAD_DIM=64", "SOFT_CAP=0"],
        &["T_HALF=1", "HEAD_DIM=256", "SOFT_CAP=1"],
    ],
};

/// Head sizes that attention is there for.
const HEAD_DIMS: &[usize] = &[64, 80, 96, 128, 256];
/// Warps of a decode block, tokens of a decode tile: WARPS and TILE in the source.
const WARPS: usize = 4;
const TILE: usize = 16;
/// ONE_SPLIT and MIN_SPLIT in the source, in tiles.
const ONE_SPLIT: usize = 24;
const MIN_SPLIT: usize = 16;
/// One long sequence is cut into about as many items as keep a GPU busy.
const ITEMS: usize = 256;
/// Sequences of one decode launch: their list is in shared memory.
const LAUNCH_SEQS: usize = 256;

/// Keys and values of one layer, and which of them belong to whom.
#[derive(Clone, Copy, Debug)]
pub struct PagedKv<'a> {
    /// `[blocks, kv_heads, block_size, head_dim]`, bfloat16 or float16.
    pub k: &'a Tensor,
    /// As `k`.
    pub v: &'a Tensor,
    /// `[seqs, width]` int32: the blocks of each sequence. Only as many entries are read as its
    /// context needs.
    pub block_tables: &'a Tensor,
    /// `[seqs + 1]` int32: the row in `q` where each sequence's tokens begin, and the end.
    pub query_start: &'a Tensor,
    /// `[seqs]` int32: tokens in the cache, the new ones included. 0 for padding.
    pub context_len: &'a Tensor,
}

/// What is done to the scores.
#[derive(Clone, Copy, Debug)]
pub struct Scores {
    /// Factor on them.
    pub scale: f64,
    /// How many of the latest tokens a query attends to, itself included; `None` for all.
    pub window: Option<usize>,
    /// `Some(c)`: a score `s` counts as `c * tanh(s / c)`.
    pub soft_cap: Option<f64>,
}

/// How many heads there are, and how large.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Dimensions: 64, 80, 96, 128 or 256.
    pub head_dim: usize,
}

/// How the heads that share a KV head are laid on the tensor cores' 16 rows in decode.
#[derive(Clone, Copy, Debug)]
struct Rows {
    /// Groups of one KV head: more than one if its heads are more than the rows.
    groups: usize,
    /// Heads in a group.
    rows: usize,
    /// Most splits of a context.
    max_splits: usize,
}

impl Heads {
    fn rows(&self) -> Rows {
        let ratio = self.heads / self.kv_heads;
        // The registers hold 16 rows of up to 128 dimensions.
        let most = if self.head_dim > 128 { 8 } else { 16 };
        let groups = ratio.div_ceil(most);
        Rows {
            groups,
            rows: ratio.div_ceil(groups),
            max_splits: (ITEMS / (self.kv_heads * groups)).max(8),
        }
    }

    /// Lists of partial results: one for each sequence and this many.
    fn lists(&self) -> usize {
        self.kv_heads * self.rows().groups
    }

    /// Most splits that a context of up to `max_context` tokens has.
    fn splits(&self, max_context: usize) -> usize {
        // One more: a window may begin within a tile.
        let tiles = max_context.div_ceil(TILE) + 1;
        if tiles <= ONE_SPLIT {
            return 1;
        }
        tiles.div_ceil(MIN_SPLIT).min(self.rows().max_splits)
    }
}

/// Memory that [`Kernels::attention_decode`] keeps its partial results in. One is enough for all
/// layers and all graphs of a stream; kernels that may run at the same time need one each.
#[derive(Debug)]
pub struct DecodeWorkspace {
    heads: Heads,
    max_seqs: usize,
    max_context: usize,
    part: Tensor,
    part_max: Tensor,
    counters: Tensor,
}

impl DecodeWorkspace {
    /// Bytes on the device.
    pub fn bytes(&self) -> usize {
        4 * [&self.part, &self.part_max, &self.counters]
            .map(Tensor::numel)
            .iter()
            .sum::<usize>()
    }
}

impl Kernels {
    /// A workspace for up to `max_seqs` sequences of up to `max_context` tokens.
    pub fn decode_workspace(
        &self,
        heads: Heads,
        max_seqs: usize,
        max_context: usize,
    ) -> Result<DecodeWorkspace, Error> {
        check_heads("decode_workspace", &heads)?;
        let seqs = max_seqs.clamp(1, LAUNCH_SEQS);
        let lists = seqs * heads.lists();
        let rows = lists * heads.splits(max_context) * heads.rows().rows;
        let make = |len: usize, kind| {
            Tensor::f_zeros([len as i64], (kind, self.device()))
                .map_err(|e| Error::from(CudaError(e.to_string())))
        };
        Ok(DecodeWorkspace {
            heads,
            max_seqs,
            max_context,
            part: make(rows * heads.head_dim, Kind::Float)?,
            part_max: make(rows * 2, Kind::Float)?,
            counters: make(lists, Kind::Int)?,
        })
    }

    /// Attention of the sequences `seqs` (`[n]` int32, indices into `kv`'s lists), each with one
    /// query, which is its newest token and whose key and value are in the cache. `q` is
    /// `[tokens, heads, head_dim]`; writes rows `query_start[seq]` of `out`,
    /// `[tokens, heads * head_dim]`; zeros where the context is empty.
    ///
    /// The grid depends on `n` and `max_context` alone, so a captured launch serves every context
    /// up to `max_context` (longer ones are cut off there), at the cost of what is there. A
    /// sequence's result does not depend on the others, to the last bit. Block sizes that are a
    /// multiple of 16 are fast, others work.
    ///
    /// All lists, and keys and values but the newest token's, are read before the kernel waits for
    /// the one before it: no kernel that lets its successor start early may write them.
    #[allow(clippy::too_many_arguments, reason = "what attention is made of")]
    pub fn attention_decode(
        &self,
        q: &Tensor,
        kv: &PagedKv,
        seqs: &Tensor,
        out: &Tensor,
        scores: &Scores,
        max_context: usize,
        workspace: &DecodeWorkspace,
    ) -> Result<(), Error> {
        const OP: &str = "attention_decode";
        let shape = self.check(OP, q, kv, out)?;
        let operand = |name, tensor| Operand {
            op: OP,
            name,
            tensor,
            device: self.device(),
        };
        let [n] = operand("seqs", seqs).of(&[Kind::Int], [None])?;
        let heads = shape.heads;
        let fits = heads == workspace.heads
            && workspace.part.device() == self.device()
            && n <= workspace.max_seqs
            && max_context <= workspace.max_context;
        if !fits {
            let (given, most) = (&workspace.heads, workspace.max_seqs);
            return Err(Error::Argument {
                op: OP,
                operand: "workspace",
                expected: format!("one for {heads:?}, {n} sequences of {max_context} tokens"),
                found: format!("{given:?}, {most} of {}", workspace.max_context),
            });
        }
        let (window, soft_cap) = scores.checked(OP)?;
        let rows = heads.rows();
        let splits = heads.splits(max_context);
        let plan = DecodePlan::new(&heads, n.min(LAUNCH_SEQS), self.capability())?;
        let defines = [
            (element(q.kind()), 1),
            ("HEAD_DIM", heads.head_dim as i64),
            ("STAGES", plan.stages as i64),
            ("WIDE", i64::from(rows.rows > 8)),
            (
                "ANY_BLOCK",
                i64::from(!shape.block_size.is_multiple_of(TILE)),
            ),
            ("SOFT_CAP", i64::from(scores.soft_cap.is_some())),
        ];
        let function = self.function(&DECODE, "attention_decode", &defines)?;
        for begin in (0..n).step_by(LAUNCH_SEQS) {
            let count = LAUNCH_SEQS.min(n - begin);
            let items = count * heads.lists() * splits;
            let grid = items.min(self.num_sms() * plan.blocks_per_sm) as u32;
            let launch = Launch::new([grid, 1, 1], 32 * WARPS as u32)
                .shared(plan.shared as u32)
                .pdl();
            let seqs = seqs.narrow(0, begin as i64, count as i64);
            let args = [
                q.into(),
                kv.k.into(),
                kv.v.into(),
                kv.block_tables.into(),
                kv.query_start.into(),
                kv.context_len.into(),
                (&seqs).into(),
                out.into(),
                (&workspace.part).into(),
                (&workspace.part_max).into(),
                (&workspace.counters).into(),
                Arg::from(count as i32),
                Arg::from(shape.tokens as i32),
                Arg::from(shape.seqs as i32),
                Arg::from(heads.heads as i32),
                Arg::from(heads.kv_heads as i32),
                Arg::from(rows.groups as i32),
                Arg::from(rows.rows as i32),
                Arg::from(shape.width as i32),
                Arg::from(shape.blocks as i32),
                Arg::from(shape.block_size as i32),
                Arg::from(max_context.min(i32::MAX as usize) as i32),
                Arg::from(window),
                Arg::from(rows.max_splits as i32),
                Arg::from(splits as i32),
                Arg::from(scores.scale as f32),
                Arg::from(soft_cap),
            ];
            // SAFETY: the shapes were checked, the workspace has room for `count` sequences of
            // `splits` splits, and what the device holds is checked in the kernel.
            unsafe { self.launch(function, &launch, &args)? };
        }
        Ok(())
    }

    /// The kernel for prefill on this device.
    fn prefill_kernel(&self, head_dim: usize) -> PrefillKernel {
        if self.capability() == (9, 0) && matches!(head_dim, 64 | 128 | 256) {
            let (rows, keys) = (128, if head_dim == 256 { 64 } else { 128 });
            return PrefillKernel {
                source: &PREFILL_SM90,
                rows,
                block: 384,
                // And room to begin at a multiple of 1024.
                shared: ((rows + 4 * keys) * head_dim * 2 + 1024) as u32,
                persistent: true,
            };
        }
        let (warps, keys) = if head_dim > 128 { (4, 32) } else { (8, 64) };
        let rows = 16 * warps;
        PrefillKernel {
            source: &PREFILL,
            rows,
            block: 32 * warps as u32,
            shared: ((rows + 4 * keys) * head_dim * 2) as u32,
            persistent: false,
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
    /// `[tokens, heads * head_dim]`. Any block size; a token's result depends on its place in its
    /// chunk and on its context, not on other sequences.
    pub fn attention_prefill(
        &self,
        q: &Tensor,
        kv: &PagedKv,
        tiles: &Tensor,
        out: &Tensor,
        scores: &Scores,
    ) -> Result<(), Error> {
        const OP: &str = "attention_prefill";
        let shape = self.check(OP, q, kv, out)?;
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
        let defines = [
            (element(q.kind()), 1),
            ("HEAD_DIM", heads.head_dim as i64),
            ("SOFT_CAP", i64::from(scores.soft_cap.is_some())),
        ];
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
            let args = [
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
            // SAFETY: the shapes were checked; what the device holds is checked in the kernel.
            unsafe { self.launch(function, &launch, &args)? };
        }
        Ok(())
    }

    fn check(
        &self,
        op: &'static str,
        q: &Tensor,
        kv: &PagedKv,
        out: &Tensor,
    ) -> Result<Shape, Error> {
        let operand = |name, tensor| Operand {
            op,
            name,
            tensor,
            device: self.device(),
        };
        let k = operand("k", kv.k);
        let cache = k.of(HALVES, [None, None, None, None])?;
        let [blocks, kv_heads, block_size, head_dim] = cache;
        let kind = same_kind(kv.k.kind());
        operand("v", kv.v).of(kind, cache.map(Some))?;
        if blocks == 0 || block_size == 0 {
            return Err(k.argument("at least one block of one token", format!("{cache:?}")));
        }
        let [tokens, num_heads, _] = operand("q", q).of(kind, [None, None, Some(head_dim)])?;
        let heads = Heads {
            heads: num_heads,
            kv_heads,
            head_dim,
        };
        check_heads(op, &heads)?;
        operand("out", out).of(kind, [Some(tokens), Some(num_heads * head_dim)])?;
        let [seqs] = operand("context_len", kv.context_len).of(&[Kind::Int], [None])?;
        operand("query_start", kv.query_start).of(&[Kind::Int], [Some(seqs + 1)])?;
        let tables = operand("block_tables", kv.block_tables);
        let [_, width] = tables.of(&[Kind::Int], [Some(seqs), None])?;
        if width == 0 && seqs > 0 {
            return Err(tables.argument("at least one column", 0));
        }
        Ok(Shape {
            heads,
            tokens,
            seqs,
            width,
            blocks,
            block_size,
        })
    }
}

/// Sizes that were found in the arguments.
struct Shape {
    heads: Heads,
    tokens: usize,
    seqs: usize,
    width: usize,
    blocks: usize,
    block_size: usize,
}

struct PrefillKernel {
    source: &'static Source,
    rows: usize,
    block: u32,
    shared: u32,
    /// Its blocks walk over the tiles: as many as there are SMs will do.
    persistent: bool,
}

/// How a decode launch uses an SM.
struct DecodePlan {
    stages: usize,
    shared: usize,
    blocks_per_sm: usize,
}

impl DecodePlan {
    fn new(heads: &Heads, n: usize, capability: (i32, i32)) -> Result<Self, Error> {
        let dim = heads.head_dim;
        let merge = WARPS * heads.rows().rows * (dim + 8) * 4;
        let fixed = merge + WARPS * 16 * 8 + 4 * n * 4;
        let shared = |stages: usize| WARPS * stages * 2 * TILE * dim * 2 + fixed;
        // Of an SM; each block takes 1 KB more than it asks for, and has 128 bytes of its own.
        let all = match capability {
            (8, 0 | 7) => 164,
            (8, _) | (12, _) => 100,
            _ => 228,
        } * 1024;
        let fits = |stages: usize, blocks: usize| (shared(stages) + 1024 + 160) * blocks <= all;
        let choices = [(4, 2), (3, 2), (2, 2), (3, 1), (2, 1), (1, 1)];
        match choices
            .iter()
            .find(|(stages, blocks)| fits(*stages, *blocks))
        {
            Some(&(stages, blocks_per_sm)) => Ok(Self {
                stages,
                shared: shared(stages),
                blocks_per_sm,
            }),
            None => Err(CudaError(format!(
                "attention_decode: {heads:?} need {} bytes of shared memory, the GPU has {all}",
                shared(1)
            ))
            .into()),
        }
    }
}

impl Scores {
    /// The window (0: none) and the cap (0: none) as the kernels take them.
    fn checked(&self, op: &'static str) -> Result<(i32, f32), Error> {
        let wrong = |operand, expected: &str, found: String| Error::Argument {
            op,
            operand,
            expected: expected.into(),
            found,
        };
        if !self.scale.is_finite() {
            return Err(wrong("scale", "finite", self.scale.to_string()));
        }
        if self.window == Some(0) {
            return Err(wrong(
                "window",
                "at least 1, the query's own token",
                "0".into(),
            ));
        }
        if let Some(cap) = self.soft_cap.filter(|cap| !(cap.is_finite() && *cap > 0.0)) {
            return Err(wrong("soft_cap", "finite and positive", cap.to_string()));
        }
        let window = self.window.map_or(0, |w| w.min(i32::MAX as usize) as i32);
        Ok((window, self.soft_cap.unwrap_or(0.0) as f32))
    }
}

fn check_heads(op: &'static str, heads: &Heads) -> Result<(), Error> {
    let known = HEAD_DIMS.contains(&heads.head_dim);
    if known && heads.kv_heads > 0 && heads.heads > 0 && heads.heads % heads.kv_heads == 0 {
        return Ok(());
    }
    Err(Error::Argument {
        op,
        operand: "heads",
        expected: format!("a multiple of the KV heads, of size {HEAD_DIMS:?}"),
        found: format!("{heads:?}"),
    })
}
