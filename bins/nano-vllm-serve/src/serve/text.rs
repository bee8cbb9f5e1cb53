//! `/tokenize` and `/detokenize`.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use engine::Prompt;
use serde_json::{Value, json};

use super::body;
use super::errors::json_response;
use super::generate::{ignored_fields, with_ignored};
use super::state::App;
use crate::openai::{ApiError, Fields, take_chat_input};

pub async fn tokenize(State(app): State<Arc<App>>, request: Request) -> Response {
    blocking(app, request, do_tokenize).await
}

pub async fn detokenize(State(app): State<Arc<App>>, request: Request) -> Response {
    blocking(app, request, do_detokenize).await
}

/// Reads the body and answers on a thread that may block.
async fn blocking(
    app: Arc<App>,
    request: Request,
    work: fn(&App, &mut Fields) -> Result<Value, ApiError>,
) -> Response {
    let result = match body::read(&app, request).await {
        Err(error) => Err(error),
        Ok(bytes) => tokio::task::spawn_blocking(move || {
            let mut fields = Fields::new(body::json(&bytes)?, "the body")?;
            app.names.resolve(fields.take_as("model", "a string")?)?;
            let body = work(&app, &mut fields)?;
            Ok((body, ignored_fields(&fields.unknown())))
        })
        .await
        .unwrap_or_else(|_| Err(ApiError::internal("the request could not be read"))),
    };
    match result {
        Ok((body, ignored)) => with_ignored(json_response(StatusCode::OK, &body), ignored),
        Err(error) => error.into_response(),
    }
}

fn do_tokenize(app: &App, f: &mut Fields) -> Result<Value, ApiError> {
    let special = f.take_as("add_special_tokens", "true or false")?;
    let strings = f.take_bool("return_token_strs", false)?;
    let prompt: Option<String> = f.take_as("prompt", "a string")?;
    let mut prompt = match (prompt, f.has("messages")) {
        (Some(text), false) => Prompt::Text(text),
        (None, true) => {
            let tools = f.take_as("tools", "a list of objects")?;
            Prompt::Chat(take_chat_input(f, tools)?)
        }
        _ => {
            let message = "either prompt or messages is needed";
            return Err(ApiError::bad_form("prompt", message));
        }
    };
    app.server.complete_template_kwargs(&mut prompt);
    let frontend = app.engine.frontend();
    let tokens = frontend.tokenize(&prompt, special)?;
    let strings = match (strings, frontend.tokenizer()) {
        (true, Some(tokenizer)) => tokens.iter().map(|id| tokenizer.token(*id)).collect(),
        _ => Value::Null,
    };
    Ok(json!({
        "count": tokens.len(),
        "max_model_len": frontend.limits().max_model_len,
        "tokens": tokens,
        "token_strs": strings,
    }))
}

fn do_detokenize(app: &App, f: &mut Fields) -> Result<Value, ApiError> {
    let tokens: Vec<u32> = f
        .take_as("tokens", "a list of token ids")?
        .ok_or_else(|| ApiError::bad_form("tokens", "tokens is missing"))?;
    let frontend = app.engine.frontend();
    let known = frontend.limits().vocab_size;
    if let Some(bad) = tokens.iter().find(|id| **id as usize >= known) {
        return Err(ApiError::bad_value(
            "tokens",
            format!("token id {bad} is not below the vocabulary size ({known})"),
        ));
    }
    let tokenizer = frontend
        .tokenizer()
        .ok_or_else(|| ApiError::bad_value("tokens", "the model has no tokenizer"))?;
    let prompt = tokenizer
        .decode(&tokens, false)
        .map_err(|error| ApiError::bad_value("tokens", error))?;
    Ok(json!({"prompt": prompt}))
}
