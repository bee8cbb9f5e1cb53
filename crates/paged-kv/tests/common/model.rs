//! The rules of the pool written down without hashes, links or counters: prefixes are compared as
//! whole token lists, and every step of the manager is checked against them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use paged_kv::{BlockId, Salt, TokenId};

/// A prefix of whole blocks.
pub type Prefix = (u128, Vec<TokenId>);

pub struct Model {
    block_size: usize,
    pub free: BTreeSet<BlockId>,
    /// Cached prefixes without readers, the next to be evicted in front.
    pub cached: VecDeque<(Prefix, BlockId)>,
    /// Readers of each block in a table, and what it was published as.
    used: BTreeMap<BlockId, (usize, Option<Prefix>)>,
}

impl Model {
    pub fn new(blocks: impl Iterator<Item = BlockId>, block_size: usize) -> Self {
        Self {
            block_size,
            free: blocks.collect(),
            cached: VecDeque::new(),
            used: BTreeMap::new(),
        }
    }

    pub fn available(&self) -> usize {
        self.free.len() + self.cached.len()
    }

    fn is_findable(&self, prefix: &Prefix) -> bool {
        self.cached.iter().any(|(p, _)| p == prefix) || self.is_read(prefix)
    }

    fn is_read(&self, prefix: &Prefix) -> bool {
        self.used.values().any(|(_, p)| p.as_ref() == Some(prefix))
    }

    pub fn prefix(&self, tokens: &[TokenId], salt: Salt, blocks: usize) -> Prefix {
        (salt.get(), tokens[..blocks * self.block_size].to_vec())
    }

    /// How many whole blocks of `tokens` can be found.
    pub fn hits(&self, tokens: &[TokenId], salt: Salt) -> usize {
        (1..)
            .take_while(|n| n * self.block_size <= tokens.len())
            .take_while(|&n| self.is_findable(&self.prefix(tokens, salt, n)))
            .count()
    }

    /// How many of the first `blocks` prefixes nobody reads.
    pub fn unread(&self, tokens: &[TokenId], salt: Salt, blocks: usize) -> usize {
        let prefixes = (1..=blocks).map(|n| self.prefix(tokens, salt, n));
        prefixes.filter(|p| !self.is_read(p)).count()
    }

    /// A new sequence reads `block` for `prefix`.
    pub fn hit(&mut self, block: BlockId, prefix: &Prefix) {
        if let Some(at) = self
            .cached
            .iter()
            .position(|(p, b)| (p, *b) == (prefix, block))
        {
            self.cached.remove(at);
            self.used.insert(block, (1, Some(prefix.clone())));
        } else {
            let (readers, held) = self.used.get_mut(&block).expect("the block is in use");
            assert_eq!(
                held.as_ref(),
                Some(prefix),
                "block {block} holds another prefix"
            );
            *readers += 1;
        }
    }

    pub fn share(&mut self, block: BlockId) {
        self.used.get_mut(&block).expect("the block is in use").0 += 1;
    }

    /// `block` was handed out anew: a free one, or else the oldest cached one.
    pub fn take(&mut self, block: BlockId) {
        if self.free.is_empty() {
            let (_, oldest) = self.cached.pop_front().expect("a block was to be had");
            assert_eq!(block, oldest, "not the block to evict");
        } else {
            assert!(self.free.remove(&block), "block {block} is not free");
        }
        self.used.insert(block, (1, None));
    }

    pub fn release(&mut self, block: BlockId) {
        let (readers, _) = self.used.get_mut(&block).expect("the block is in use");
        *readers -= 1;
        if *readers > 0 {
            return;
        }
        match self.used.remove(&block).unwrap().1 {
            Some(prefix) if !self.is_read(&prefix) => self.cached.push_back((prefix, block)),
            _ => assert!(self.free.insert(block)),
        }
    }

    pub fn is_private(&self, block: BlockId) -> bool {
        self.used[&block] == (1, None)
    }

    pub fn readers(&self, block: BlockId) -> usize {
        self.used[&block].0
    }

    pub fn publish(&mut self, block: BlockId, prefix: Prefix) {
        if let Some(at) = self.cached.iter().position(|(p, _)| *p == prefix) {
            let (_, other) = self.cached.remove(at).unwrap();
            self.free.insert(other);
        }
        self.used.get_mut(&block).expect("the block is in use").1 = Some(prefix);
    }

    pub fn clear_cached(&mut self) -> usize {
        let cleared = self.cached.len();
        self.free
            .extend(self.cached.drain(..).map(|(_, block)| block));
        cleared
    }
}
