//! Errors in the API's form: `{"error": {"message", "type", "param", "code"}}`.

use engine::RequestError;
use serde_json::{Value, json};

/// What a client is told about a request that was refused or failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status, also the body's `code`.
    pub status: u16,
    /// The body's `type`.
    pub kind: &'static str,
    /// What was wrong, where, and what to do.
    pub message: String,
    /// The parameter at fault.
    pub param: Option<String>,
}

impl ApiError {
    /// 400: a value is out of its range or an option is not supported.
    pub fn bad_value(param: &str, message: impl Into<String>) -> Self {
        Self {
            status: 400,
            kind: "BadRequestError",
            message: message.into(),
            param: Some(param.to_owned()),
        }
    }

    /// 400: the request does not have the form it must have.
    pub fn malformed(message: impl Into<String>) -> Self {
        Self {
            status: 400,
            kind: "Bad Request",
            message: message.into(),
            param: None,
        }
    }

    /// 400: a parameter does not have the form it must have, such as a text where a number belongs.
    pub fn bad_form(param: &str, message: impl Into<String>) -> Self {
        Self {
            param: Some(param.to_owned()),
            ..Self::malformed(message)
        }
    }

    /// 404: a model or route that is not served.
    pub fn not_found(param: Option<&str>, message: impl Into<String>) -> Self {
        Self {
            status: 404,
            kind: "NotFoundError",
            message: message.into(),
            param: param.map(str::to_owned),
        }
    }

    /// 503: not now, but perhaps in a moment.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self {
            status: 503,
            kind: "Service Unavailable",
            message: message.into(),
            param: None,
        }
    }

    /// Any other status.
    pub fn other(status: u16, kind: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            kind,
            message: message.into(),
            param: None,
        }
    }

    /// 500: the engine failed.
    pub fn internal(message: impl Into<String>) -> Self {
        Self {
            status: 500,
            kind: "InternalServerError",
            message: message.into(),
            param: None,
        }
    }

    /// The `error` object.
    pub fn body(&self) -> Value {
        json!({"message": self.message, "type": self.kind, "param": self.param, "code": self.status})
    }
}

impl From<RequestError> for ApiError {
    fn from(error: RequestError) -> Self {
        match error {
            RequestError::QueueFull { .. } => Self::unavailable(error.to_string()),
            e if !e.is_client_error() => Self::internal(e.to_string()),
            e => Self {
                param: e.param().map(str::to_owned),
                ..Self::bad_value("", e.to_string())
            },
        }
    }
}
