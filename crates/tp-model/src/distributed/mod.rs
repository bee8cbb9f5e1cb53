//! Several ranks that run one model: threads of this process, or processes that a launcher started.
//!
//! Rank 0 schedules and talks to the world. The others hold their share of the weights and of the
//! cache and do what rank 0 says: each step comes to them as the plan in plain numbers, with the
//! tokens that were sampled since the last one. They decide nothing.
//!
//! The first rank of the last pipeline stage samples: with one stage that is rank 0. With several,
//! sampled tokens come back to rank 0, which schedules a sequence again only once its token is
//! there, and other sequences meanwhile: at least as many steps are under way as there are stages.
//!
//! The first failure of any rank is the group's failure: every rank hears who failed and why, and
//! whatever waits for another rank stops waiting ([`crate::comm::Health`]).

mod connect;
mod fingerprint;
mod follow;
mod followers;
mod launch;
mod local;
mod message;
mod monitor;
mod output;
mod outputs;
mod store;
mod wire;
mod words;
mod world;

pub use follow::follow;
pub use followers::Followers;
pub use launch::Launcher;
pub use local::LocalRanks;
pub(crate) use message::{StepMessage, unsampled};
pub(crate) use output::{decode as decode_output, encode as encode_output};
pub use world::World;
