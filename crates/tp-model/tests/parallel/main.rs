//! Models divided among ranks: exchanges, shares, and what happens when a rank is lost.

mod exchange;
mod failures;
mod shares;
mod stages;
