//! paged-kv (contract sketch: the owner of this crate completes it)

/// A token id of the model's vocabulary.
pub type TokenId = u32;
