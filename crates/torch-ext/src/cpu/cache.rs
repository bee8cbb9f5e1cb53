use tch::Tensor;

use super::check::operand;
use crate::Error;

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
