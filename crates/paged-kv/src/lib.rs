//! vLLM's memory manager as a library: which block of the KV cache holds which token of which
//! sequence. Numbers only: it knows no tensor, no device and no thread, and fits any engine.
//!
//! # The idea
//!
//! A transformer keeps a key and a value of every token it has seen. *Paged attention* cuts the
//! buffers that hold them into blocks of a few tokens and gives every sequence a table of blocks,
//! as an operating system gives a process a table of pages. Memory is wasted in the last block of
//! a sequence only, and sequences that begin alike read the same blocks.
//!
//! ```text
//!                 position   0..4    4..8    8..12   12..16
//!   table of A             [  1   ,   2   ,   5   ]                A and B have the first
//!   table of B             [  1   ,   2   ,   3   ,   6  ]         8 tokens in common
//!                             │       │       │       │
//!               ┌──────┬──────┼───────┼───────┼───────┼─────┬─────
//!   KV buffers  │ null │  1   │  2    │  3    │ 4   5 │  6  │ ...
//!               └──────┴──────┴───────┴───────┴───────┴─────┴─────
//!     readers     –       2       2       1     0   1    1
//!                                               └─ cached: nobody reads it, but a new sequence
//!                                                  that begins alike will find it
//! ```
//!
//! Every block is in exactly one of three states, and [`BlockManager::audit`] proves it:
//!
//! ```text
//!              allocate, extend                      free (last reader, published)
//!    FREE ──────────────────────▶ REFERENCED ───────────────────────────────────▶ CACHED
//!     ▲                            │       ▲                                        │ │
//!     └────────────────────────────┘       └──── allocate (prefix hit), swap_in ────┘ │
//!     ▲  free (last reader, unpublished)                                              │
//!     └────────────── room is needed: evicted, the ends of old sequences first ───────┘
//! ```
//!
//! # A sequence's life
//!
//! ```
//! use paged_kv::{BlockManager, BlockSize, Config, KvAllocator, Salt};
//!
//! // KV buffers of 100 blocks of 4 tokens. Block 0 is padding, 99 are for sequences.
//! let mut kv = BlockManager::new(Config::new(100, BlockSize::new(4)?))?;
//! let mut tokens = vec![11, 12, 13, 14, 15, 16];
//!
//! // A table with room for the prompt. Nothing is cached yet: compute positions 0..6.
//! let mut a = kv.allocate(&tokens, Salt::NONE, true, tokens.len()).expect("it fits");
//! assert_eq!((a.table.blocks().len(), a.num_cached), (2, 0));
//! kv.publish(&mut a.table, &tokens, 6); // block 0 of the table is full and can be found
//!
//! // Decode: room for one more token, and `copies` to do before it is written.
//! let mut copies = Vec::new();
//! tokens.push(17);
//! kv.extend(&mut a.table, 6, 7, &mut copies).expect("it fits");
//! assert!(copies.is_empty());
//!
//! // A second sequence that begins alike starts with the block of the first.
//! let b = kv.allocate(&[11, 12, 13, 14, 99], Salt::NONE, true, 5).expect("it fits");
//! assert_eq!(b.num_cached, 4);
//! assert_eq!(b.table.blocks()[0], a.table.blocks()[0]);
//!
//! // A fork shares all, down to the partial last block; the first to write gets a copy.
//! let mut c = kv.fork(&mut a.table, 7);
//! kv.extend(&mut c, 7, 8, &mut copies).expect("it fits");
//! assert_eq!(copies[0].src, a.table.blocks()[1]);
//! assert_eq!(copies[0].dst, c.blocks()[1]);
//!
//! for table in [a.table, b.table, c] {
//!     kv.free(table);
//! }
//! assert_eq!(kv.num_available(), 99);
//! assert_eq!(kv.match_prefix(&[11, 12, 13, 14, 99], Salt::NONE), 4); // still there
//! # Ok::<(), paged_kv::ConfigError>(())
//! ```
//!
//! # What is where
//!
//! | to | use |
//! |---|---|
//! | take, grow, share and give back blocks | [`KvAllocator`], implemented by [`BlockManager`] |
//! | find a prefix and make blocks findable | [`allocate`](KvAllocator::allocate), [`match_prefix`](KvAllocator::match_prefix), [`publish`](KvAllocator::publish) |
//! | sample several answers to a prompt, beams | [`fork`](KvAllocator::fork), [`extend`](KvAllocator::extend) |
//! | keep tenants, adapters, images apart | [`Salt`] |
//! | attend to a sliding window | [`reclaim_before`](KvAllocator::reclaim_before) |
//! | preempt without computing again | [`swap_out`](KvAllocator::swap_out), [`swap_in`](KvAllocator::swap_in) |
//! | follow the cache from a router | [`CacheObserver`] |
//! | report metrics, draw the pool | [`usage`](BlockManager::usage), [`block_map`](BlockManager::block_map) |
//!
//! # What can be relied on
//!
//! - **A hit is right.** The hash of a block (XXH3-128 under a random key, chained through all
//!   tokens before it) only finds a candidate. Its tokens and the identity of its parent are then
//!   compared, so by induction the whole prefix and its [`Salt`] are equal.
//! - **Nobody writes what another reads.** After `extend` the written blocks are in one table
//!   alone, and not in the prefix cache.
//! - **Blocks go back once.** A [`BlockTable`] cannot be cloned or made by hand; freeing takes it.
//! - **Refusals are values.** What does not fit is `None` or `Err` and changes nothing. Panics are
//!   left for mistakes that no input can cause, come before any change, and are listed with each
//!   method.
//! - **Time is constant** for a block that is allocated, freed, found or evicted, independent of
//!   the size of the pool. After construction only the tables themselves allocate memory, and a
//!   scratch list as long as the longest hit. A block costs 64 bytes besides its stored tokens.
//! - **Ends before beginnings.** Eviction takes the block that lost its last reader longest ago,
//!   and of one sequence its end first. A block never outlives the one before it, unless a window
//!   gave that one back: then what follows cannot be found any more and is evicted in its turn.
//!
//! # Order of work on the device
//!
//! Blocks change hands within a step, so their contents must move in the order in which the manager
//! was called: the step's [`BlockCopy`]s, [`SwapOut`]s and [`SwapIn`]s in the order in which they
//! were pushed, then the writes of the step. (Two lists may be carried out one after the other
//! where no entry of one touches a block of the other, or where all of one were pushed before the
//! other's.) [`publish`](KvAllocator::publish) what has been *computed*; with several steps in
//! flight, free a table when the last step that reads it has been launched on the same queue or has
//! finished.
//!
//! # Versions
//!
//! Releases follow semantic versioning; a higher minimum Rust version is a minor release. Structs
//! that may grow are `non_exhaustive`. Hashes are no stable format: they change with the key, the
//! byte order of the machine and releases.
#![deny(missing_docs)]
#![forbid(unsafe_code)]

mod allocator;
mod audit;
mod config;
mod events;
mod hash;
mod ids;
mod index;
mod manager;
mod pool;
mod prefix;
mod sequence;
mod swap;
mod table;
mod usage;

pub use allocator::{Allocation, Grown, KvAllocator};
pub use audit::AuditError;
pub use config::{Config, ConfigError};
pub use events::{CacheObserver, Stored};
pub use ids::{BlockCopy, BlockHash, BlockId, BlockSize, Salt, TokenId};
pub use manager::BlockManager;
pub use swap::{HostBlockId, SwapIn, SwapOut, SwappedTable};
pub use table::BlockTable;
pub use usage::{BlockState, Usage};

/// The README's code is tested with the documentation.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
