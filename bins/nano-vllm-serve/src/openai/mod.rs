//! The OpenAI API's bodies, in vLLM's dialect: JSON in, requests for the engine; outputs, JSON out.

mod call;
mod chat;
mod error;
mod fields;
mod forced;
pub mod logprobs;
pub mod parts;
mod response;
mod sampling;
mod structured;

pub use call::{Call, Dialect, Endpoint, ModelNames};
pub use chat::{EFFORTS, NOT_SUPPORTED_IN_CHATS, take_chat_input};
pub use error::ApiError;
pub use fields::{Fields, shorten_text};
pub use logprobs::TokenNames;
pub use response::{completion_logprobs, echoed, now, response, stop_reason};
pub use sampling::NOT_SUPPORTED;
pub use structured::GUIDED;
