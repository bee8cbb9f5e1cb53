//! KV buffers in which a slot holds a digest of all that attention would have read to fill it, so
//! that one stale or foreign slot changes everything computed from it.

use paged_kv::{BlockCopy, BlockId, HostBlockId, Salt, SwapIn, SwapOut, TokenId};

pub struct KvSim {
    block_size: usize,
    /// How many positions attention reads, the newest included.
    window: Option<usize>,
    slots: Vec<u64>,
    host: Vec<u64>,
}

fn mix(digest: u64, value: u64) -> u64 {
    let x = (digest ^ value).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    x ^ (x >> 29)
}

/// The value of a position from its token and the values before it.
fn value(token: TokenId, salt: Salt, before: impl Iterator<Item = u64>) -> u64 {
    before.fold(mix(salt.get() as u64 + 1, token.into()), mix)
}

impl KvSim {
    pub fn new(
        num_blocks: usize,
        host_blocks: usize,
        block_size: usize,
        window: Option<usize>,
    ) -> Self {
        let slots = vec![u64::MAX; num_blocks * block_size];
        Self {
            block_size,
            window,
            slots,
            host: vec![u64::MAX; host_blocks * block_size],
        }
    }

    /// First position that is read to compute `position`.
    pub fn first_read(&self, position: usize) -> usize {
        self.window.map_or(0, |w| (position + 1).saturating_sub(w))
    }

    fn slot(&self, blocks: &[BlockId], position: usize) -> usize {
        let block = blocks[position / self.block_size];
        assert!(!block.is_null(), "position {position} was reclaimed");
        block.index() * self.block_size + position % self.block_size
    }

    /// The value of `position` by the definition, from values that were never in a block.
    pub fn expected(&self, tokens: &[TokenId], salt: Salt, values: &[u64]) -> u64 {
        let position = values.len();
        let before = self.first_read(position)..position;
        value(tokens[position], salt, values[before].iter().copied())
    }

    /// Computes `position` as a model would: reads through the block table and writes its slot.
    pub fn compute(&mut self, blocks: &[BlockId], tokens: &[TokenId], salt: Salt, position: usize) {
        let before = self.first_read(position)..position;
        let read = before.map(|p| self.slots[self.slot(blocks, p)]);
        let computed = value(tokens[position], salt, read);
        let slot = self.slot(blocks, position);
        self.slots[slot] = computed;
    }

    pub fn read(&self, blocks: &[BlockId], position: usize) -> u64 {
        self.slots[self.slot(blocks, position)]
    }

    fn range(&self, block: BlockId) -> std::ops::Range<usize> {
        let start = block.index() * self.block_size;
        start..start + self.block_size
    }

    fn host_range(&self, block: HostBlockId) -> std::ops::Range<usize> {
        let start = block.get() as usize * self.block_size;
        start..start + self.block_size
    }

    pub fn copy(&mut self, copies: &[BlockCopy]) {
        for copy in copies {
            let (src, dst) = (self.range(copy.src), self.range(copy.dst));
            self.slots.copy_within(src, dst.start);
        }
    }

    pub fn swap_out(&mut self, moves: &[SwapOut]) {
        for &SwapOut { src, dst } in moves {
            let (src, dst) = (self.range(src), self.host_range(dst));
            self.host[dst].copy_from_slice(&self.slots[src]);
        }
    }

    pub fn swap_in(&mut self, moves: &[SwapIn]) {
        for &SwapIn { src, dst } in moves {
            let (src, dst) = (self.host_range(src), self.range(dst));
            self.slots[dst].copy_from_slice(&self.host[src]);
        }
    }

    /// Destroys what a block holds.
    pub fn spoil(&mut self, block: BlockId) {
        let range = self.range(block);
        self.slots[range].fill(u64::MAX);
    }
}
