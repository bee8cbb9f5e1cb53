//! Connections: accepting them, TLS, and limits on clients that are too slow.

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
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::Sleep;
use tower::Service;

use super::args::ServerArgs;
use super::lifecycle::{Lifecycle, Phase};
use super::tls::Tls;

/// What every connection needs.
#[derive(Clone)]
pub struct Server {
    pub router: Router,
    pub lifecycle: Arc<Lifecycle>,
    pub tls: Option<Arc<Tls>>,
    pub args: ServerArgs,
    /// One permit a connection.
    pub connections: Arc<Semaphore>,
}

impl Server {
    /// Accepts connections until the task is dropped.
    pub async fn accept(self, listener: TcpListener) {
        loop {
            let Ok(permit) = self.connections.clone().acquire_owned().await else {
                return;
            };
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of file descriptors, most likely: those that are open will close.
                    tracing::warn!("cannot accept a connection: {error}");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let server = self.clone();
            tokio::spawn(async move {
                if let Err(error) = server.handle(stream).await {
                    tracing::debug!("connection: {error}");
                }
                drop(permit);
            });
        }
    }

    async fn handle(
        &self,
        stream: TcpStream,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        // Tokens are small and must not wait for more to come.
        stream.set_nodelay(true)?;
        match &self.tls {
            None => self.serve(stream).await,
            Some(tls) => {
                let handshake = tls.acceptor().accept(stream);
                let stream = match self.args.client_timeout {
                    Duration::ZERO => handshake.await?,
                    limit => tokio::time::timeout(limit, handshake).await??,
                };
                self.serve(stream).await
            }
        }
    }

    async fn serve<S>(&self, stream: S) -> Result<(), Box<dyn std::error::Error + Send + Sync>>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let args = &self.args;
        let size = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        let mut builder = http1::Builder::new();
        builder
            .timer(TokioTimer::new())
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
            let answer = router.clone().call(request.map(Body::new));
            async move { Ok::<_, Infallible>(answer.await.unwrap_or_else(|never| match never {})) }
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
