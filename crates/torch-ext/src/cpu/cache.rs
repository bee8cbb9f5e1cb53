use tch::{Device, Tensor};

use super::Dtype;
use super::check::operand;
use crate::Error;

/// A cache of zeros, `[num_blocks, Hkv, block_size, D]`, in memory that asks for huge pages:
/// attention over a long context visits it block by block, and ordinary pages would cost it a
/// fifth of its bandwidth in address translation.
pub fn new_cache(
    num_blocks: usize,
    num_kv_heads: usize,
    block_size: usize,
    head_dim: usize,
    dtype: Dtype,
) -> Result<Tensor, Error> {
    let shape = [num_blocks, num_kv_heads, block_size, head_dim];
    let bytes = shape
        .iter()
        .try_fold(dtype.size(), |b, &n| b.checked_mul(n));
    let too_large = || Error::Argument {
        op: "new_cache",
        operand: "shape",
        expected: "a size that fits the address space".into(),
        found: format!("{shape:?}"),
    };
    let bytes = bytes
        .filter(|&b| b <= isize::MAX as usize)
        .ok_or_else(too_large)?;
    let cache = Tensor::f_empty(shape.map(|n| n as i64), (dtype.kind(), Device::Cpu));
    let mut cache = cache.map_err(|e| Error::Memory {
        bytes,
        source: std::io::Error::other(e),
    })?;
    // Before the first touch, when the pages come into being.
    #[cfg(target_os = "linux")]
    ask_for_huge_pages(&mut cache, bytes);
    let _ = cache.zero_();
    Ok(cache)
}

#[cfg(target_os = "linux")]
fn ask_for_huge_pages(tensor: &mut Tensor, bytes: usize) {
    const HUGE_PAGE: usize = 2 << 20;
    let start = tensor.data_ptr().cast::<u8>();
    let skip = start.align_offset(HUGE_PAGE);
    let whole = bytes.saturating_sub(skip) / HUGE_PAGE * HUGE_PAGE;
    if whole > 0 {
        // SAFETY: the range lies inside the tensor's own memory, and the advice changes neither
        // its contents nor its protection. A refusal leaves ordinary pages.
        unsafe { libc::madvise(start.add(skip).cast(), whole, libc::MADV_HUGEPAGE) };
    }
}

/// Copies whole blocks inside one cache tensor `[num_blocks, ..]`, pair by pair in order.
pub fn copy_blocks(cache: &mut Tensor, pairs: &[(u32, u32)]) -> Result<(), Error> {
    let cache = operand("copy_blocks", "cache", cache);
    let ([blocks, heads, block_size, d], data, dtype) = cache.float([None; 4])?;
    for &(src, dst) in pairs {
        if src as usize >= blocks || dst as usize >= blocks {
            let found = format!("{src} to {dst}");
            return Err(Error::Argument {
                op: "copy_blocks",
                operand: "pairs",
                expected: format!("blocks below {blocks}"),
                found,
            });
        }
    }
    let bytes = heads * block_size * d * dtype.size();
    for &(src, dst) in pairs {
        // SAFETY: both blocks lie inside the contiguous cache, which is borrowed mutably.
        unsafe {
            let data = data.cast::<u8>();
            std::ptr::copy(
                data.add(src as usize * bytes),
                data.add(dst as usize * bytes),
                bytes,
            );
        }
    }
    Ok(())
}
