//! The decoder that all supported families are instances of.

mod decoder;
mod layer;

pub use decoder::Decoder;
