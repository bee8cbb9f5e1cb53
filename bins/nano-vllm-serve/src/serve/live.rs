//! The page at `/`, and the events it draws the engine from.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::State;
use axum::http::header::{
    ACCEPT, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY,
};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use engine::{KvSnapshot, StepRecord};
use http_body::Frame;
use paged_kv::BlockState;
use serde_json::{Value, json};
use tokio::sync::Mutex;

use super::lifecycle::Phase;
use super::state::App;

/// Between two looks at the engine.
const INTERVAL: Duration = Duration::from_millis(200);

const PAGE: &str = include_str!("page.html");

/// The same page, which asks for a key before anything else.
static LOCKED: LazyLock<String> =
    LazyLock::new(|| PAGE.replacen("<body>", "<body class=\"locked\">", 1));

/// Nothing from outside: not even the browser may fetch anything else for this page.
const POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; \
                      img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; \
                      frame-ancestors 'none'";

pub async fn page() -> Response {
    html(StatusCode::OK, PAGE)
}

/// What a browser without a key sees of `/`: it cannot send one by itself. `None` for other
/// clients and other paths.
pub fn locked_page(path: &str, headers: &HeaderMap) -> Option<Response> {
    let accept = headers.get(ACCEPT)?.to_str().ok()?;
    (path == "/" && accept.contains("text/html")).then(|| html(StatusCode::UNAUTHORIZED, &LOCKED))
}

fn html(status: StatusCode, page: &'static str) -> Response {
    let headers = [
        (CONTENT_TYPE, "text/html; charset=utf-8"),
        (CONTENT_SECURITY_POLICY, POLICY),
        (REFERRER_POLICY, "no-referrer"),
        (CACHE_CONTROL, "no-store"),
    ];
    (status, headers, page).into_response()
}

/// The last look, for everybody who watches: many pages cost the engine as much as one.
#[derive(Default)]
pub struct LastLook(Mutex<Option<(Instant, Bytes)>>);

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

type NextLook = Pin<Box<dyn Future<Output = Option<Bytes>> + Send>>;

struct Looks {
    app: Arc<App>,
    next: NextLook,
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
    let mut last = app.last_look.0.lock().await;
    if let Some((at, look)) = &*last
        && at.elapsed() < INTERVAL / 2
    {
        return Some(look.clone());
    }
    let engine::Look { stats, kv, steps } = app.engine.look().await.ok()?;
    let value = json!({
        "model": app.names.0[0],
        "running": stats.running,
        "waiting": stats.waiting,
        "prefill_tokens": stats.totals.prefill_tokens,
        "decode_tokens": stats.totals.decode_tokens,
        "prefix_hit_rate": stats.prefix_hit_rate(),
        "preemptions": stats.totals.preemptions,
        "blocks": blocks(&kv),
        "sequences": sequences(&kv),
        "steps": recent(&steps),
    });
    let look = Bytes::from(format!("data: {value}\n\n"));
    *last = Some((Instant::now(), look.clone()));
    Some(look)
}

/// Runs of equal blocks, each a letter and a count: `f`ree, `c`ached, `u`sed by one sequence,
/// `s`hared by several. `s2f10` is two shared blocks and ten free ones.
fn blocks(kv: &KvSnapshot) -> String {
    let letter = |state: &BlockState| match state {
        BlockState::Free => 'f',
        BlockState::Cached => 'c',
        BlockState::Referenced { readers, .. } if *readers > 1 => 's',
        BlockState::Referenced { .. } => 'u',
    };
    let runs = kv.blocks.chunk_by(|a, b| letter(a) == letter(b));
    runs.map(|run| format!("{}{}", letter(&run[0]), run.len()))
        .collect()
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

/// The last steps; of each the sequences that it computed something for, as
/// `[id, index, tokens, decodes]`. Looks overlap, so that one that is late misses nothing.
fn recent(steps: &[StepRecord]) -> Vec<Value> {
    steps
        .iter()
        .map(|record| {
            let rows = record.rows.iter().take(MOST);
            let rows: Vec<Value> = rows
                .map(|row| {
                    let (id, index) = (row.seq.request.0, row.seq.index);
                    json!([id, index, row.len, u8::from(row.decode)])
                })
                .collect();
            json!({"step": record.step, "rows": rows})
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_told_in_runs() {
        let used = |readers| BlockState::Referenced {
            readers,
            published: true,
        };
        let kv = KvSnapshot {
            blocks: vec![
                used(2),
                used(3),
                used(1),
                BlockState::Cached,
                BlockState::Free,
            ],
            sequences: Vec::new(),
        };
        assert_eq!(blocks(&kv), "s2u1c1f1");
    }

    #[test]
    fn the_page_that_asks_for_a_key_differs() {
        assert!(LOCKED.contains("<body class=\"locked\">") && !PAGE.contains("<body class"));
    }
}
