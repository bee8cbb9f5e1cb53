//! What decode and prefill attention over the paged cache have in common.

use tch::{Kind, Tensor};

use super::check::{HALVES, Operand};
use super::kernels::Kernels;
use super::rope::same_kind;
use crate::Error;

/// Head sizes that attention is there for.
const HEAD_DIMS: &[usize] = &[64, 80, 96, 128, 256];
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
    /// Factor on them, positive.
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

impl Kernels {
    pub(super) fn check_attention(
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
pub(super) struct Shape {
    pub(super) heads: Heads,
    pub(super) tokens: usize,
    pub(super) seqs: usize,
    pub(super) width: usize,
    pub(super) blocks: usize,
    pub(super) block_size: usize,
}

impl Scores {
    /// The window (0: none) and the cap (0: none) as the kernels take them.
    pub(super) fn checked(&self, op: &'static str) -> Result<(i32, f32), Error> {
        let wrong = |operand, expected: &str, found: String| Error::Argument {
            op,
            operand,
            expected: expected.into(),
            found,
        };
        if !self.scale.is_finite() || self.scale <= 0.0 {
            return Err(wrong(
                "scale",
                "finite and positive",
                self.scale.to_string(),
            ));
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

pub(super) fn check_heads(op: &'static str, heads: &Heads) -> Result<(), Error> {
    let known = HEAD_DIMS.contains(&heads.head_dim);
    if known && heads.kv_heads > 0 && heads.heads > 0 && heads.heads.is_multiple_of(heads.kv_heads)
    {
        return Ok(());
    }
    Err(Error::Argument {
        op,
        operand: "heads",
        expected: format!("a multiple of the KV heads, of size {HEAD_DIMS:?}"),
        found: format!("{heads:?}"),
    })
}
