//! tp-model
