use std::ptr;

use tch::Tensor;

use super::check::{empty, finite, operand};
use super::{ffi, threads_for};
use crate::Error;

/// `MAX_HEAD_DIM` in `csrc/cpu/simd.h`.
const MAX_HEAD_DIM: usize = 512;

/// What [`rope_and_cache`] needs of a layer.
#[derive(Clone, Copy, Debug)]
pub struct RopeParams<'a> {
    /// Query heads.
    pub num_q_heads: usize,
    /// Weight `[D]` of the RMS norm over each query head, before the rotation (Qwen3).
    pub q_norm: Option<&'a Tensor>,
    /// The same for key heads.
    pub k_norm: Option<&'a Tensor>,
    /// Epsilon of these norms.
    pub eps: f64,
    /// Cosines, float32 `[max_position, R / 2]`, where the first `R <= D` elements of a head are
    /// rotated and the others pass through.
    pub cos: &'a Tensor,
    /// Sines, of the same shape.
    pub sin: &'a Tensor,
}

/// Per-head norm (optional) and rotary position embedding of queries and keys, and the write of
/// keys and values to the paged cache. Returns the queries, float32 `[T, Hq, D]`.
///
/// * `qkv`: float32 `[T, (Hq + 2 Hkv) D]`, the output of the fused projection.
/// * `positions`: int32 or int64 `[T]`.
/// * `slots`: int32 or int64 `[T]`, `block * block_size + offset`; -1 stores nothing (padding).
///   Two rows must not share a slot.
/// * `k_cache`, `v_cache`: `[num_blocks, Hkv, block_size, D]` of float32, bfloat16 or float16.
///
/// The rotation is NeoX's: element `i` pairs with element `i + R / 2`.
pub fn rope_and_cache(
    qkv: &Tensor,
    params: &RopeParams<'_>,
    positions: &Tensor,
    slots: &Tensor,
    k_cache: &mut Tensor,
    v_cache: &mut Tensor,
) -> Result<Tensor, Error> {
    const OP: &str = "rope_and_cache";
    let hq = params.num_q_heads;
    let ([blocks, hkv, block_size, d], k_data, dtype) =
        operand(OP, "k_cache", k_cache).float([None; 4])?;
    let v_of = operand(OP, "v_cache", v_cache);
    let (_, v_data, v_dtype) = v_of.float([blocks, hkv, block_size, d].map(Some))?;
    if v_dtype != dtype {
        return Err(v_of.argument(format!("{dtype:?} like `k_cache`"), format!("{v_dtype:?}")));
    }
    if d > MAX_HEAD_DIM {
        return Err(v_of.argument(format!("a head dimension of at most {MAX_HEAD_DIM}"), d));
    }
    let ([t, _], qkv) = operand(OP, "qkv", qkv).f32([None, Some((hq + 2 * hkv) * d)])?;
    let norm = |name, weight: Option<&Tensor>| match weight {
        Some(w) => Ok::<_, Error>(operand(OP, name, w).f32([Some(d)])?.1.cast_const()),
        None => Ok(ptr::null()),
    };
    let (q_norm, k_norm) = (
        norm("q_norm", params.q_norm)?,
        norm("k_norm", params.k_norm)?,
    );
    let eps = finite(OP, "eps", params.eps)?;
    let cos_of = operand(OP, "cos", params.cos);
    let ([max_position, half], cos) = cos_of.f32([None, None])?;
    if 2 * half > d {
        return Err(cos_of.argument(format!("at most {} columns", d / 2), half));
    }
    let (_, sin) = operand(OP, "sin", params.sin).f32([Some(max_position), Some(half)])?;
    let positions_of = operand(OP, "positions", positions);
    let positions = positions_of.indices(Some(t))?;
    positions_of.within(&positions, 0..max_position as i64)?;
    let slots_of = operand(OP, "slots", slots);
    let slots = slots_of.indices(Some(t))?;
    slots_of.within(&slots, -1..(blocks * block_size) as i64)?;

    let q = empty(&[t, hq, d]);
    let args = ffi::Rope {
        qkv,
        q_norm,
        k_norm,
        eps,
        cos,
        sin,
        rotary: 2 * half,
        positions: positions.as_ptr(),
        slots: slots.as_ptr(),
        q: q.data_ptr().cast(),
        k_cache: k_data,
        v_cache: v_data,
        kv_dtype: dtype as i32,
        t,
        hq,
        hkv,
        d,
        block_size,
        threads: threads_for(8 * t * (hq + 2 * hkv) * d, 0),
    };
    // SAFETY: all shapes agree, positions are rows of the tables, slots lie inside the caches, and
    // a head fits the kernel's buffer.
    unsafe { (ffi::kernels().rope)(&args) };
    Ok(q)
}
