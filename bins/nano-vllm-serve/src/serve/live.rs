//! The page at `/`, and the events it draws the engine from.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderValue;
use axum::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use engine::KvSnapshot;
use http_body::Frame;
use paged_kv::BlockState;
use serde_json::{Value, json};

use super::lifecycle::Phase;
use super::state::App;

/// Between two looks at the engine.
const INTERVAL: Duration = Duration::from_millis(200);

const PAGE: &str = include_str!("page.html");

/// Nothing from outside: not even the browser may fetch anything else for this page.
const POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; \
                      connect-src 'self'; base-uri 'none'; form-action 'none'";

pub async fn page() -> Response {
    (
        [
            (CONTENT_TYPE, "text/html; charset=utf-8"),
            (CONTENT_SECURITY_POLICY, POLICY),
        ],
        PAGE,
    )
        .into_response()
}

/// One look at the engine after another, as server-sent events.
pub async fn events(State(app): State<Arc<App>>) -> Response {
    let mut response = Response::new(Body::new(Looks {
        next: Box::pin(look(app.clone(), Duration::ZERO)),
        app,
    }));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

type Look = Pin<Box<dyn Future<Output = Option<Bytes>> + Send>>;

struct Looks {
    app: Arc<App>,
    next: Look,
}

impl http_body::Body for Looks {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let look_result = std::task::ready!(self.next.as_mut().poll(cx));
        self.next = Box::pin(look(self.app.clone(), INTERVAL));
        Poll::Ready(look_result.map(|bytes| Ok(Frame::data(bytes))))
    }
}

/// The next look; `None` when the server is about to end.
async fn look(app: Arc<App>, after: Duration) -> Option<Bytes> {
    tokio::time::sleep(after).await;
    if app.lifecycle.phase() != Phase::Ready {
        return None;
    }
    let kv = app.engine.kv_snapshot().await.ok()?;
    let stats = app.metrics.last_stats();
    let value = json!({
        "model": app.names.0[0],
        "running": stats.running,
        "waiting": stats.waiting,
        "steps": stats.totals.steps,
        "tokens": stats.totals.prefill_tokens + stats.totals.decode_tokens,
        "prefix_hit_rate": stats.prefix_hit_rate(),
        "preemptions": stats.totals.preemptions,
        "blocks": block_letters(&kv),
        "sequences": sequences(&kv),
    });
    Some(Bytes::from(format!("data: {value}\n\n")))
}

/// A letter a block: free, cached, held by one sequence, shared by several.
fn block_letters(kv: &KvSnapshot) -> String {
    let letter = |state: &BlockState| match state {
        BlockState::Free => 'f',
        BlockState::Cached => 'c',
        BlockState::Referenced { readers, .. } if *readers > 1 => 's',
        BlockState::Referenced { .. } => 'u',
    };
    kv.blocks.iter().map(letter).collect()
}

/// Sequences shown on the page.
const MOST: usize = 64;

fn sequences(kv: &KvSnapshot) -> Vec<Value> {
    kv.sequences
        .iter()
        .take(MOST)
        .map(|seq| {
            json!({
                "id": seq.id.0,
                "index": seq.index,
                "state": format!("{:?}", seq.state).to_lowercase(),
                "prompt": seq.num_prompt,
                "tokens": seq.num_tokens,
                "computed": seq.num_computed,
                // Ids count from 1, places in `blocks` from 0.
                "blocks": seq.blocks.iter().map(|block| block.index().saturating_sub(1)).collect::<Vec<_>>(),
            })
        })
        .collect()
}
