//! A model of few lines whose every output depends on every token it reads, run once through the
//! block tables of a plan and once plainly.
#![allow(dead_code, reason = "each test file uses a part of it")]

pub mod figures;
pub mod life;
pub mod manual;
pub mod model;
pub mod runner;
pub mod world;
