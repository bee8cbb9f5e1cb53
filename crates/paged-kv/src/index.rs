//! Hash → block, as an open-addressing table of block indices: 8 bytes a block, never resized.

use crate::pool::Meta;

/// No block's index. Not zero: the system maps pages of zeros when they are first written, which would be at the first
/// block that finds its place there, in the middle of a step.
const EMPTY: u32 = u32::MAX;

/// Linear probing at a load of at most one half. The hashes stay in the blocks' metadata; a slot
/// is the block's index, or EMPTY.
pub(crate) struct Index {
    slots: Vec<u32>,
}

impl Index {
    pub(crate) fn new(num_blocks: usize) -> Self {
        Self {
            slots: vec![EMPTY; 2 * num_blocks],
        }
    }

    /// Where the search for a hash begins: the hash scaled to the table's length.
    #[inline]
    fn home(&self, hash: [u64; 2]) -> usize {
        ((hash[0] as u128 * self.slots.len() as u128) >> 64) as usize
    }

    #[inline]
    fn after(&self, slot: usize) -> usize {
        if slot + 1 == self.slots.len() {
            0
        } else {
            slot + 1
        }
    }

    /// The first block on the hash's path for which `is_it` holds.
    #[inline]
    pub(crate) fn find(&self, hash: [u64; 2], mut is_it: impl FnMut(u32) -> bool) -> Option<u32> {
        let mut slot = self.home(hash);
        loop {
            match self.slots[slot] {
                EMPTY => return None,
                block if is_it(block) => return Some(block),
                _ => slot = self.after(slot),
            }
        }
    }

    pub(crate) fn insert(&mut self, hash: [u64; 2], block: u32) {
        let mut slot = self.home(hash);
        while self.slots[slot] != EMPTY {
            slot = self.after(slot);
        }
        self.slots[slot] = block;
    }

    fn slot_of(&self, hash: [u64; 2], block: u32) -> Option<usize> {
        let mut slot = self.home(hash);
        while self.slots[slot] != block {
            if self.slots[slot] == EMPTY {
                return None;
            }
            slot = self.after(slot);
        }
        Some(slot)
    }

    /// Puts `new` where `old` is, if it is there.
    pub(crate) fn replace(&mut self, hash: [u64; 2], old: u32, new: u32) {
        if let Some(slot) = self.slot_of(hash, old) {
            self.slots[slot] = new;
        }
    }

    /// Takes a block out and moves later ones of the run up, so that no tombstones pile up.
    pub(crate) fn remove(&mut self, hash: [u64; 2], block: u32, metas: &[Meta]) {
        let Some(mut hole) = self.slot_of(hash, block) else {
            return;
        };
        let len = self.slots.len();
        let mut slot = hole;
        loop {
            slot = self.after(slot);
            let next = self.slots[slot];
            if next == EMPTY {
                break;
            }
            // An entry may move into the hole unless its home lies cyclically in (hole, slot].
            let home = self.home(metas[next as usize].hash);
            let from_home = (slot + len - home) % len;
            let from_hole = (slot + len - hole) % len;
            if from_home >= from_hole {
                self.slots[hole] = next;
                hole = slot;
            }
        }
        self.slots[hole] = EMPTY;
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.slots.iter().copied().filter(|&block| block != EMPTY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    /// Against a set, with so few distinct homes that runs grow long and wrap around.
    #[test]
    fn finds_what_a_set_finds() {
        let n = 64u32;
        let mut metas = vec![Meta::default(); n as usize];
        let mut index = Index::new(n as usize);
        let mut set = HashSet::new();
        let mut state = 1u64;
        for round in 0..20_000u64 {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            let block = 1 + (state >> 40) as u32 % (n - 1);
            if set.remove(&block) {
                index.remove(metas[block as usize].hash, block, &metas);
            } else {
                let home = [0, 1 << 62, u64::MAX - 1, u64::MAX][(state >> 33) as usize % 4];
                metas[block as usize].hash = [home, round];
                index.insert(metas[block as usize].hash, block);
                set.insert(block);
            }
            for (id, meta) in (1..n).zip(&metas[1..]) {
                let found = index.find(meta.hash, |b| b == id);
                assert_eq!(found.is_some(), set.contains(&id));
            }
            assert_eq!(index.iter().count(), set.len());
        }
    }
}
