//! Figures for metrics and for a picture of the pool.

/// How a pool is used at one moment, and what its prefix cache has done since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Usage {
    /// Blocks that sequences can have. `free + cached + referenced` make this up.
    pub num_blocks: usize,
    /// Blocks that nobody reads and nobody can find.
    pub free: usize,
    /// Blocks that nobody reads, but that a new sequence may find.
    pub cached: usize,
    /// Blocks in at least one table.
    pub referenced: usize,
    /// Tables that were handed out and not freed.
    pub tables: usize,
    /// Blocks of the host tier.
    pub host_blocks: usize,
    /// Those of them that hold nothing.
    pub host_free: usize,
    /// Sequences that were swapped out and are neither back nor discarded.
    pub swapped: usize,
    /// Cached blocks that were given up for room, since the start.
    pub evictions: u64,
    /// Tokens of successful allocations that were allowed to use the cache, since the start.
    pub queried_tokens: u64,
    /// Those of them that were found, since the start.
    pub hit_tokens: u64,
}

impl Usage {
    /// Share of the blocks that are in tables, 0 to 1.
    pub fn occupancy(&self) -> f64 {
        self.referenced as f64 / self.num_blocks as f64
    }

    /// Share of queried tokens that were found, 0 to 1; 0 before the first query.
    pub fn hit_rate(&self) -> f64 {
        self.hit_tokens as f64 / self.queried_tokens.max(1) as f64
    }
}

/// What one block is at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockState {
    /// Nobody reads it and nobody can find it.
    Free,
    /// Nobody reads it, but a new sequence may find it.
    Cached,
    /// In tables.
    Referenced {
        /// How many tables hold it.
        readers: u32,
        /// Whether a new sequence may find what it holds.
        published: bool,
    },
}
