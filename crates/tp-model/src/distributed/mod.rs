//! Several ranks that run one model: threads of this process, or processes that a launcher started.
//!
//! Rank 0 schedules, samples and talks to the world. The others hold their share of the weights and
//! of the cache and do what rank 0 says: each step comes to them as the plan in plain numbers, with
//! the tokens that rank 0 sampled since the last one. They decide nothing.
//!
//! The first failure of any rank is the group's failure: every rank hears who failed and why, and
//! whatever waits for another rank stops waiting ([`crate::comm::Health`]).

mod connect;
mod fingerprint;
mod follow;
mod launch;
mod message;
mod monitor;
mod store;
mod wire;
mod world;

pub use follow::{Followers, LocalRanks, follow};
pub use launch::Launcher;
pub(crate) use message::StepMessage;
pub use world::World;
