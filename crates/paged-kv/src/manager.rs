//! [`BlockManager`]: tables on top of the pool and the prefix cache.

use std::ops::Range;

use crate::allocator::{Allocation, Grown, KvAllocator};
use crate::config::{Config, ConfigError};
use crate::events::CacheObserver;
use crate::hash::random_u64;
use crate::ids::{BlockCopy, BlockId, BlockSize, Salt, TokenId};
use crate::pool::BlockPool;
use crate::prefix::{Chain, Prefixes, Refusal};
use crate::table::BlockTable;
use crate::usage::{BlockState, Usage};

/// The memory manager: see the [crate's guide](crate) and [`KvAllocator`] for what it does.
///
/// `O` is told what the prefix cache gains and loses; by default nobody is.
pub struct BlockManager<O = ()> {
    /// Told apart from other managers by this number.
    pub(crate) id: u64,
    pub(crate) block_size: BlockSize,
    pub(crate) pool: BlockPool,
    pub(crate) prefixes: Option<Prefixes>,
    observer: O,
    pub(crate) tables: usize,
    /// Whether a table gave blocks back from its beginning: then children may outlive parents.
    pub(crate) reclaimed_any: bool,
    evictions: u64,
    queried_tokens: u64,
    hit_tokens: u64,
    /// Blocks found by the allocation in progress: kept for its memory.
    hits: Vec<BlockId>,
}

impl BlockManager {
    /// A manager of empty KV buffers.
    pub fn new(config: Config) -> Result<Self, ConfigError> {
        Self::with_observer(config, ())
    }
}

impl<O: CacheObserver> BlockManager<O> {
    /// A manager that tells `observer` what becomes findable and what is forgotten.
    pub fn with_observer(config: Config, observer: O) -> Result<Self, ConfigError> {
        let num_blocks = config.check()?;
        let key = config
            .hash_key
            .unwrap_or_else(|| (random_u64() as u128) << 64 | random_u64() as u128);
        Ok(Self {
            id: random_u64(),
            block_size: config.block_size,
            pool: BlockPool::new(num_blocks),
            prefixes: config
                .prefix_caching
                .then(|| Prefixes::new(config.num_blocks, config.block_size.get(), key)),
            observer,
            tables: 0,
            reclaimed_any: false,
            evictions: 0,
            queried_tokens: 0,
            hit_tokens: 0,
            hits: Vec::new(),
        })
    }

    /// The observer.
    pub fn observer(&self) -> &O {
        &self.observer
    }

    /// The observer, to drain what it has gathered.
    pub fn observer_mut(&mut self) -> &mut O {
        &mut self.observer
    }

    /// Figures of this moment, in constant time.
    pub fn usage(&self) -> Usage {
        let num_blocks = self.num_blocks();
        let (free, cached) = (self.pool.free, self.pool.cached);
        Usage {
            num_blocks,
            free,
            cached,
            referenced: num_blocks - free - cached,
            tables: self.tables,
            evictions: self.evictions,
            queried_tokens: self.queried_tokens,
            hit_tokens: self.hit_tokens,
        }
    }

    /// The state of every block that sequences can have, in the order of their ids.
    pub fn block_map(&self) -> impl Iterator<Item = (BlockId, BlockState)> + '_ {
        (1..).zip(&self.pool.metas[1..]).map(|(id, meta)| {
            let state = match (meta.refs, meta.node != 0) {
                (0, false) => BlockState::Free,
                (0, true) => BlockState::Cached,
                (readers, published) => BlockState::Referenced { readers, published },
            };
            (BlockId(id), state)
        })
    }

    /// Forgets every prefix that no table reads: weights or adapters changed. Prefixes that are
    /// being read stay findable. Returns how many were forgotten.
    pub fn clear_cached(&mut self) -> usize {
        let mut forgotten = 0;
        while let Some(block) = self.pool.back().filter(|&b| self.pool.meta(b).node != 0) {
            self.evict(block);
            forgotten += 1;
        }
        forgotten
    }

    fn evict(&mut self, block: BlockId) {
        let prefixes = self
            .prefixes
            .as_mut()
            .expect("only a prefix cache makes nodes");
        prefixes.evict(&mut self.pool, &mut self.observer, block);
        self.evictions += 1;
    }

    /// The block at the front of the list; the caller has made sure that there is one.
    #[inline]
    pub(crate) fn take(&mut self) -> BlockId {
        let block = self.pool.front().expect("availability was checked");
        if self.pool.meta(block).node != 0 {
            self.evict(block);
        }
        self.pool.unlink(block);
        block
    }

    #[inline]
    pub(crate) fn release(&mut self, block: BlockId) {
        match &mut self.prefixes {
            Some(prefixes) => prefixes.release(&mut self.pool, block),
            None => {
                if self.pool.drop_reader(block) {
                    self.pool.push_free(block);
                }
            }
        }
    }

    #[inline]
    pub(crate) fn check_owner(&self, table: &BlockTable) {
        assert!(
            table.manager == self.id,
            "this block table belongs to another block manager"
        );
    }

    /// Sets where a table stands in the tree of prefixes.
    fn stand(&self, table: &mut BlockTable, published: usize) {
        table.published = published;
        table.publish_at = (published + 1) * self.block_size.get();
        let Some(prefixes) = &self.prefixes else {
            table.publish_at = usize::MAX;
            return;
        };
        match published.checked_sub(1).map(|last| table.blocks[last]) {
            None => table.chain = prefixes.root(table.salt),
            Some(BlockId::NULL) => table.publish_at = usize::MAX,
            Some(last) => table.chain = Chain::end_of(&self.pool, last),
        }
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
        prefixes.walk(&self.pool, tokens, salt, |_| hits += 1);
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
        self.hits.clear();
        let mut evictable_hits = 0;
        let mut chain = Chain::default();
        if let Some(prefixes) = &mut self.prefixes {
            chain = prefixes.root(salt);
            if use_cache {
                let (pool, hits) = (&self.pool, &mut self.hits);
                chain = prefixes.walk(pool, tokens, salt, |block| {
                    evictable_hits += usize::from(pool.meta(block).refs == 0);
                    hits.push(block);
                });
            }
        }
        let num_hits = self.hits.len();
        let num_blocks = self.block_size.blocks_for(reserve).max(num_hits);
        if num_blocks - num_hits > self.pool.available() - evictable_hits {
            return None;
        }
        let mut blocks = Vec::with_capacity(num_blocks);
        blocks.extend_from_slice(&self.hits);
        for &block in &blocks {
            self.pool.retain(block);
        }
        for _ in num_hits..num_blocks {
            blocks.push(self.take());
        }
        let num_cached = num_hits * self.block_size.get();
        self.tables += 1;
        if use_cache && self.prefixes.is_some() {
            self.queried_tokens += tokens.len() as u64;
            self.hit_tokens += num_cached as u64;
        }
        let publish_at = match self.prefixes {
            Some(_) => num_cached + self.block_size.get(),
            None => usize::MAX,
        };
        Some(Allocation {
            table: BlockTable {
                blocks,
                manager: self.id,
                salt,
                published: num_hits,
                publish_at,
                chain,
                reclaimed: 0,
            },
            num_cached,
        })
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
        Some(Grown {
            table_at: table_at as u32,
        })
    }

    fn fork(&mut self, table: &BlockTable, num_tokens: usize) -> BlockTable {
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
        self.tables += 1;
        let mut fork = BlockTable {
            blocks,
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
    }

    fn free(&mut self, table: BlockTable) {
        self.check_owner(&table);
        for &block in table.blocks[table.reclaimed..].iter().rev() {
            self.release(block);
        }
        self.tables -= 1;
    }
}
