//! Attention of one query for each sequence over the paged cache.

use tch::{Kind, Tensor};

use super::CudaError;
use super::attention::{Heads, PagedKv, Scores, Shape, check_heads};
use super::check::Operand;
use super::compile::Source;
use super::kernels::{Arg, Defines, Kernels, Launch};
use super::rope::{WriteKv, WriteShape, element};
use crate::Error;

pub(crate) static SOURCE: Source = Source {
    name: "attention_decode",
    text: concat!(
        include_str!("../../csrc/cuda/rope.cuh"),
        include_str!("../../csrc/cuda/attention_decode_work.cuh"),
        include_str!("../../csrc/cuda/attention_decode.cu")
    ),
    variants: &[
        &[
            "T_BF16=1",
            "HEAD_DIM=128",
            "STAGES=3",
            "WIDE=0",
            "ANY_BLOCK=0",
            "SOFT_CAP=0",
            "FUSED=1",
            "ROTARY_DIM=128",
            "QK_NORM=1",
        ],
        &[
            "T_HALF=1",
            "HEAD_DIM=80",
            "STAGES=2",
            "WIDE=1",
            "ANY_BLOCK=1",
            "SOFT_CAP=1",
            "FUSED=0",
        ],
        &[
            "T_HALF=1",
            "HEAD_DIM=80",
            "STAGES=2",
            "WIDE=1",
            "ANY_BLOCK=1",
            "SOFT_CAP=1",
            "FUSED=1",
            "ROTARY_DIM=32",
            "QK_NORM=0",
        ],
    ],
};
/// Warps of a decode block, tokens of a decode tile: WARPS and TILE in the source.
const WARPS: usize = 4;
const TILE: usize = 16;
/// ONE_SPLIT and MIN_SPLIT in the source, in tiles.
const ONE_SPLIT: usize = 24;
const MIN_SPLIT: usize = 16;
/// One long sequence is cut into about as many items as keep a GPU busy.
const ITEMS: usize = 256;
/// Most thread blocks of a multiprocessor.
const MOST_BLOCKS: usize = 2;
/// With more sequences L2 gives up keys and values before other lines: they come again in the next step, when L2 has
/// seen all weights and has room for few of them. With no more, steps of 0.6B at batch 8 and 16 took 1 % longer so.
const FEW_SEQS: usize = 16;
/// Tiles and leads for each thread block from which contexts of one split each are cut evenly.
const EVEN: i32 = 144;
/// Sequences of one decode launch: their list is in shared memory.
const LAUNCH_SEQS: usize = 256;

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
    invariant: bool,
    part: Tensor,
    part_max: Tensor,
    counters: Tensor,
}

impl DecodeWorkspace {
    /// Another handle on the same memory.
    pub fn shallow_clone(&self) -> Self {
        Self {
            part: self.part.shallow_clone(),
            part_max: self.part_max.shallow_clone(),
            counters: self.counters.shallow_clone(),
            ..*self
        }
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> usize {
        4 * [&self.part, &self.part_max, &self.counters]
            .map(Tensor::numel)
            .iter()
            .sum::<usize>()
    }
}

impl Kernels {
    /// A workspace for up to `max_seqs` sequences of up to `max_context` tokens. With `invariant` a
    /// sequence's result does not depend on the others, to the last bit; that takes more memory, and more
    /// time where there are many or long sequences.
    pub fn decode_workspace(
        &self,
        heads: Heads,
        max_seqs: usize,
        max_context: usize,
        invariant: bool,
    ) -> Result<DecodeWorkspace, Error> {
        check_heads("decode_workspace", &heads)?;
        let seqs = max_seqs.clamp(1, LAUNCH_SEQS);
        let lists = seqs * heads.lists();
        let items = match invariant {
            true => lists * heads.splits(max_context),
            // Two parts for each thread block of the largest grid.
            false => 2 * MOST_BLOCKS * self.num_sms(),
        };
        let rows = items * heads.rows().rows;
        let make = |len: usize, kind| {
            Tensor::f_zeros([len as i64], (kind, self.device()))
                .map_err(|e| Error::from(CudaError(e.to_string())))
        };
        Ok(DecodeWorkspace {
            heads,
            max_seqs,
            max_context,
            invariant,
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
    /// up to `max_context` (longer ones are cut off there), at the cost of what is there. Whether a
    /// sequence's result depends on the others, by rounding, is the workspace's choice. Block sizes
    /// that are a multiple of 16 are fast, others work.
    ///
    /// All lists, and keys and values but those of the `fresh` newest tokens of each context, are
    /// read before the kernel waits for the one before it: no kernel that lets its successor start
    /// early may write them. So `fresh` is 1 if the kernel before writes one token of each sequence,
    /// and their number if it writes several (`usize::MAX`: any).
    #[allow(clippy::too_many_arguments, reason = "what attention is made of")]
    pub fn attention_decode(
        &self,
        q: &Tensor,
        kv: &PagedKv,
        seqs: &Tensor,
        out: &Tensor,
        scores: &Scores,
        max_context: usize,
        fresh: usize,
        workspace: &DecodeWorkspace,
    ) -> Result<(), Error> {
        const OP: &str = "attention_decode";
        let shape = self.check_attention(OP, q, kv, out)?;
        let work = Work {
            op: OP,
            q,
            kv,
            seqs: Some(seqs),
            out,
            scores,
            max_context,
            workspace,
        };
        self.decode(&work, &shape, fresh, None)
    }

    /// [`write_kv`](Self::write_kv) and then [`attention_decode`](Self::attention_decode), the same bits
    /// in one kernel, where every sequence of `kv` has one token in the batch, its newest: that one's key and
    /// value go where the block table has the context's last token (`fresh.slots` is not looked at).
    /// `fresh`'s cache must be `kv`'s. A sequence with a context of more than `max_context` tokens is
    /// left out.
    ///
    /// As there, lists and the keys and values of earlier tokens are read before the kernel waits for
    /// the one before it, and so are the norms' weights.
    #[allow(clippy::too_many_arguments, reason = "what attention is made of")]
    pub fn attention_decode_fused(
        &self,
        fresh: &WriteKv,
        kv: &PagedKv,
        out: &Tensor,
        scores: &Scores,
        max_context: usize,
        workspace: &DecodeWorkspace,
    ) -> Result<(), Error> {
        const OP: &str = "attention_decode_fused";
        let write = fresh.check(OP, self.device())?;
        let (tokens, heads) = (write.tokens as i64, write.heads as i64);
        if (fresh.k_cache.data_ptr(), fresh.v_cache.data_ptr())
            != (kv.k.data_ptr(), kv.v.data_ptr())
        {
            return Err(Error::Argument {
                op: OP,
                operand: "k_cache",
                expected: "the cache that is attended to".to_owned(),
                found: "another".to_owned(),
            });
        }
        // Of the shape that the check wants; the kernel reads `qkv`.
        let q = fresh
            .qkv
            .view([-1])
            .narrow(0, 0, tokens * heads * write.head_dim as i64)
            .view([tokens, heads, write.head_dim as i64]);
        let shape = self.check_attention(OP, &q, kv, out)?;
        let work = Work {
            op: OP,
            q: fresh.qkv,
            kv,
            seqs: None,
            out,
            scores,
            max_context,
            workspace,
        };
        self.decode(&work, &shape, 0, Some((fresh, &write)))
    }

    fn decode(
        &self,
        work: &Work,
        shape: &Shape,
        fresh: usize,
        fused: Option<(&WriteKv, &WriteShape)>,
    ) -> Result<(), Error> {
        let &Work {
            op,
            q,
            kv,
            seqs,
            out,
            scores,
            max_context,
            workspace,
        } = work;
        let operand = |name, tensor| Operand {
            op,
            name,
            tensor,
            device: self.device(),
        };
        let n = match seqs {
            Some(seqs) => operand("seqs", seqs).of(&[Kind::Int], [None])?[0],
            None => shape.seqs,
        };
        let heads = shape.heads;
        let fits = heads == workspace.heads
            && workspace.part.device() == self.device()
            && n <= workspace.max_seqs
            && max_context <= workspace.max_context;
        if !fits {
            let (given, most) = (&workspace.heads, workspace.max_seqs);
            return Err(Error::Argument {
                op,
                operand: "workspace",
                expected: format!("one for {heads:?}, {n} sequences of {max_context} tokens"),
                found: format!("{given:?}, {most} of {}", workspace.max_context),
            });
        }
        let (window, soft_cap) = scores.checked(op)?;
        let rows = heads.rows();
        let splits = heads.splits(max_context);
        let even = if workspace.invariant { 0 } else { EVEN };
        let plan = DecodePlan::new(
            &heads,
            n.min(LAUNCH_SEQS),
            fused.is_some(),
            self.capability(),
        )?;
        let mut defines: Defines = smallvec::smallvec![
            (element(q.kind()), 1),
            ("HEAD_DIM", heads.head_dim as i64),
            ("STAGES", plan.stages as i64),
            ("WIDE", i64::from(rows.rows > 8)),
            (
                "ANY_BLOCK",
                i64::from(!shape.block_size.is_multiple_of(TILE)),
            ),
            ("SOFT_CAP", i64::from(scores.soft_cap.is_some())),
            ("FUSED", i64::from(fused.is_some())),
        ];
        if let Some((fresh, write)) = fused {
            defines.push(("ROTARY_DIM", write.rotary_dim as i64));
            defines.push(("QK_NORM", i64::from(fresh.qk_norm.is_some())));
        }
        let function = self.function(&SOURCE, "attention_decode", &defines)?;
        for begin in (0..n).step_by(LAUNCH_SEQS) {
            let count = LAUNCH_SEQS.min(n - begin);
            let items = count * heads.lists() * splits;
            let grid = items.min(self.num_sms() * plan.blocks_per_sm) as u32;
            let launch = Launch::new([grid, 1, 1], 32 * WARPS as u32)
                .shared(plan.shared as u32)
                .pdl();
            let seqs = seqs.map(|seqs| seqs.narrow(0, begin as i64, count as i64));
            let mut args = vec![
                q.into(),
                kv.k.into(),
                kv.v.into(),
                kv.block_tables.into(),
                kv.query_start.into(),
                kv.context_len.into(),
                seqs.as_ref().into(),
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
                Arg::from(even),
                Arg::from(scores.scale as f32),
                Arg::from(soft_cap),
                Arg::from(fresh.min(i32::MAX as usize) as i32),
                Arg::from(begin as i32),
                Arg::from(i32::from(n > FEW_SEQS)),
            ];
            if let Some((fresh, write)) = fused {
                args.extend([
                    kv.k.into(),
                    kv.v.into(),
                    fresh.qk_norm.map(|norms| norms.0).into(),
                    fresh.qk_norm.map(|norms| norms.1).into(),
                    Arg::from(fresh.eps as f32),
                    fresh.cos.into(),
                    fresh.sin.into(),
                    fresh.rope_index.into(),
                    Arg::from(write.positions as i64),
                ]);
            }
            // SAFETY: the shapes were checked, the workspace has room for all parts that are
            // left, and what the device holds is checked in the kernel.
            unsafe { self.launch(function, &launch, &args)? };
        }
        Ok(())
    }
}

/// What both ways to call the kernel have in common.
struct Work<'a> {
    op: &'static str,
    q: &'a Tensor,
    kv: &'a PagedKv<'a>,
    seqs: Option<&'a Tensor>,
    out: &'a Tensor,
    scores: &'a Scores,
    max_context: usize,
    workspace: &'a DecodeWorkspace,
}

/// How a decode launch uses an SM.
struct DecodePlan {
    stages: usize,
    shared: usize,
    blocks_per_sm: usize,
}

impl DecodePlan {
    fn new(heads: &Heads, n: usize, fused: bool, capability: (i32, i32)) -> Result<Self, Error> {
        let dim = heads.head_dim;
        let merge = WARPS * heads.rows().rows * (dim + 8) * 4;
        let turned = match fused {
            true => (heads.rows().rows + 2) * (dim + 8) * 2,
            false => 0,
        };
        let fixed = merge + WARPS * 16 * 8 + 5 * n * 4 + turned;
        let shared = |stages: usize| WARPS * stages * 2 * TILE * dim * 2 + fixed;
        // Of an SM; each block takes 1 KB more than it asks for, and has 128 bytes of its own.
        let all = match capability {
            (8, 0 | 7) => 164,
            (8, _) | (12, _) => 100,
            _ => 228,
        } * 1024;
        let fits = |stages: usize, blocks: usize| (shared(stages) + 1024 + 160) * blocks <= all;
        let choices = [(4, MOST_BLOCKS), (3, 2), (2, 2), (3, 1), (2, 1), (1, 1)];
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
