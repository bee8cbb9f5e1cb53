use tch::Tensor;

use super::check::{empty, finite, operand};
use super::{ffi, threads_for};
use crate::Error;

/// Rows of a task (queries times the query heads of one kv head): enough to pay for unpacking a
/// tile of keys, few enough that a task's working set stays in the second-level cache.
const TASK_ROWS: usize = 96;

/// What [`paged_attention`] needs of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionParams {
    /// Factor of the scores, usually `1 / sqrt(D)`.
    pub scale: f64,
    /// A query at position `p` sees the keys `p - w + 1 ..= p`.
    pub sliding_window: Option<usize>,
    /// Scores become `c * tanh(score / c)`, with an absolute error below `c * 3e-7` (Gemma 2).
    pub soft_cap: Option<f64>,
}

/// Causal attention of a mixed batch of prompt chunks and decode steps over the paged cache
/// (PagedAttention, Kwon et al. 2023; online softmax as in FlashAttention, Dao et al. 2022).
/// Returns float32 `[T, Hq * D]`.
///
/// * `q`: float32 `[T, Hq, D]`, the queries of all sequences one after the other.
/// * `k_cache`, `v_cache`: `[num_blocks, Hkv, block_size, D]` of float32, bfloat16 or float16;
///   `Hq` is a multiple of `Hkv`. They hold the keys of this step already.
/// * `block_tables`: int32 `[S, max_blocks]`. Entries past a sequence's context or wholly before
///   its sliding window are not read.
/// * `query_start`: int32 or int64 `[S + 1]`, from 0 to `T`: where each sequence's queries begin.
/// * `context_len`: int32 or int64 `[S]`: tokens in the cache, those of this step included. The
///   queries are the last ones of it.
#[allow(clippy::too_many_arguments)]
pub fn paged_attention(
    q: &Tensor,
    k_cache: &Tensor,
    v_cache: &Tensor,
    block_tables: &Tensor,
    query_start: &Tensor,
    context_len: &Tensor,
    params: &AttentionParams,
) -> Result<Tensor, Error> {
    const OP: &str = "paged_attention";
    let ([blocks, hkv, block_size, d], k_data, dtype) =
        operand(OP, "k_cache", k_cache).float([None; 4])?;
    let v_of = operand(OP, "v_cache", v_cache);
    let (_, v_data, v_dtype) = v_of.float([blocks, hkv, block_size, d].map(Some))?;
    if v_dtype != dtype {
        return Err(v_of.argument(format!("{dtype:?} like `k_cache`"), format!("{v_dtype:?}")));
    }
    let q_of = operand(OP, "q", q);
    let ([t, hq, _], q) = q_of.f32([None, None, Some(d)])?;
    if hkv == 0 || hq % hkv != 0 || hq == 0 || d == 0 {
        return Err(q_of.argument(
            format!("a positive multiple of {hkv} heads of at least 1"),
            format!("{hq} heads of {d}"),
        ));
    }
    let context_of = operand(OP, "context_len", context_len);
    let context = context_of.indices(None)?;
    let seqs = context.len();
    let starts_of = operand(OP, "query_start", query_start);
    let starts = starts_of.indices(Some(seqs + 1))?;
    if starts[0] != 0 || starts[seqs] != t as i64 || !starts.is_sorted() {
        return Err(starts_of.argument(format!("ascending from 0 to {t}"), format!("{starts:?}")));
    }
    let tables_of = operand(OP, "block_tables", block_tables);
    let ([_, max_blocks], tables) = tables_of.int_matrix([Some(seqs), None])?;
    let scale = finite(OP, "scale", params.scale)?;
    let window = params.sliding_window.unwrap_or(0);
    let soft_cap = finite(OP, "soft_cap", params.soft_cap.unwrap_or(0.0))?;
    if params.sliding_window == Some(0) {
        let (expected, found) = ("at least 1".into(), "0".into());
        return Err(Error::Argument {
            op: OP,
            operand: "sliding_window",
            expected,
            found,
        });
    }

    let most = (TASK_ROWS / (hq / hkv)).max(1);
    let mut tasks = Vec::new();
    for s in 0..seqs {
        let (from, len) = (starts[s], starts[s + 1] - starts[s]);
        if len == 0 {
            continue;
        }
        let limit = (max_blocks * block_size).min(u32::MAX as usize) as i64;
        if context[s] < len || context[s] > limit {
            let expected = format!("{len}..={limit}");
            return Err(Error::Index {
                op: OP,
                operand: "context_len",
                at: s,
                expected,
                found: context[s],
            });
        }
        let first = (context[s] - len) as usize;
        let oldest = if window > 0 {
            (first + 1).saturating_sub(window)
        } else {
            0
        };
        for at in oldest / block_size..(context[s] as usize).div_ceil(block_size) {
            let block = tables[s * max_blocks + at];
            if block < 0 || block as usize >= blocks {
                let expected = format!("0..{blocks}");
                let at = s * max_blocks + at;
                return Err(Error::Index {
                    op: OP,
                    operand: "block_tables",
                    at,
                    expected,
                    found: block.into(),
                });
            }
        }
        // Late queries see the most keys: give them out first.
        for begin in (0..len as usize).step_by(most).rev() {
            tasks.push(ffi::AttentionTask {
                seq: s as u32,
                token: (from as usize + begin) as u32,
                position: (first + begin) as u32,
                count: most.min(len as usize - begin) as u32,
            });
        }
    }

    let out = empty(&[t, hq * d]);
    if tasks.is_empty() {
        return Ok(out);
    }
    let kernels = ffi::kernels();
    let max_count = tasks.iter().map(|t| t.count as usize).max().unwrap_or(0);
    // SAFETY: a pure function of two numbers.
    let stride = unsafe { (kernels.attention_scratch)(max_count * (hq / hkv), d) };
    // Each query meets all keys up to its own, twice: for scores and for values.
    let keys =
        |task: &ffi::AttentionTask| task.count as usize * (task.position + task.count) as usize;
    let work = tasks.iter().map(keys).sum::<usize>() * hq * d;
    let threads = threads_for(2 * work * dtype.size() / (hq / hkv), 2 * work);
    let scratch = empty(&[threads as usize, stride]);
    let args = ffi::Attention {
        q,
        k_cache: k_data,
        v_cache: v_data,
        kv_dtype: dtype as i32,
        block_tables: tables.as_ptr(),
        max_blocks,
        tasks: tasks.as_ptr(),
        num_tasks: tasks.len(),
        max_count,
        hq,
        hkv,
        d,
        block_size,
        scale,
        window,
        soft_cap,
        out: out.data_ptr().cast(),
        scratch: scratch.data_ptr().cast(),
        scratch_stride: stride,
        threads,
    };
    // SAFETY: all shapes agree; each task's queries lie inside q and out; every block that its
    // window reaches was checked; scratch has one stride for each thread.
    unsafe { (kernels.attention)(&args) };
    Ok(out)
}
