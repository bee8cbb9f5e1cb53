//! The life of a sequence's table: [`KvAllocator`] for [`BlockManager`].

use std::ops::Range;

use crate::allocator::{Allocation, Grown, KvAllocator};
use crate::events::CacheObserver;
use crate::ids::{BlockCopy, BlockId, BlockSize, Salt, TokenId};
use crate::manager::BlockManager;
use crate::prefix::Refusal;
use crate::swap::{SwapIn, SwapOut, SwappedTable};
use crate::table::{BlockTable, Private};

/// The tokens whose keys and values may come from the cache: one is left to compute logits from.
fn computable(tokens: &[TokenId]) -> &[TokenId] {
    tokens.split_last().map_or(&[], |(_, others)| others)
}

impl<O: CacheObserver> KvAllocator for BlockManager<O> {
    fn block_size(&self) -> BlockSize {
        self.block_size
    }

    fn num_blocks(&self) -> usize {
        self.pool.metas.len() - 1
    }

    fn num_available(&self) -> usize {
        self.pool.available()
    }

    fn match_prefix(&mut self, tokens: &[TokenId], salt: Salt) -> usize {
        let Some(prefixes) = &mut self.prefixes else {
            return 0;
        };
        let mut hits = 0;
        prefixes.walk(&self.pool, computable(tokens), salt, |_| hits += 1);
        hits * self.block_size.get()
    }

    fn allocate(
        &mut self,
        tokens: &[TokenId],
        salt: Salt,
        use_cache: bool,
        reserve: usize,
    ) -> Option<Allocation> {
        assert!(reserve > 0, "a table has room for at least one token");
        let searched = if use_cache { computable(tokens) } else { &[] };
        let (found, evictable) = self.find_prefix(searched, salt);
        let num_blocks = self.block_size.blocks_for(reserve).max(found);
        if num_blocks - found > self.pool.available() - evictable {
            return None;
        }
        let mut blocks = Vec::with_capacity(num_blocks);
        self.take_prefix(&mut blocks);
        for _ in found..num_blocks {
            blocks.push(self.take());
        }
        let num_cached = found * self.block_size.get();
        if use_cache && self.prefixes.is_some() {
            self.queried_tokens += tokens.len() as u64;
            self.hit_tokens += num_cached as u64;
        }
        let mut table = self.new_table(blocks, salt);
        self.stand(&mut table, found);
        Some(Allocation { table, num_cached })
    }

    #[inline]
    fn extend(
        &mut self,
        table: &mut BlockTable,
        write_from: usize,
        num_tokens: usize,
        copies: &mut Vec<BlockCopy>,
    ) -> Option<Grown> {
        self.check_owner(table);
        assert!(
            write_from <= num_tokens,
            "cannot write positions {write_from}..{num_tokens}"
        );
        if table.private.covers(write_from, num_tokens) {
            return Some(Grown {
                table_at: table.blocks.len() as u32,
            });
        }
        self.extend_checked(table, write_from, num_tokens, copies)
    }

    fn fork(&mut self, table: &mut BlockTable, num_tokens: usize) -> BlockTable {
        self.check_owner(table);
        let num_blocks = self.block_size.blocks_for(num_tokens);
        assert!(
            num_blocks <= table.blocks.len(),
            "cannot share {num_tokens} tokens of a table with room for {}",
            table.blocks.len() * self.block_size.get(),
        );
        let blocks = table.blocks[..num_blocks].to_vec();
        for &block in blocks.iter().filter(|block| !block.is_null()) {
            self.pool.retain(block);
        }
        table.private.leave(num_blocks, self.block_size);
        self.tables += 1;
        let mut fork = BlockTable {
            blocks,
            private: Private::default(),
            reclaimed: table.reclaimed.min(num_blocks),
            ..*table
        };
        let published = table.published.min(num_tokens / self.block_size.get());
        if published < table.published {
            self.stand(&mut fork, published);
        }
        fork
    }

    #[inline]
    fn publish(&mut self, table: &mut BlockTable, tokens: &[TokenId], num_computed: usize) {
        if num_computed >= table.publish_at {
            self.publish_full(table, tokens, num_computed);
        }
    }

    fn reclaim_before(&mut self, table: &mut BlockTable, first_needed: usize) {
        self.check_owner(table);
        let end = (first_needed / self.block_size.get()).min(table.blocks.len());
        for i in (table.reclaimed..end).rev() {
            let block = std::mem::replace(&mut table.blocks[i], BlockId::NULL);
            self.release(block);
            self.reclaimed_any = true;
        }
        table.reclaimed = table.reclaimed.max(end);
        table.private.leave(end, self.block_size);
    }

    fn free(&mut self, table: BlockTable) {
        self.check_owner(&table);
        for &block in table.blocks[table.reclaimed..].iter().rev() {
            self.release(block);
        }
        self.tables -= 1;
    }

    fn num_host_blocks(&self) -> usize {
        self.host.size
    }

    fn swap_out(
        &mut self,
        table: BlockTable,
        num_computed: usize,
        moves: &mut Vec<SwapOut>,
    ) -> Result<SwappedTable, BlockTable> {
        self.move_out(table, num_computed, moves)
    }

    fn swap_in(
        &mut self,
        swapped: SwappedTable,
        tokens: &[TokenId],
        reserve: usize,
        moves: &mut Vec<SwapIn>,
    ) -> Result<BlockTable, SwappedTable> {
        self.move_in(swapped, tokens, reserve, moves)
    }

    fn discard(&mut self, swapped: SwappedTable) {
        self.give_up(swapped);
    }
}

impl<O: CacheObserver> BlockManager<O> {
    /// [`KvAllocator::extend`] where the blocks must be looked at, or taken.
    fn extend_checked(
        &mut self,
        table: &mut BlockTable,
        write_from: usize,
        num_tokens: usize,
        copies: &mut Vec<BlockCopy>,
    ) -> Option<Grown> {
        let old = table.blocks.len();
        let need = self.block_size.blocks_for(num_tokens);
        let first = write_from / self.block_size.get();
        assert!(
            first >= table.reclaimed,
            "position {write_from} is in a block that was reclaimed"
        );
        let last = need.min(old);
        let mut table_at = old;
        if let Some(at) = (first..last).find(|&i| !self.pool.is_private(table.blocks[i])) {
            let keep_partial = at == first && !write_from.is_multiple_of(self.block_size.get());
            self.replace_shared(table, at..last, need, keep_partial, copies)?;
            table_at = at;
        } else if need.saturating_sub(old) > self.pool.available() {
            return None;
        }
        for _ in table.blocks.len()..need {
            let block = self.take();
            table.blocks.push(block);
        }
        table.private = Private::blocks(first, need, self.block_size);
        Some(Grown {
            table_at: table_at as u32,
        })
    }

    fn publish_full(&mut self, table: &mut BlockTable, tokens: &[TokenId], num_computed: usize) {
        self.check_owner(table);
        let size = self.block_size.get();
        let full = num_computed / size;
        assert!(
            num_computed <= tokens.len() && full <= table.blocks.len(),
            "{num_computed} tokens computed of {}, with room for {}",
            tokens.len(),
            table.blocks.len() * size,
        );
        let Some(prefixes) = &mut self.prefixes else {
            return;
        };
        for i in table.published..full {
            let block = table.blocks[i];
            // Behind a block that was given back the chain may have lost its hold.
            let follows_null = i > 0 && table.blocks[i - 1].is_null();
            if block.is_null() || follows_null && !prefixes.is_alive(&self.pool, &table.chain) {
                table.publish_at = usize::MAX;
                return;
            }
            let tokens = &tokens[i * size..(i + 1) * size];
            let registered = prefixes.register(
                &mut self.pool,
                &mut self.observer,
                block,
                &mut table.chain,
                tokens,
                table.salt,
            );
            match registered {
                Ok(()) => {}
                Err(Refusal::Occupied) => {
                    table.publish_at = usize::MAX;
                    return;
                }
                Err(Refusal::Contradiction) => {
                    panic!("block {block} is published already, with other tokens than these")
                }
            }
            table.published = i + 1;
            table.publish_at = (i + 2) * size;
            table.private.leave(i + 1, self.block_size);
        }
    }

    /// [`KvAllocator::extend`] where blocks in `range` are to be written and the first is shared.
    #[cold]
    fn replace_shared(
        &mut self,
        table: &mut BlockTable,
        range: Range<usize>,
        num_blocks: usize,
        keep_partial: bool,
        copies: &mut Vec<BlockCopy>,
    ) -> Option<()> {
        let is_shared = |block: &&BlockId| !self.pool.is_private(**block);
        let first = range.start;
        let behind = &table.blocks[range.end..];
        let kept = range.end + behind.iter().take_while(|b| !is_shared(b)).count();

        let shared = table.blocks[range.clone()].iter().filter(is_shared);
        let taken = shared.clone().count() + num_blocks.saturating_sub(kept);
        let going = shared.chain(&table.blocks[kept..]);
        let returned = going.filter(|b| self.pool.meta(**b).refs == 1).count();
        if taken > self.pool.available() + returned {
            return None;
        }
        // All are released before the first is taken: a cached block may have to serve again.
        let source = table.blocks[first];
        for block in table.blocks.drain(kept..).rev() {
            self.release(block);
        }
        for i in range.clone().rev() {
            if !self.pool.is_private(table.blocks[i]) {
                let block = std::mem::replace(&mut table.blocks[i], BlockId::NULL);
                self.release(block);
            }
        }
        for i in range {
            if table.blocks[i].is_null() {
                table.blocks[i] = self.take();
            }
        }
        let dst = table.blocks[first];
        if keep_partial && dst != source {
            copies.push(BlockCopy { src: source, dst });
        }
        if table.published > first {
            self.stand(table, first);
        }
        Some(())
    }
}
