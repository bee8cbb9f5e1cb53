//! Reading a request's body: not too much, not for too long, and JSON.

use axum::body::Body;
use axum::extract::Request;
use axum::http::header::CONTENT_TYPE;
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde_json::Value;

use super::state::App;
use crate::openai::ApiError;

/// The body's bytes.
pub async fn read(app: &App, request: Request<Body>) -> Result<Bytes, ApiError> {
    let media = request
        .headers()
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split(';').next())
        .unwrap_or_default();
    if !media.trim().eq_ignore_ascii_case("application/json") {
        return Err(ApiError::malformed(
            "Unsupported Media Type: Only 'application/json' is allowed",
        ));
    }
    let limit = usize::try_from(app.server.max_body_size).unwrap_or(usize::MAX);
    let body = Limited::new(request.into_body(), limit).collect();
    let timeout = app.server.client_timeout;
    let read = match timeout.is_zero() {
        true => Ok(body.await),
        false => tokio::time::timeout(timeout, body).await,
    };
    match read {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(ApiError::other(
            413,
            "RequestEntityTooLarge",
            format!("the body has more than {limit} bytes, which is the most"),
        )),
        Ok(Err(_)) => Err(ApiError::malformed("the body ended early")),
        Err(_) => Err(ApiError::other(
            408,
            "RequestTimeout",
            format!("the body did not come within {} s", timeout.as_secs_f64()),
        )),
    }
}

/// The body's JSON. Nesting is limited to 128 levels, and no number may be out of range.
pub fn json(bytes: &[u8]) -> Result<Value, ApiError> {
    let text = std::str::from_utf8(bytes)
        .map_err(|error| ApiError::malformed(format!("the body is not UTF-8: {error}")))?;
    serde_json::from_str(text)
        .map_err(|error| ApiError::malformed(format!("the body is not JSON: {error}")))
}
