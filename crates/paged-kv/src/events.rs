//! Hooks that tell a router, a second tier or a test what the prefix cache holds.

use crate::ids::{BlockHash, BlockId, Salt, TokenId};

/// A block that became findable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored<'a> {
    /// The block that holds the keys and values.
    pub block: BlockId,
    /// Its chained hash.
    pub hash: BlockHash,
    /// The hash of the block before it; `None` for the first block of a sequence.
    pub parent: Option<BlockHash>,
    /// How many blocks come before it.
    pub depth: usize,
    /// The salt of its sequence.
    pub salt: Salt,
    /// Its tokens, [`BlockSize`](crate::BlockSize) of them.
    pub tokens: &'a [TokenId],
}

/// Follows the prefix cache. Every method does nothing unless overridden; `()` is the observer
/// that ignores everything and costs nothing.
///
/// A prefix is reported once however many blocks hold it: `stored` when the first block becomes
/// findable under a hash, `removed` when the last one is gone.
pub trait CacheObserver {
    /// A prefix became findable.
    fn stored(&mut self, event: Stored<'_>) {
        let _ = event;
    }

    /// A prefix can no longer be found.
    fn removed(&mut self, hash: BlockHash) {
        let _ = hash;
    }
}

impl CacheObserver for () {}
