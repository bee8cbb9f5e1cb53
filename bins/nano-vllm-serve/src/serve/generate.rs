//! `/v1/completions` and `/v1/chat/completions`.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use engine::RequestOutput;
use serde_json::Value;

use super::auth::TenantId;
use super::body;
use super::errors::{json_response, shutting_down};
use super::generation::{Generation, Origin};
use super::lifecycle::Phase;
use super::metrics::Rejection;
use super::routes::{RequestId, is_plain_id};
use super::sse::Events;
use super::state::App;
use super::traces::Parent;
use crate::openai::{ApiError, Call, Dialect, Endpoint, now, response};

/// Bodies of more bytes are parsed and tokenized on a thread that may block: on this one they
/// would hold up everybody's streams.
const INLINE_BYTES: usize = 8 << 10;

pub async fn completions(
    State(app): State<Arc<App>>,
    Extension(id): Extension<RequestId>,
    Extension(tenant): Extension<TenantId>,
    request: Request,
) -> Response {
    answer(app, Endpoint::Completions, id.0, tenant, request).await
}

pub async fn chat(
    State(app): State<Arc<App>>,
    Extension(id): Extension<RequestId>,
    Extension(tenant): Extension<TenantId>,
    request: Request,
) -> Response {
    answer(app, Endpoint::Chat, id.0, tenant, request).await
}

async fn answer(
    app: Arc<App>,
    endpoint: Endpoint,
    id: String,
    tenant: TenantId,
    request: Request,
) -> Response {
    match try_answer(app, endpoint, id, tenant, request).await {
        Ok(response) => response,
        Err(error) => error.into_response(),
    }
}

/// A request whose prompts are in the engine.
struct Started {
    call: Call,
    id: String,
    generation: Generation,
}

async fn try_answer(
    app: Arc<App>,
    endpoint: Endpoint,
    id: String,
    tenant: TenantId,
    request: Request,
) -> Result<Response, ApiError> {
    // First counted, then looked: a shutdown that begins in between waits for this one.
    let in_flight = app.lifecycle.enter();
    if app.lifecycle.phase() != Phase::Ready {
        app.metrics.on_rejection(tenant, Rejection::ShuttingDown);
        return Err(shutting_down());
    }
    let parent = app
        .tracer
        .as_ref()
        .and_then(|_| Parent::of(request.headers()));
    let bytes = body::read(&app, request).await?;
    let origin = Origin {
        tenant,
        parent,
        in_flight,
    };
    let small = bytes.len() <= INLINE_BYTES;
    let parse = {
        let app = app.clone();
        move || parse(&app, endpoint, id, &bytes)
    };
    let (call, id) = on_a_thread_that_may_block(!small, parse).await?;
    // A grammar may take a while to compile.
    let heavy = !small || call.structured.is_some();
    let start = {
        let app = app.clone();
        move || {
            let generation = Generation::start(&app, &call, &id, origin)?;
            Ok(Started {
                call,
                id,
                generation,
            })
        }
    };
    let started = on_a_thread_that_may_block(heavy, start).await;
    let Started {
        call,
        id,
        mut generation,
    } = started?;
    let ignored = ignored_fields(&call);
    let mut response = if call.stream.is_some() {
        Events::new(app, call, &id, now(), generation).into_response()
    } else {
        let created = now();
        generation.finish().await?;
        let outputs: Vec<RequestOutput> = (0..generation.len())
            .map(|at| generation.output(at).clone())
            .collect();
        drop(generation);
        let mut body = response(&call, &id, created, &outputs, app.engine.frontend());
        if !app.server.enable_prompt_tokens_details {
            body["usage"]["prompt_tokens_details"] = Value::Null;
        }
        body["system_fingerprint"] = app.fingerprint().into();
        json_response(StatusCode::OK, &body)
    };
    if let Some(ignored) = ignored {
        response.headers_mut().insert("x-ignored-fields", ignored);
    }
    Ok(response)
}

/// Does `work` at once, or on another thread if it is `heavy`.
async fn on_a_thread_that_may_block<T: Send + 'static>(
    heavy: bool,
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    if !heavy {
        return work();
    }
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|_| Err(ApiError::internal("the request could not be read")))
}

/// The request, and its id.
fn parse(
    app: &App,
    endpoint: Endpoint,
    id: String,
    bytes: &Bytes,
) -> Result<(Call, String), ApiError> {
    let value = body::json(bytes)?;
    let frontend = app.engine.frontend();
    let call = Call::parse(
        endpoint,
        value,
        frontend,
        &app.names,
        Dialect::Http(app.parsers),
    )?;
    let id = match &call.request_id {
        Some(own) if !is_plain_id(own) => {
            return Err(ApiError::bad_value(
                "request_id",
                "request_id must have 1 to 128 printable ASCII characters and no space",
            ));
        }
        Some(own) => own.clone(),
        None => id,
    };
    Ok((call, id))
}

/// Fields that had no effect are named in the answer and in the log: a misspelt parameter must not
/// go unnoticed.
fn ignored_fields(call: &Call) -> Option<HeaderValue> {
    if call.ignored.is_empty() {
        return None;
    }
    let list = call.ignored[..call.ignored.len().min(10)].join(", ");
    tracing::warn!("ignored unknown fields: {list}");
    HeaderValue::from_str(&list).ok()
}
