//! A full check of the bookkeeping against the tables that are out: for tests.

use std::collections::HashMap;

use crate::events::CacheObserver;
use crate::ids::BlockId;
use crate::manager::BlockManager;
use crate::table::BlockTable;

/// What [`BlockManager::audit`] found to be wrong, in words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct AuditError(String);

macro_rules! ensure {
    ($holds:expr, $($message:tt)*) => {
        if !$holds {
            return Err(AuditError(format!($($message)*)));
        }
    };
}

impl<O: CacheObserver> BlockManager<O> {
    /// Checks every invariant, given all tables that are out. Takes time linear in the pool and
    /// the tables, so it is for tests.
    ///
    /// - every block is in exactly one of: free, cached, referenced;
    /// - the readers of a block are the tables that hold it, and nothing leaks;
    /// - every prefix can be found through exactly one block, and the blocks that hold it form one
    ///   ring;
    /// - what a table shares is its beginning, and no parent is evicted before its child (both
    ///   only as long as no table has reclaimed blocks).
    pub fn audit<'a>(
        &self,
        tables: impl IntoIterator<Item = &'a BlockTable>,
    ) -> Result<(), AuditError> {
        self.audit_readers(tables)?;
        let age = self.audit_list()?;
        self.audit_prefixes(&age)
    }

    fn audit_readers<'a>(
        &self,
        tables: impl IntoIterator<Item = &'a BlockTable>,
    ) -> Result<(), AuditError> {
        let mut readers = vec![0; self.pool.metas.len()];
        let mut count = 0;
        for table in tables {
            count += 1;
            ensure!(table.manager == self.id, "a table of another manager");
            for (i, block) in table.blocks.iter().enumerate() {
                ensure!(
                    block.is_null() == (i < table.reclaimed),
                    "entry {i} is block {block}, with {} entries reclaimed",
                    table.reclaimed
                );
                let published = self.pool.meta(*block).node != 0;
                ensure!(
                    block.is_null() || published || i >= table.published,
                    "entry {i}, block {block}, counts as published and cannot be found"
                );
                let shared = |i: usize| !self.pool.is_private(table.blocks[i]);
                let size = self.block_size.get();
                ensure!(
                    !table.private.covers(i * size, i * size + 1) || !shared(i),
                    "entry {i}, block {block}, counts as private and is not"
                );
                ensure!(
                    self.reclaimed_any || i == 0 || !shared(i) || shared(i - 1),
                    "entry {i}, block {block}, is shared and the one before it is not"
                );
                readers[block.index()] += u32::from(!block.is_null());
            }
            let room = table.blocks.len() * self.block_size.get();
            ensure!(
                !table.private.covers(room, room + 1),
                "positions behind the table's {room} count as private"
            );
        }
        ensure!(
            count == self.tables,
            "{} tables are out, of which {count} are left: the others leaked",
            self.tables
        );
        for (id, (meta, &readers)) in self.pool.metas.iter().zip(&readers).enumerate() {
            let refs = meta.refs;
            ensure!(
                refs == readers,
                "block {id} counts {refs} readers and {readers} tables hold it"
            );
        }
        Ok(())
    }

    /// The place of each block in the list, from the front; 0 for blocks not in it.
    fn audit_list(&self) -> Result<Vec<usize>, AuditError> {
        let mut age = vec![0; self.pool.metas.len()];
        let (mut free, mut cached) = (0, 0);
        for (place, block) in (1..).zip(self.pool.list()) {
            let meta = self.pool.meta(block);
            ensure!(age[block.index()] == 0, "block {block} is listed twice");
            ensure!(meta.refs == 0, "block {block} is listed and has readers");
            age[block.index()] = place;
            if meta.node == 0 {
                ensure!(cached == 0, "free block {block} is behind a cached one");
                free += 1;
            } else {
                cached += 1;
            }
        }
        ensure!(
            (free, cached) == (self.pool.free, self.pool.cached),
            "{free} free and {cached} cached blocks are listed, {} and {} counted",
            self.pool.free,
            self.pool.cached
        );
        let unread = self.pool.metas[1..].iter().filter(|m| m.refs == 0).count();
        ensure!(
            unread == free + cached,
            "{unread} blocks have no readers, {} are listed",
            free + cached
        );
        Ok(age)
    }

    fn audit_prefixes(&self, age: &[usize]) -> Result<(), AuditError> {
        let mut holders: HashMap<u64, Vec<u32>> = HashMap::new();
        for (id, meta) in (0..).zip(&self.pool.metas) {
            if meta.node != 0 {
                holders.entry(meta.node).or_default().push(id);
            }
        }
        let Some(prefixes) = &self.prefixes else {
            ensure!(holders.is_empty(), "nodes without a prefix cache");
            return Ok(());
        };
        ensure!(
            prefixes.index.iter().count() == holders.len(),
            "{} index entries for {} prefixes",
            prefixes.index.iter().count(),
            holders.len()
        );
        for (node, blocks) in &holders {
            let first = &self.pool.metas[blocks[0] as usize];
            let found = prefixes
                .index
                .find(first.hash, |b| self.pool.metas[b as usize].node == *node);
            ensure!(
                found.is_some_and(|found| blocks.contains(&found)),
                "blocks {blocks:?} hold a prefix that cannot be found"
            );
            for &block in blocks {
                let meta = &self.pool.metas[block as usize];
                ensure!(
                    (meta.hash, meta.parent, meta.depth) == (first.hash, first.parent, first.depth)
                        && prefixes.tokens_of(BlockId(block))
                            == prefixes.tokens_of(BlockId(blocks[0])),
                    "blocks {} and {block} disagree about their prefix",
                    blocks[0]
                );
                ensure!(
                    blocks.len() == 1 || meta.refs > 0,
                    "block {block} is cached beside another holder"
                );
            }
            if first.refs > 0 {
                let ring = std::iter::successors(Some(blocks[0]), |&b| {
                    Some(self.pool.metas[b as usize].next).filter(|&next| next != blocks[0])
                });
                ensure!(
                    ring.take(blocks.len() + 1).count() == blocks.len(),
                    "the ring of blocks {blocks:?} is broken"
                );
            }
            let parent = &holders.get(&first.parent[0]).filter(|_| first.depth > 0);
            if let Some(parent) = parent {
                ensure!(
                    age[parent[0] as usize] == 0
                        || self.reclaimed_any
                        || age[parent[0] as usize] > age[blocks[0] as usize] && first.refs == 0,
                    "block {} would be evicted before its child {}",
                    parent[0],
                    blocks[0]
                );
            } else {
                ensure!(
                    first.depth == 0 || self.reclaimed_any,
                    "block {} outlived its parent",
                    blocks[0]
                );
            }
        }
        Ok(())
    }
}
