//! Which path does what, and what every request passes first.

use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::extract::{MatchedPath, Path, Request, State};
use axum::http::header::{ACCEPT, CONNECTION, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};

use super::auth::TenantId;
use super::errors::{json_response, unauthorized};
use super::lifecycle::Phase;
use super::metrics::classic;
use super::openapi::{About, document};
use super::state::App;
use super::{cors, generate, live, text};
use crate::openai::{ApiError, shorten_text};

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Routes that need another kind of model, refused by name.
const OTHER_MODELS: [&str; 11] = [
    "/v1/embeddings",
    "/v2/embed",
    "/pooling",
    "/classify",
    "/score",
    "/v1/score",
    "/rerank",
    "/v1/rerank",
    "/v2/rerank",
    "/v1/audio/transcriptions",
    "/v1/images/generations",
];

/// A request's id.
#[derive(Clone)]
pub struct RequestId {
    pub text: String,
    /// Whether the client brought it in the head: then it goes before one in the body.
    pub is_clients: bool,
}

/// The server's routes.
pub fn router(app: Arc<App>) -> Router {
    let mut router = Router::new()
        .route("/v1/completions", post(generate::completions))
        .route("/v1/chat/completions", post(generate::chat))
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model))
        .route("/tokenize", post(text::tokenize))
        .route("/detokenize", post(text::detokenize))
        .route("/health", get(health))
        .route("/ping", get(health).post(health))
        .route("/ready", get(ready))
        .route("/version", get(version))
        .route("/load", get(load))
        .route("/metrics", get(metrics))
        .route("/openapi.json", get(openapi))
        .route("/live", get(live::events))
        .route("/", get(live::page));
    for path in OTHER_MODELS {
        router = router.route(path, post(other_model));
    }
    router
        .fallback(not_found)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(app.clone(), gate))
        .with_state(app)
}

/// Keys, cross-origin rules, request ids and the log.
async fn gate(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let origin = cors::allowed_origin(&app.server.allowed_origins, request.headers());
    if request.method() == Method::OPTIONS
        && let Some(origin) = origin
    {
        return cors::preflight(origin, request.headers());
    }
    let path = request.uri().path();
    let open = matches!(path, "/health" | "/ready");
    let (method, log_path) = (request.method().clone(), path.to_owned());
    let route = request.extensions().get::<MatchedPath>().cloned();
    let brought = client_id(&request);
    let is_clients = brought.is_some();
    let id = brought.unwrap_or_else(|| app.ids.next());
    let tenant = match app.keys.admit(request.headers()) {
        None if open => Some(TenantId::default()),
        tenant => tenant,
    };
    let mut response = match tenant {
        Some(tenant) => {
            let text = id.clone();
            request
                .extensions_mut()
                .insert(RequestId { text, is_clients });
            request.extensions_mut().insert(tenant);
            next.run(request).await
        }
        None => live::locked_page(&log_path, request.headers()).unwrap_or_else(unauthorized),
    };
    if let Some(origin) = origin {
        cors::mark(origin, &mut response);
    }
    if app.lifecycle.phase() != Phase::Ready {
        response
            .headers_mut()
            .insert(CONNECTION, HeaderValue::from_static("close"));
    }
    if app.server.enable_request_id_headers
        && let Ok(value) = HeaderValue::from_str(&id)
    {
        response.headers_mut().insert(X_REQUEST_ID, value);
    }
    if app.server.enable_log_requests {
        tracing::info!(
            request_id = id,
            %method,
            path = log_path,
            status = response.status().as_u16(),
            seconds = started.elapsed().as_secs_f64(),
            "request"
        );
    }
    let (status, route) = (response.status(), route.as_ref().map(MatchedPath::as_str));
    let http = &app.metrics.http;
    response.map(|body| http.watch(route, &method, status, started, body))
}

/// The id that the client brings, if it is short and plain enough to be repeated.
fn client_id(request: &Request) -> Option<String> {
    let id = request.headers().get(X_REQUEST_ID)?.to_str().ok()?;
    is_plain_id(id).then(|| id.to_owned())
}

/// Whether an id may stand in answers and logs as it is.
pub fn is_plain_id(id: &str) -> bool {
    (1..=128).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic())
}

async fn not_found() -> ApiError {
    ApiError::not_found(None, "Not Found")
}

async fn wrong_method() -> Response {
    // axum adds `Allow` with the methods that there are.
    ApiError::other(405, "MethodNotAllowedError", "Method Not Allowed").into_response()
}

async fn other_model(request: Request) -> ApiError {
    let path = request.uri().path();
    ApiError {
        param: None,
        ..ApiError::bad_value(
            "",
            format!("The model does not support {path}: it generates text only"),
        )
    }
}

async fn models(State(app): State<Arc<App>>) -> Response {
    let cards: Vec<Value> = app.names.0.iter().map(|name| card(&app, name)).collect();
    json_response(StatusCode::OK, &json!({"object": "list", "data": cards}))
}

async fn model(State(app): State<Arc<App>>, Path(name): Path<String>) -> Response {
    match app.names.0.contains(&name) {
        true => json_response(StatusCode::OK, &card(&app, &name)),
        false => ApiError::not_found(
            Some("model"),
            format!("The model `{}` does not exist.", shorten_text(&name)),
        )
        .into_response(),
    }
}

fn card(app: &App, name: &str) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": app.created,
        "owned_by": "vllm",
        "root": app.names.0[0],
        "parent": null,
        "max_model_len": app.engine.frontend().limits().max_model_len,
        "permission": [],
    })
}

async fn health(State(app): State<Arc<App>>) -> Response {
    if let Some(cause) = app.engine.stop_cause() {
        tracing::warn!("health: the engine has stopped: {cause}");
        return ApiError::unavailable("the engine has stopped").into_response();
    }
    let (limit, stalled) = (app.server.watchdog_timeout, app.heartbeat.stalled());
    if !limit.is_zero() && stalled >= limit {
        let message = format!(
            "work has waited {} s without a step that ends",
            stalled.as_secs()
        );
        return ApiError::unavailable(message).into_response();
    }
    StatusCode::OK.into_response()
}

async fn ready(State(app): State<Arc<App>>) -> Response {
    match app.lifecycle.phase() {
        Phase::Ready => health(State(app)).await,
        _ => ApiError::unavailable("the server is shutting down").into_response(),
    }
}

async fn openapi(State(app): State<Arc<App>>) -> Response {
    let about = About {
        names: &app.names.0,
        limits: app.engine.frontend().limits(),
        keys: !app.keys.is_open(),
        tools: app.parsers.tools,
    };
    json_response(StatusCode::OK, &document(&about))
}

async fn version() -> Response {
    json_response(
        StatusCode::OK,
        &json!({"version": env!("CARGO_PKG_VERSION")}),
    )
}

async fn load(State(app): State<Arc<App>>) -> Response {
    json_response(
        StatusCode::OK,
        &json!({"server_load": app.lifecycle.in_flight()}),
    )
}

/// In OpenMetrics' format for scrapers that know it, as Prometheus does.
async fn metrics(State(app): State<Arc<App>>, headers: HeaderMap) -> Response {
    let text = app.metrics.text();
    let accepted = headers.get_all(ACCEPT).into_iter();
    let mut accepted = accepted.filter_map(|value| value.to_str().ok());
    let (media, text) = match accepted.any(|value| value.contains("application/openmetrics-text")) {
        true => (
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
            text,
        ),
        false => (classic::MEDIA, classic::from_openmetrics(&text)),
    };
    ([(CONTENT_TYPE, media)], text).into_response()
}
