//! Copies of blocks, for sequences that go on from a common one.

use tch::Kind;
use torch_ext::cuda::{CacheSet, Upload};

use super::{CudaRunner, UPLOADS};

/// Copies in one launch.
const MOST: usize = 256;

/// What copies take. Made when there is a first one: few engines ever see any.
#[derive(Debug)]
pub(super) struct BlockCopies {
    set: CacheSet,
    upload: Upload,
}

impl CudaRunner {
    /// Copies whole blocks, `(source, destination)`, in all layers, as if one after the other.
    pub(super) fn copy_blocks(&mut self, pairs: &[(u32, u32)]) -> Result<(), String> {
        if pairs.is_empty() {
            return Ok(());
        }
        self.cache.check_copies(pairs)?;
        let text = |e: torch_ext::cuda::CudaError| e.to_string();
        let copies = match self.copies.take() {
            Some(copies) => copies,
            None => BlockCopies {
                set: self
                    .kernels
                    .cache_set(self.cache.tensors())
                    .map_err(|e| e.to_string())?,
                upload: Upload::new(2 * MOST, UPLOADS, self.kernels.device_index())
                    .map_err(text)?,
            },
        };
        let copies = self.copies.insert(copies);
        for group in independent(pairs, MOST) {
            let ints: Vec<i32> = group
                .iter()
                .flat_map(|&(from, to)| [from as i32, to as i32])
                .collect();
            copies.upload.send(&ints).map_err(text)?;
            let sent = copies.upload.device.narrow(0, 0, ints.len() as i64);
            let sent = sent
                .view([-1, 2])
                .f_to_kind(Kind::Int64)
                .map_err(|e| e.to_string())?;
            let copied = self.kernels.copy_blocks(&copies.set, &sent);
            copied.map_err(|e| e.to_string())?;
        }
        Ok(())
    }
}

/// `pairs` in order, in groups of at most `most` that may be copied at the same time: no block of a group
/// is written twice, or read and written.
fn independent(pairs: &[(u32, u32)], most: usize) -> Vec<&[(u32, u32)]> {
    let mut groups = Vec::new();
    let mut rest = pairs;
    while !rest.is_empty() {
        let meets = |i: usize| {
            let (from, to) = rest[i];
            let before = &rest[..i];
            before.iter().any(|&(f, t)| t == from || t == to || f == to)
        };
        let end = (1..rest.len().min(most))
            .find(|&i| meets(i))
            .unwrap_or(rest.len().min(most));
        let (group, behind) = rest.split_at(end);
        groups.push(group);
        rest = behind;
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::independent;

    #[test]
    fn groups_hold_what_does_not_meet() {
        let of = |pairs: &[(u32, u32)], most| -> Vec<usize> {
            let groups = independent(pairs, most);
            assert_eq!(groups.concat(), pairs);
            groups.iter().map(|group| group.len()).collect()
        };
        assert_eq!(of(&[], 4), [0; 0]);
        // A source may be read often.
        assert_eq!(of(&[(1, 2), (1, 3), (4, 5)], 4), [3]);
        assert_eq!(of(&[(1, 2), (1, 3), (4, 5), (6, 7), (8, 9)], 2), [2, 2, 1]);
        // Reads what was written, writes it again, overwrites what was read.
        assert_eq!(of(&[(1, 2), (2, 3)], 4), [1, 1]);
        assert_eq!(of(&[(1, 2), (3, 2)], 4), [1, 1]);
        assert_eq!(of(&[(1, 2), (3, 1), (4, 5), (3, 6)], 4), [1, 3]);
    }
}
