//! The second tier: blocks of host memory that hold preempted sequences.

use crate::allocator::KvAllocator;
use crate::events::CacheObserver;
use crate::ids::{BlockId, Salt, TokenId};
use crate::manager::BlockManager;
use crate::table::BlockTable;

/// Index of a block in the host's KV buffers, `0..host_blocks` of the
/// [`Config`](crate::Config::host_blocks).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostBlockId(u32);

impl HostBlockId {
    /// The block at `index` of the host's buffers, for plans made by hand.
    pub const fn new(index: u32) -> Self {
        Self(index)
    }

    /// The index.
    pub const fn get(self) -> u32 {
        self.0
    }
}

/// Move one block's keys and values from the device to the host, in every layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SwapOut {
    /// Where to read, on the device.
    pub src: BlockId,
    /// Where to write, on the host.
    pub dst: HostBlockId,
}

/// Move one block's keys and values from the host to the device, in every layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SwapIn {
    /// Where to read, on the host.
    pub src: HostBlockId,
    /// Where to write, on the device.
    pub dst: BlockId,
}

/// A sequence whose keys and values are in host memory. Like a [`BlockTable`] it is the right to
/// its blocks: it goes back with [`KvAllocator::swap_in`](crate::KvAllocator::swap_in) or
/// [`KvAllocator::discard`](crate::KvAllocator::discard).
#[derive(Debug)]
#[must_use = "a swapped table that is dropped leaks its host blocks"]
pub struct SwappedTable {
    /// Of the blocks that were not reclaimed.
    blocks: Vec<HostBlockId>,
    reclaimed: usize,
    num_computed: usize,
    manager: u64,
    salt: Salt,
}

impl SwappedTable {
    /// How many tokens' keys and values it holds.
    pub fn num_computed(&self) -> usize {
        self.num_computed
    }

    /// How many host blocks it holds.
    pub fn num_host_blocks(&self) -> usize {
        self.blocks.len()
    }
}

/// The host's blocks: the free ones, last given back first.
pub(crate) struct HostPool {
    pub(crate) size: usize,
    pub(crate) free: Vec<HostBlockId>,
}

impl HostPool {
    pub(crate) fn new(size: u32) -> Self {
        Self {
            size: size as usize,
            free: (0..size).rev().map(HostBlockId).collect(),
        }
    }
}

impl<O: CacheObserver> BlockManager<O> {
    pub(crate) fn move_out(
        &mut self,
        table: BlockTable,
        num_computed: usize,
        moves: &mut Vec<SwapOut>,
    ) -> Result<SwappedTable, BlockTable> {
        self.check_owner(&table);
        let end = self.block_size.blocks_for(num_computed);
        assert!(
            end <= table.blocks.len(),
            "{num_computed} tokens computed in a table with room for {}",
            table.blocks.len() * self.block_size.get(),
        );
        let reclaimed = table.reclaimed.min(end);
        let moved = &table.blocks[reclaimed..end];
        let Some(left) = self.host.free.len().checked_sub(moved.len()) else {
            return Err(table);
        };
        let blocks = self.host.free.split_off(left);
        let pairs = moved.iter().zip(&blocks);
        moves.extend(pairs.map(|(&src, &dst)| SwapOut { src, dst }));
        let swapped = SwappedTable {
            blocks,
            reclaimed,
            num_computed,
            manager: self.id,
            salt: table.salt,
        };
        self.swapped += 1;
        self.free(table);
        Ok(swapped)
    }

    pub(crate) fn move_in(
        &mut self,
        swapped: SwappedTable,
        tokens: &[TokenId],
        reserve: usize,
        moves: &mut Vec<SwapIn>,
    ) -> Result<BlockTable, SwappedTable> {
        self.check_swapped(&swapped);
        let held = swapped.num_computed;
        assert!(
            held <= tokens.len(),
            "{} tokens, of which {held} are held",
            tokens.len()
        );
        // The chain of a sequence that lost its beginning cannot be followed.
        let known = if swapped.reclaimed == 0 { held } else { 0 };
        let (found, evictable) = self.find_prefix(&tokens[..known], swapped.salt);
        let num_blocks = self.block_size.blocks_for(reserve.max(held));
        let taken = num_blocks - swapped.reclaimed - found;
        if taken > self.pool.available() - evictable {
            return Err(swapped);
        }
        let mut blocks = vec![BlockId::NULL; swapped.reclaimed];
        blocks.reserve_exact(num_blocks - swapped.reclaimed);
        self.take_prefix(&mut blocks);
        for _ in 0..taken {
            blocks.push(self.take());
        }
        let behind = swapped.reclaimed + found;
        let moved = swapped.blocks[found..].iter().zip(&blocks[behind..]);
        moves.extend(moved.map(|(&src, &dst)| SwapIn { src, dst }));
        let mut table = self.new_table(blocks, swapped.salt);
        table.reclaimed = swapped.reclaimed;
        self.stand(&mut table, behind);
        self.give_up(swapped);
        Ok(table)
    }

    pub(crate) fn give_up(&mut self, swapped: SwappedTable) {
        self.check_swapped(&swapped);
        self.host.free.extend(swapped.blocks.iter().rev());
        self.swapped -= 1;
    }

    fn check_swapped(&self, swapped: &SwappedTable) {
        assert!(
            swapped.manager == self.id,
            "this swapped table belongs to another block manager"
        );
    }
}
