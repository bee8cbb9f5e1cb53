//! The OpenAI API's bodies, in vLLM's dialect: JSON in, requests for the engine; outputs, JSON out.

mod call;
mod error;
mod fields;
mod logprobs;
mod response;
mod sampling;

pub use call::{Call, Endpoint, ModelNames};
pub use error::ApiError;
pub use fields::Fields;
pub use response::response;
