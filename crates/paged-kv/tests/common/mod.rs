//! Two oracles, and a driver that holds a manager against them operation by operation.

pub mod kv_sim;
pub mod model;
pub mod world;
