//! Connections: accepting them, TLS, and limits on clients that are too slow.
//!
//! ```text
//! accept ─▶ a look at the first bytes ─┬─ GET /health, … ─▶ served right here (thread `probe`)
//!           (thread `probe`)           └─ anything else ──▶ the streams' threads (`http`)
//! ```
//!
//! A step of 1,024 streams makes as many tasks ready at once, and whatever comes next waits behind
//! them. A probe must not: an orchestrator would end a server that is merely busy. So the thread
//! that accepts keeps the connections that begin with a probe to itself. It has no look at those of
//! a Unix socket, which is for a proxy on the same machine.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::HeaderValue;
use axum::http::header::CONNECTION;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;
use tower::Service;

use super::args::ServerArgs;
use super::lifecycle::{Lifecycle, Phase};
use super::listener::{Accepted, Listener};
use super::tls::Tls;

/// Why a connection ended early.
type Failed = Box<dyn std::error::Error + Send + Sync>;

/// What every connection needs.
#[derive(Clone)]
pub struct Server {
    pub router: Router,
    pub lifecycle: Arc<Lifecycle>,
    pub tls: Option<Arc<Tls>>,
    pub args: ServerArgs,
    /// One permit a connection.
    pub connections: Arc<Semaphore>,
    /// Where connections are served that do not begin with a probe.
    pub streams: Handle,
}

/// What is answered on the thread that accepts: small answers that wait for nothing.
const PROBES: [&str; 6] = [
    "/health", "/ready", "/ping", "/metrics", "/load", "/version",
];

/// Enough bytes to tell a probe by.
const LOOK: usize = 16;

/// Whether a request that begins with `bytes` is a probe.
fn begins_with_probe(bytes: &[u8]) -> bool {
    let Some(path) = bytes.strip_prefix(b"GET ") else {
        return false;
    };
    let end = path.iter().position(|b| matches!(b, b' ' | b'?'));
    end.is_some_and(|end| PROBES.iter().any(|probe| probe.as_bytes() == &path[..end]))
}

impl Server {
    /// Accepts connections until the task is dropped.
    pub async fn accept(self, listener: Listener) {
        loop {
            let Ok(permit) = self.connections.clone().acquire_owned().await else {
                return;
            };
            let stream = match listener.accept().await {
                Ok(stream) => stream,
                Err(error) => {
                    // Out of file descriptors, most likely: those that are open will close.
                    tracing::warn!("cannot accept a connection: {error}");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let server = self.clone();
            tokio::spawn(async move {
                if let Err(error) = server.route(stream, permit).await {
                    tracing::debug!("connection: {error}");
                }
            });
        }
    }

    /// Serves the connection here or hands it on, by how it begins.
    async fn route(self, stream: Accepted, permit: OwnedSemaphorePermit) -> Result<(), Failed> {
        if let Accepted::Tcp(stream) = &stream {
            // Tokens are small and must not wait for more to come.
            stream.set_nodelay(true)?;
        }
        let stream = match stream {
            Accepted::Tcp(stream) if self.is_probe(&stream).await? => {
                self.handle(stream, true).await?;
                drop(permit);
                return Ok(());
            }
            stream => stream.detach()?,
        };
        let streams = self.streams.clone();
        streams.spawn(async move {
            let result = match stream.attach() {
                Ok(Accepted::Tcp(stream)) => self.handle(stream, false).await,
                Ok(Accepted::Unix(stream)) => self.handle(stream, false).await,
                Err(error) => Err(error.into()),
            };
            if let Err(error) = result {
                tracing::debug!("connection: {error}");
            }
            drop(permit);
        });
        Ok(())
    }

    /// Whether the connection begins with a probe. Takes nothing from it. Beginnings that cannot
    /// be told, because they come byte by byte or encrypted, are none.
    async fn is_probe(&self, stream: &TcpStream) -> io::Result<bool> {
        if self.tls.is_some() {
            return Ok(false);
        }
        let mut phase = self.lifecycle.subscribe();
        let mut bytes = [0; LOOK];
        let looked = async {
            tokio::select! {
                length = stream.peek(&mut bytes) => length,
                // Nothing came before the end: it is up to the rest of this file to say so.
                _ = phase.wait_for(|phase| *phase == Phase::Stopping) => Ok(0),
            }
        };
        let length = match self.args.client_timeout {
            Duration::ZERO => looked.await?,
            limit => tokio::time::timeout(limit, looked).await??,
        };
        Ok(begins_with_probe(&bytes[..length]))
    }

    async fn handle<S>(&self, stream: S, probe: bool) -> Result<(), Failed>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        match &self.tls {
            None => self.serve(stream, probe).await,
            Some(tls) => {
                let handshake = tls.acceptor().accept(stream);
                let stream = match self.args.client_timeout {
                    Duration::ZERO => handshake.await?,
                    limit => tokio::time::timeout(limit, handshake).await??,
                };
                self.serve(stream, probe).await
            }
        }
    }

    async fn serve<S>(&self, stream: S, probe: bool) -> Result<(), Failed>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let args = &self.args;
        let size = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        let mut builder = http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            // One short buffer is written faster than the three parts of a small chunk.
            .writev(false)
            .max_header_size(size(args.h11_max_incomplete_event_size))
            .max_headers(args.h11_max_header_count);
        builder.header_read_timeout(match args.client_timeout {
            Duration::ZERO => None,
            limit => Some(limit),
        });
        let stream = TimedWrites {
            inner: stream,
            limit: args.write_timeout,
            stalled: None,
        };
        let router = self.router.clone();
        let used = Arc::new(AtomicBool::new(false));
        let seen = used.clone();
        let service = hyper::service::service_fn(move |request: hyper::Request<Incoming>| {
            seen.store(true, Ordering::Relaxed);
            // What follows a probe on its connection is answered, but the next comes by another.
            let last = probe && !PROBES.contains(&request.uri().path());
            let answer = router.clone().call(request.map(Body::new));
            async move {
                let mut answer = answer.await.unwrap_or_else(|never| match never {});
                if last {
                    let close = HeaderValue::from_static("close");
                    answer.headers_mut().insert(CONNECTION, close);
                }
                Ok::<_, Infallible>(answer)
            }
        });
        let connection = builder.serve_connection(TokioIo::new(stream), service);
        tokio::pin!(connection);
        let mut phase = self.lifecycle.subscribe();
        tokio::select! {
            result = connection.as_mut() => return Ok(result?),
            // A client that is just about to send its first request gets an answer, after which
            // `Connection: close` ends this.
            _ = phase.wait_for(|phase| match used.load(Ordering::Relaxed) {
                true => *phase != Phase::Ready,
                false => *phase == Phase::Stopping,
            }) => {}
        }
        // The open request ends, and no other begins.
        connection.as_mut().graceful_shutdown();
        Ok(connection.await?)
    }
}

/// Fails once the other side has taken no byte for `limit`.
struct TimedWrites<S> {
    inner: S,
    limit: Duration,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<S> TimedWrites<S> {
    fn timed<T>(
        &mut self,
        cx: &mut Context<'_>,
        result: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if result.is_ready() || self.limit.is_zero() {
            self.stalled = None;
            return result;
        }
        let limit = self.limit;
        let timer = self
            .stalled
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        match timer.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for TimedWrites<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, into)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for TimedWrites<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write(cx, bytes);
        self.timed(cx, result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write_vectored(cx, slices);
        self.timed(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.inner).poll_flush(cx);
        self.timed(cx, result)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.inner).poll_shutdown(cx);
        self.timed(cx, result)
    }
}

#[cfg(test)]
mod tests {
    use super::begins_with_probe;

    #[test]
    fn probes_are_told_by_their_first_bytes() {
        for bytes in [
            "GET /health HTTP",
            "GET /metrics HTT",
            "GET /load?x=1 HT",
            "GET /ready ",
        ] {
            assert!(begins_with_probe(bytes.as_bytes()), "{bytes}");
        }
        for bytes in [
            "",
            "GET /hea",
            "GET /health",
            "POST /health HTT",
            "GET /healthz HTT",
            "GET / HTTP/1.1",
        ] {
            assert!(!begins_with_probe(bytes.as_bytes()), "{bytes}");
        }
    }
}
