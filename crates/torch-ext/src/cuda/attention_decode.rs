//! Attention of one query for each sequence over the paged cache.

use tch::{Kind, Tensor};

use super::CudaError;
use super::attention::{Heads, PagedKv, Scores, Shape};
use super::attention_decode_work::{DecodeWorkspace, LAUNCH_SEQS, MOST_BLOCKS, TILE};
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
            "WARPS=2",
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
            "WARPS=4",
            "STAGES=2",
            "WIDE=1",
            "ANY_BLOCK=1",
            "SOFT_CAP=1",
            "FUSED=0",
        ],
        &[
            "T_HALF=1",
            "HEAD_DIM=80",
            "WARPS=4",
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
/// With more sequences L2 gives up keys and values before other lines: they come again in the next step, when L2 has
/// seen all weights and has room for few of them. With no more, steps of 0.6B at batch 8 and 16 took 1 % longer so.
const FEW_SEQS: usize = 16;
/// Tiles and leads for each thread block from which contexts of one split each are cut evenly.
const EVEN: i32 = 144;

impl Kernels {
    /// Attention of the sequences `seqs` (`[n]` int32, indices into `kv`'s lists), each with one
    /// query, which is its newest token and whose key and value are in the cache. `q` is
    /// `[tokens, heads, head_dim]`; writes rows `query_start[seq]` of `out`,
    /// `[tokens, heads * head_dim]`; zeros where the context is empty.
    ///
    /// The grid depends on `n` and `max_context` alone, so a captured launch serves every context
    /// up to `max_context` (longer ones are cut off there), at the cost of what is there. Whether a
    /// sequence's result depends on the others, by rounding, is the workspace's choice. Block sizes
    /// that are a power of two, at least 16, are fast, others work.
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
    /// the one before it, and so are `rope_index`, the angles and the norms' weights.
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
        let launch_seqs = n.min(LAUNCH_SEQS);
        let crowd = match workspace.invariant {
            true => Crowd::TwoOrAny,
            false => Crowd::of(launch_seqs * heads.lists(), self.num_sms()),
        };
        let plan = DecodePlan::new(&heads, launch_seqs, crowd, self.capability())?;
        let mut defines: Defines = smallvec::smallvec![
            (element(q.kind()), 1),
            ("HEAD_DIM", heads.head_dim as i64),
            ("WARPS", plan.warps as i64),
            ("STAGES", plan.stages as i64),
            ("WIDE", i64::from(rows.rows > 8)),
            (
                "ANY_BLOCK",
                i64::from(!shape.block_size.is_power_of_two() || shape.block_size < TILE),
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
            let launch = Launch::new([grid, 1, 1], 32 * plan.warps as u32)
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

/// How many KV heads of sequences there are for an SM: items, where no context is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Crowd {
    /// At most one: a block has an SM for itself, and eight warps: more of a context is on its way at once.
    One,
    /// At most four, which are blocks of two warps, side by side: two parts to merge for an item instead of four.
    Four,
    /// More: small blocks, too, but with shorter rings, since a ring runs on from item to item.
    More,
    /// Two, which are blocks of four warps; or as it comes: the number of warps decides where sums are rounded, so results
    /// that must not depend on the batch always take the same.
    TwoOrAny,
}

impl Crowd {
    fn of(items: usize, num_sms: usize) -> Self {
        match items.div_ceil(num_sms) {
            0..=1 => Self::One,
            2 => Self::TwoOrAny,
            3..=4 => Self::Four,
            _ => Self::More,
        }
    }
}

/// How a decode launch uses an SM.
struct DecodePlan {
    warps: usize,
    stages: usize,
    shared: usize,
    blocks_per_sm: usize,
}

impl DecodePlan {
    fn new(heads: &Heads, n: usize, crowd: Crowd, capability: (i32, i32)) -> Result<Self, Error> {
        let dim = heads.head_dim;
        let rows = heads.rows().rows;
        let shared = |warps: usize, stages: usize| {
            let merge = warps * (rows * (dim + 8) * 4 + 16 * 8);
            // FUSED's, counted in any case: both ways to call the kernel have one plan.
            let turned = (rows + 2) * (dim + 8) * 2;
            warps * stages * 2 * TILE * dim * 2 + merge + 5 * n * 4 + turned
        };
        // Of an SM; each block takes 1 KB more than it asks for, and has less than 256 bytes of its own.
        let all = match capability {
            (8, 0 | 7) => 164,
            (8, _) | (12, _) => 100,
            _ => 228,
        } * 1024;
        // Warps, stages, blocks of an SM.
        let of_crowd: &[_] = match crowd {
            Crowd::One => &[(8, 3, 1), (8, 2, 1)],
            Crowd::Four => &[(2, 3, MOST_BLOCKS), (2, 2, MOST_BLOCKS)],
            Crowd::More => &[(2, 2, MOST_BLOCKS)],
            Crowd::TwoOrAny => &[],
        };
        let of_all = &[
            (4, 4, 2),
            (4, 3, 2),
            (4, 2, 2),
            (4, 3, 1),
            (4, 2, 1),
            (4, 1, 1),
        ];
        let mut choices = of_crowd.iter().chain(of_all);
        let fits = |warps, stages, blocks| (shared(warps, stages) + 1024 + 256) * blocks <= all;
        match choices.find(|&&(warps, stages, blocks)| fits(warps, stages, blocks)) {
            Some(&(warps, stages, blocks_per_sm)) => Ok(Self {
                warps,
                stages,
                shared: shared(warps, stages),
                blocks_per_sm,
            }),
            None => Err(CudaError(format!(
                "attention_decode: {heads:?} need {} bytes of shared memory, the GPU has {all}",
                shared(4, 1)
            ))
            .into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_fit_the_device() {
        let mut refused = 0;
        for (capability, kib) in [((8, 0), 164), ((8, 9), 100), ((9, 0), 228), ((12, 0), 100)] {
            for (heads, kv_heads, head_dim) in [
                (16, 8, 128),
                (32, 8, 128),
                (16, 1, 128),
                (9, 1, 64),
                (16, 1, 256),
            ] {
                let heads = Heads {
                    heads,
                    kv_heads,
                    head_dim,
                };
                for (n, crowd) in [
                    (1, Crowd::One),
                    (100, Crowd::One),
                    (66, Crowd::Four),
                    (LAUNCH_SEQS, Crowd::More),
                    (LAUNCH_SEQS, Crowd::TwoOrAny),
                ] {
                    let Ok(plan) = DecodePlan::new(&heads, n, crowd, capability) else {
                        refused += 1;
                        continue;
                    };
                    let what = format!("{heads:?} {n} {crowd:?} {capability:?}");
                    // What the driver takes of an SM for a block, and the kernel for itself.
                    let all = (plan.shared + 1024 + 256) * plan.blocks_per_sm;
                    assert!(all <= kib * 1024, "{what}: {all}");
                    assert!(plan.blocks_per_sm <= MOST_BLOCKS && plan.stages >= 1);
                    let roomy = capability == (9, 0) && head_dim <= 128;
                    let few_rows = heads.rows().rows <= 8;
                    match crowd {
                        // Rounding must not depend on the batch.
                        Crowd::TwoOrAny => assert_eq!(plan.warps, 4, "{what}"),
                        Crowd::One => assert!(!roomy || plan.warps == 8, "{what}"),
                        Crowd::Four | Crowd::More => {
                            assert!(!roomy || !few_rows || plan.warps == 2, "{what}")
                        }
                    }
                }
            }
        }
        // Heads of 256 do not fit the smallest.
        assert_eq!(refused, 10);
    }
}
