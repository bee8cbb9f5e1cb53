//! What a scheduler asks of a KV cache.

use crate::ids::{BlockCopy, BlockSize, Salt, TokenId};
use crate::swap::{SwapIn, SwapOut, SwappedTable};
use crate::table::BlockTable;

/// What [`KvAllocator::allocate`] returns.
#[derive(Debug)]
#[must_use = "a table that is dropped and not freed leaks its blocks"]
pub struct Allocation {
    /// The sequence's table.
    pub table: BlockTable,
    /// How many leading tokens have their keys and values in the table already. Less than the
    /// number of tokens, so that there is a token left to compute logits from.
    pub num_cached: usize,
}

/// What [`KvAllocator::extend`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grown {
    /// Index of the first entry of [`BlockTable::blocks`] that is new or was replaced; the length
    /// of the table if nothing changed. Send `blocks()[table_at..]` to whoever keeps a copy.
    pub table_at: u32,
}

/// The memory manager as the scheduler sees it. [`BlockManager`](crate::BlockManager) is the one
/// that comes with this crate; being generic over the trait lets a test count or refuse calls.
///
/// "Does not fit" is a value, `None`, and then nothing has changed. What a program can only get
/// wrong by mistake panics before anything is changed: a table of another manager, positions that
/// contradict each other. See each method.
pub trait KvAllocator {
    /// Tokens in a block.
    fn block_size(&self) -> BlockSize;

    /// Blocks that sequences can have; one less than the buffers hold, see
    /// [`BlockId::NULL`](crate::BlockId::NULL).
    fn num_blocks(&self) -> usize;

    /// Blocks that can be had now: free ones, and cached ones that nobody reads.
    fn num_available(&self) -> usize;

    /// How many leading tokens are cached, without taking them: whole blocks, and at least one
    /// token left to compute.
    fn match_prefix(&mut self, tokens: &[TokenId], salt: Salt) -> usize;

    /// A table that begins with the cached prefix of `tokens` (if `use_cache`) and has room for
    /// `reserve` tokens in all. `None`: does not fit, nothing changed.
    ///
    /// # Panics
    /// If `reserve` is 0.
    fn allocate(
        &mut self,
        tokens: &[TokenId],
        salt: Salt,
        use_cache: bool,
        reserve: usize,
    ) -> Option<Allocation>;

    /// Makes positions `write_from..num_tokens` writable: there is room for them, and the blocks
    /// that hold them are this table's alone. `None`: does not fit, nothing changed.
    ///
    /// A block that another table or the prefix cache has a claim on is replaced; where positions
    /// before `write_from` are in it, a [`BlockCopy`] is pushed. If blocks behind `num_tokens` are
    /// shared too, the table ends there: what they hold belongs to the text that is replaced.
    /// Other room that is there already stays.
    ///
    /// # Panics
    /// If the table is another manager's, if `write_from > num_tokens`, or if `write_from` lies
    /// in a block that was reclaimed.
    fn extend(
        &mut self,
        table: &mut BlockTable,
        write_from: usize,
        num_tokens: usize,
        copies: &mut Vec<BlockCopy>,
    ) -> Option<Grown>;

    /// A second table that shares every block of `table` which holds any of its first
    /// `num_tokens` tokens. Whoever of the two writes first into a shared block gets a copy.
    ///
    /// # Panics
    /// If the table is another manager's, or has no room for `num_tokens`.
    fn fork(&mut self, table: &mut BlockTable, num_tokens: usize) -> BlockTable;

    /// Makes blocks that are full findable. `tokens` is the whole sequence, and the keys and
    /// values of the first `num_computed` are in the table. Where no block became full this is one
    /// comparison.
    ///
    /// # Panics
    /// If the table is another manager's, if `num_computed` exceeds `tokens` or the room in the
    /// table, or if a block holds other tokens than those under which a fork published it.
    fn publish(&mut self, table: &mut BlockTable, tokens: &[TokenId], num_computed: usize);

    /// Gives back the blocks that hold no position from `first_needed` on (a sliding window left
    /// them behind). Their entries become [`BlockId::NULL`](crate::BlockId::NULL). Publish first:
    /// a sequence that gives back an unpublished block publishes no more.
    ///
    /// # Panics
    /// If the table is another manager's.
    fn reclaim_before(&mut self, table: &mut BlockTable, first_needed: usize);

    /// Gives all blocks back. Published ones stay findable until their room is needed; the end of
    /// the sequence is evicted before its beginning.
    ///
    /// # Panics
    /// If the table is another manager's.
    fn free(&mut self, table: BlockTable);

    /// Blocks of the host tier; 0 if there is none. An allocator that has one implements the
    /// three methods below too.
    fn num_host_blocks(&self) -> usize {
        0
    }

    /// Frees a table after moving the keys and values of its first `num_computed` tokens to the
    /// host; pushes which blocks to move. `Err` returns the table: the host has no room (or there
    /// is no host tier), nothing changed. Blocks that are published stay findable on the device as
    /// after [`free`](Self::free).
    ///
    /// # Panics
    /// If the table is another manager's, or has no room for `num_computed`.
    fn swap_out(
        &mut self,
        table: BlockTable,
        num_computed: usize,
        moves: &mut Vec<SwapOut>,
    ) -> Result<SwappedTable, BlockTable> {
        let _ = (num_computed, moves);
        Err(table)
    }

    /// A table with the sequence's keys and values and room for `reserve` tokens in all; pushes
    /// which blocks to move. `tokens` is the whole sequence. What of it is in the prefix cache is
    /// shared, not moved. `Err` returns the swapped table: does not fit, nothing changed.
    ///
    /// # Panics
    /// If the table is another manager's, or `tokens` is shorter than what it holds.
    fn swap_in(
        &mut self,
        swapped: SwappedTable,
        tokens: &[TokenId],
        reserve: usize,
        moves: &mut Vec<SwapIn>,
    ) -> Result<BlockTable, SwappedTable> {
        let _ = (tokens, reserve, moves);
        Err(swapped)
    }

    /// Gives the host blocks of a sequence back that will not go on.
    ///
    /// # Panics
    /// If the table is another manager's.
    fn discard(&mut self, swapped: SwappedTable) {
        drop(swapped);
    }
}
