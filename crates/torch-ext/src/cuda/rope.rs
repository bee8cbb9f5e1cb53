//! From the QKV product to queries and to keys and values in the cache.

use tch::{Device, Kind, Tensor};

use super::check::{HALVES, Operand};
use super::compile::Source;
use super::kernels::{Arg, Kernels, Launch};
use crate::Error;

pub(crate) static SOURCE: Source = Source {
    name: "rope_cache",
    text: concat!(
        include_str!("../../csrc/cuda/rope.cuh"),
        include_str!("../../csrc/cuda/rope_cache.cu")
    ),
    variants: &[
        &[
            "T_BF16=1",
            "HEAD_DIM=128",
            "ROTARY_DIM=128",
            "QK_NORM=1",
            "HEADS=4",
        ],
        &[
            "T_HALF=1",
            "HEAD_DIM=80",
            "ROTARY_DIM=32",
            "QK_NORM=0",
            "HEADS=1",
        ],
    ],
};

pub(crate) static MANY: Source = Source {
    name: "rope_cache_many",
    text: concat!(
        include_str!("../../csrc/cuda/rope.cuh"),
        include_str!("../../csrc/cuda/rope_cache_many.cu")
    ),
    variants: &[
        &[
            "T_BF16=1",
            "HEAD_DIM=128",
            "ROTARY_DIM=128",
            "QK_NORM=1",
            "HEADS=4",
        ],
        &[
            "T_HALF=1",
            "HEAD_DIM=64",
            "ROTARY_DIM=64",
            "QK_NORM=0",
            "HEADS=4",
        ],
    ],
};

/// Warps of a thread block: WARPS in the sources.
const WARPS: usize = 8;
/// From this many tokens on, a warp takes several heads.
const MANY_TOKENS: usize = 256;

/// Arguments of [`Kernels::write_kv`]. `T` is bfloat16 or float16, the same for all that have it.
#[derive(Debug)]
pub struct WriteKv<'a> {
    /// `[tokens, (heads + 2 kv_heads) * head_dim]` of `T`: queries, keys, values.
    pub qkv: &'a Tensor,
    /// Weights (`[head_dim]` of `T`) of the norms of each head of Q and of K, if there are any.
    pub qk_norm: Option<(&'a Tensor, &'a Tensor)>,
    /// Epsilon of these norms.
    pub eps: f64,
    /// `[positions, rotary_dim / 2]` float32, `rotary_dim` a multiple of 4 up to `head_dim`.
    pub cos: &'a Tensor,
    /// As `cos`.
    pub sin: &'a Tensor,
    /// `[tokens]` int64: row of `cos` and `sin`. An index outside takes the nearest row.
    pub rope_index: &'a Tensor,
    /// `[tokens]` int64: `block * block_size + offset`. Nothing is written for one outside of the
    /// cache, which is how padding (negative) passes.
    pub slots: &'a Tensor,
    /// `[blocks, kv_heads, block_size, head_dim]` of `T`.
    pub k_cache: &'a Tensor,
    /// As `k_cache`.
    pub v_cache: &'a Tensor,
}

/// What the tensors of a [`WriteKv`] are, once they were checked.
pub(super) struct WriteShape {
    pub(super) tokens: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) blocks: usize,
    pub(super) block_size: usize,
    pub(super) positions: usize,
    pub(super) rotary_dim: usize,
}

impl WriteKv<'_> {
    pub(super) fn check(&self, op: &'static str, device: Device) -> Result<WriteShape, Error> {
        let operand = |name, tensor| Operand {
            op,
            name,
            tensor,
            device,
        };
        let k_cache = operand("k_cache", self.k_cache);
        let shape = k_cache.of(HALVES, [None, None, None, None])?;
        let [blocks, kv_heads, block_size, head_dim] = shape;
        let kind: &'static [Kind] = same_kind(self.k_cache.kind());
        operand("v_cache", self.v_cache).of(kind, shape.map(Some))?;
        let qkv = operand("qkv", self.qkv);
        let [tokens, width] = qkv.of(kind, [None, None])?;
        let cos = operand("cos", self.cos);
        let [positions, half] = cos.of(&[Kind::Float], [None, None])?;
        operand("sin", self.sin).of(&[Kind::Float], [Some(positions), Some(half)])?;
        operand("rope_index", self.rope_index).of(&[Kind::Int64], [Some(tokens)])?;
        operand("slots", self.slots).of(&[Kind::Int64], [Some(tokens)])?;
        if let Some((q_norm, k_norm)) = self.qk_norm {
            operand("q_norm", q_norm).of(kind, [Some(head_dim)])?;
            operand("k_norm", k_norm).of(kind, [Some(head_dim)])?;
        }
        if head_dim == 0 || head_dim % 16 != 0 || blocks == 0 || block_size == 0 || kv_heads == 0 {
            let expected = "at least one block, head and token, and heads of a multiple of 16";
            return Err(k_cache.argument(expected, format!("{shape:?}")));
        }
        if half == 0 || half % 2 != 0 || 2 * half > head_dim || positions == 0 {
            let expected = format!("[positions, even and at most {}]", head_dim / 2);
            return Err(cos.argument(expected, format!("[{positions}, {half}]")));
        }
        let all_heads = width / head_dim;
        if width % head_dim != 0 || all_heads <= 2 * kv_heads {
            let expected = format!("(heads + {}) * {head_dim} columns", 2 * kv_heads);
            return Err(qkv.argument(expected, width));
        }
        Ok(WriteShape {
            tokens,
            heads: all_heads - 2 * kv_heads,
            kv_heads,
            head_dim,
            blocks,
            block_size,
            positions,
            rotary_dim: 2 * half,
        })
    }
}

impl Kernels {
    /// Normalizes the heads of Q and K (if asked to), rotates their first `rotary_dim` dimensions
    /// (`i` with `i + rotary_dim / 2`), writes K and V to the cache, and returns Q,
    /// `[tokens, heads, head_dim]`. Rounds where separate operations would: after the norm, after
    /// its weight, after the rotation. Slots of one call must differ.
    ///
    /// `rope_index`, `slots`, the tables and the weights are read before the kernel waits for the
    /// one before it: no kernel that lets its successor start early may write them.
    pub fn write_kv(&self, a: &WriteKv) -> Result<Tensor, Error> {
        let device = self.device();
        let WriteShape {
            tokens,
            heads,
            kv_heads,
            head_dim,
            blocks,
            block_size,
            positions,
            rotary_dim,
        } = a.check("write_kv", device)?;
        let all_heads = heads + 2 * kv_heads;
        let size = [tokens, heads, head_dim].map(|n| n as i64);
        let q = Tensor::f_empty(size, (a.qkv.kind(), device))
            .map_err(|e| super::CudaError(e.to_string()))?;
        if tokens == 0 {
            return Ok(q);
        }
        // For many tokens, a warp takes four heads, or four times as many as it can at a time.
        let whole = rotary_dim == head_dim && matches!(head_dim, 64 | 128);
        let (source, rounds, per_warp) = match (tokens >= MANY_TOKENS, whole) {
            (false, _) => (&SOURCE, 1, 1),
            (true, false) => (&SOURCE, 4, 4),
            (true, true) => (&MANY, 4, 4 * 512 / head_dim),
        };
        let defines = [
            (element(a.qkv.kind()), 1),
            ("HEAD_DIM", head_dim as i64),
            ("ROTARY_DIM", rotary_dim as i64),
            ("QK_NORM", i64::from(a.qk_norm.is_some())),
            ("HEADS", rounds as i64),
        ];
        let function = self.function(source, source.name, &defines)?;
        let grid = (tokens * all_heads.div_ceil(per_warp)).div_ceil(WARPS) as u32;
        let launch = Launch::new([grid, 1, 1], 32 * WARPS as u32).pdl();
        let args = [
            a.qkv.into(),
            a.qk_norm.map(|norms| norms.0).into(),
            a.qk_norm.map(|norms| norms.1).into(),
            Arg::from(a.eps as f32),
            a.cos.into(),
            a.sin.into(),
            a.rope_index.into(),
            a.slots.into(),
            (&q).into(),
            a.k_cache.into(),
            a.v_cache.into(),
            Arg::from(tokens as i32),
            Arg::from(heads as i32),
            Arg::from(kv_heads as i32),
            Arg::from(positions as i64),
            Arg::from(blocks as i32),
            Arg::from(block_size as i32),
        ];
        // SAFETY: the shapes were checked above; indices are checked in the kernel.
        unsafe { self.launch(function, &launch, &args)? };
        Ok(q)
    }
}

/// The define for an element type that passed a check against [`HALVES`].
pub(super) fn element(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "T_BF16",
        _ => "T_HALF",
    }
}

/// The list of this one of [`HALVES`].
pub(super) fn same_kind(kind: Kind) -> &'static [Kind] {
    match kind {
        Kind::BFloat16 => &[Kind::BFloat16],
        _ => &[Kind::Half],
    }
}
