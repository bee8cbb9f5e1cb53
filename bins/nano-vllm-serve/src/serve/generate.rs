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
use super::orca::{self, LoadFormat};
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
    answer(app, Endpoint::Completions, id, tenant, request).await
}

pub async fn chat(
    State(app): State<Arc<App>>,
    Extension(id): Extension<RequestId>,
    Extension(tenant): Extension<TenantId>,
    request: Request,
) -> Response {
    answer(app, Endpoint::Chat, id, tenant, request).await
}

async fn answer(
    app: Arc<App>,
    endpoint: Endpoint,
    id: RequestId,
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
    id: RequestId,
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
    let load = LoadFormat::of(request.headers());
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
    let ignored = ignored_fields(&call.ignored);
    let response = if call.stream.is_some() {
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
        let mut response = json_response(StatusCode::OK, &body);
        if let Some(load) = load.and_then(|format| format.header(&app.metrics)) {
            response.headers_mut().insert(orca::LOAD, load);
        }
        response
    };
    Ok(with_ignored(response, ignored))
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
    id: RequestId,
    bytes: &Bytes,
) -> Result<(Call, String), ApiError> {
    let value = body::json(bytes)?;
    let frontend = app.engine.frontend();
    let mut call = Call::parse(
        endpoint,
        value,
        frontend,
        &app.names,
        Dialect::Http(app.parsers),
    )?;
    check_tokens(
        app.server.max_tokens_per_request,
        [call.prompts.len(), call.params.n as usize],
        call.params.max_tokens,
        frontend.limits().max_model_len,
    )?;
    if let (true, Some(stream)) = (app.server.enable_force_include_usage, &mut call.stream) {
        stream.include_usage = true;
    }
    call.tokens_as_ids |= app.server.return_tokens_as_token_ids;
    for prompt in &mut call.prompts {
        app.server.complete_template_kwargs(prompt);
    }
    let id = match &call.request_id {
        Some(own) if !is_plain_id(own) => {
            return Err(ApiError::bad_value(
                "request_id",
                "request_id must have 1 to 128 printable ASCII characters and no space",
            ));
        }
        Some(own) if !id.is_clients => own.clone(),
        _ => id.text,
    };
    Ok((call, id))
}

/// Refuses a request that asks for more than `most` tokens in all (0: any number). A choice without
/// `max_tokens` may fill the model's context, and none goes beyond it.
fn check_tokens(
    most: u64,
    [prompts, n]: [usize; 2],
    max_tokens: Option<u32>,
    max_model_len: usize,
) -> Result<(), ApiError> {
    let each = max_tokens.map_or(max_model_len, |max| max_model_len.min(max as usize));
    let total = (prompts * n) as u64 * each as u64;
    if most == 0 || total <= most {
        return Ok(());
    }
    let each = match max_tokens {
        Some(_) => format!("max_tokens {each}"),
        None => format!("the model's {each} tokens, as max_tokens is not set"),
    };
    let message = format!(
        "the request asks for up to {total} tokens (prompts {prompts} × n {n} × {each}), and this \
         server takes {most} a request (--max-tokens-per-request): ask for less at once"
    );
    Err(ApiError::bad_value("max_tokens", message))
}

/// Fields that had no effect are named in the answer and in the log: a misspelt parameter must not
/// go unnoticed.
pub fn ignored_fields(names: &[String]) -> Option<HeaderValue> {
    if names.is_empty() {
        return None;
    }
    let list = names[..names.len().min(10)].join(", ");
    tracing::warn!("ignored unknown fields: {list}");
    HeaderValue::from_str(&list).ok()
}

/// The answer, with their names if there are any.
pub fn with_ignored(mut response: Response, ignored: Option<HeaderValue>) -> Response {
    if let Some(ignored) = ignored {
        response.headers_mut().insert("x-ignored-fields", ignored);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_counted_over_prompts_and_choices() {
        let check = |most, counts, max| check_tokens(most, counts, max, 100);
        assert!(check(40, [2, 4], Some(5)).is_ok());
        assert!(check(0, [1024, 1], None).is_ok());
        // No answer is longer than the context.
        assert!(check(200, [2, 1], Some(u32::MAX)).is_ok());
        let error = check(39, [2, 4], Some(5)).unwrap_err();
        assert_eq!(error.status, 400);
        assert_eq!(
            error.message,
            "the request asks for up to 40 tokens (prompts 2 × n 4 × max_tokens 5), and this server \
             takes 39 a request (--max-tokens-per-request): ask for less at once"
        );
        let error = check(99, [1, 1], None).unwrap_err();
        assert!(error.message.contains("the model's 100 tokens"));
    }
}
