//! Connections that are kept, and one streamed request.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use memchr::memmem;
use serde_json::Value;
use tokio::net::TcpStream;

/// What became of a request.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Tokens of the prompt.
    pub input_len: usize,
    /// Tokens of the answer, as the server counts them.
    pub output_len: usize,
    /// From sending to the first chunk with a choice.
    pub ttft: Duration,
    /// Between chunks.
    pub itls: Vec<Duration>,
    /// From sending to the last chunk with a choice.
    pub latency: Duration,
    /// Why it failed.
    pub error: Option<String>,
}

/// Idle connections to one server.
pub struct Pool {
    host: String,
    endpoint: String,
    key: Option<String>,
    idle: Mutex<Vec<SendRequest<Full<Bytes>>>>,
}

impl Pool {
    /// `url` is `http://host:port`.
    pub fn new(url: &str, endpoint: &str, key: Option<&str>) -> anyhow::Result<Self> {
        let host = url
            .trim_end_matches('/')
            .strip_prefix("http://")
            .with_context(|| format!("--base-url {url} does not begin with http://"))?;
        Ok(Self {
            host: match host.rsplit_once(':') {
                Some((_, port)) if port.parse::<u16>().is_ok() => host.to_owned(),
                _ => format!("{host}:80"),
            },
            endpoint: endpoint.to_owned(),
            key: key.map(str::to_owned),
            idle: Mutex::default(),
        })
    }

    async fn connection(&self) -> anyhow::Result<SendRequest<Full<Bytes>>> {
        loop {
            let idle = self.idle.lock().ok().and_then(|mut idle| idle.pop());
            match idle {
                Some(connection) if connection.is_ready() => return Ok(connection),
                Some(_) => {}
                None => break,
            }
        }
        let stream = TcpStream::connect(&self.host)
            .await
            .with_context(|| format!("cannot connect to {}", self.host))?;
        stream.set_nodelay(true)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(sender)
    }

    fn request(
        &self,
        method: &str,
        path: &str,
        body: String,
    ) -> anyhow::Result<Request<Full<Bytes>>> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", &self.host)
            .header("content-type", "application/json");
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        Ok(request.body(Full::new(Bytes::from(body)))?)
    }

    /// The name of the server's model.
    pub async fn first_model(&self) -> anyhow::Result<String> {
        let mut connection = self.connection().await?;
        let request = self.request("GET", "/v1/models", String::new())?;
        let response = connection.send_request(request).await?;
        let bytes = response.into_body().collect().await?.to_bytes();
        let list: Value = serde_json::from_slice(&bytes).context("/v1/models is no JSON")?;
        match list["data"][0]["id"].as_str() {
            Some(id) => Ok(id.to_owned()),
            None => bail!("/v1/models names no model: {list}"),
        }
    }

    /// Sends one request and reads its stream to the end.
    pub async fn send(&self, body: String, input_len: usize) -> Outcome {
        let mut outcome = Outcome {
            input_len,
            ..Outcome::default()
        };
        if let Err(error) = self.try_send(body, &mut outcome).await {
            outcome.error = Some(format!("{error:#}"));
        }
        outcome
    }

    async fn try_send(&self, body: String, outcome: &mut Outcome) -> anyhow::Result<()> {
        let mut connection = self.connection().await?;
        let request = self.request("POST", &self.endpoint, body)?;
        let start = Instant::now();
        let response = connection.send_request(request).await?;
        let status = response.status();
        let mut body = response.into_body();
        if !status.is_success() {
            let bytes = body.collect().await?.to_bytes();
            bail!("{status}: {}", String::from_utf8_lossy(&bytes));
        }
        let (mut rest, mut last, mut done) = (Vec::new(), None, false);
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame?.into_data() else {
                continue;
            };
            let now = Instant::now();
            // Whole events are the rule: those are looked at where they lie.
            let mut bytes: &[u8] = match rest.is_empty() {
                true => &data,
                false => {
                    rest.extend_from_slice(&data);
                    &rest
                }
            };
            while let Some(end) = memmem::find(bytes, b"\n\n") {
                done |= take_event(&bytes[..end], start, now, &mut last, outcome)?;
                bytes = &bytes[end + 2..];
            }
            rest = bytes.to_vec();
        }
        anyhow::ensure!(done, "the stream ended without [DONE]");
        if let Ok(mut idle) = self.idle.lock() {
            idle.push(connection);
        }
        Ok(())
    }
}

/// Takes one event; whether it is the last. Chunks are not parsed, but for the one with the usage:
/// the load generator must cost less than what it measures.
fn take_event(
    event: &[u8],
    start: Instant,
    now: Instant,
    last: &mut Option<Instant>,
    outcome: &mut Outcome,
) -> anyhow::Result<bool> {
    let Some(data) = event.strip_prefix(b"data: ") else {
        return Ok(false); // a comment
    };
    if data == b"[DONE]" {
        return Ok(true);
    }
    if data.starts_with(b"{\"error\"") {
        bail!("{}", String::from_utf8_lossy(data));
    }
    // The usage stands at the end, so a long text is not searched for it.
    if data.ends_with(b"}}") && memmem::find(data, b"\"choices\":[]").is_some() {
        let chunk: Value = serde_json::from_slice(data)?;
        outcome.output_len = chunk["usage"]["completion_tokens"].as_u64().unwrap_or(0) as usize;
        return Ok(false);
    }
    match last.replace(now) {
        None => outcome.ttft = now - start,
        Some(before) => outcome.itls.push(now - before),
    }
    outcome.latency = now - start;
    Ok(false)
}
