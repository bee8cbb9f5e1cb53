//! Paged KV-cache bookkeeping.
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
pub use swap::{HostBlockId, SwappedTable, Transfer};
pub use table::BlockTable;
pub use usage::{BlockState, Usage};
