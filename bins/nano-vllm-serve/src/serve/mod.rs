//! `serve`: the OpenAI API over HTTP, in vLLM's dialect.
//!
//! One file an idea: `net` accepts connections, `routes` says which path does what, `generate`
//! takes requests, `generation` follows them through the engine, `sse` and `frame` write streams,
//! `lifecycle` knows whether the server is ready, drains or ends.

mod args;
mod auth;
mod body;
pub mod config_file;
mod cors;
mod errors;
mod fake;
mod frame;
mod generate;
mod generation;
mod heartbeat;
mod lifecycle;
mod listener;
mod live;
mod metrics;
mod net;
mod openapi;
mod orca;
mod routes;
mod sse;
mod state;
mod text;
mod tls;
mod traces;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use engine::{AsyncEngine, AsyncOptions, Policy, QueueLimits, Usage};
use tokio::runtime::Handle;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Semaphore;

pub use args::{LogFormat, ServeArgs};
use auth::ApiKeys;
use heartbeat::Heartbeat;
use lifecycle::{Lifecycle, Phase};
use listener::Listener;
use metrics::Metrics;
use net::Server;
use state::{App, Ids};
use tls::Tls;
use traces::Tracer;

use crate::openai::{ModelNames, now};
use crate::say::say;

/// How long ended streams have to reach their clients.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Runs the command.
pub fn run(args: &ServeArgs) -> anyhow::Result<()> {
    let mut args = args.clone();
    args.engine.model = args.engine.model.take().or(args.model_tag.take());
    args.engine.usage = Usage::Server;
    // Everything that can be wrong is looked at before the model is loaded.
    args.server.settle()?;
    let server = &args.server;
    let keys = ApiKeys::new(&server.api_key, server.api_key_file.as_deref())?;
    let tls = Tls::from_args(server)?.map(Arc::new);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(server.http_threads.max(1))
        .thread_name("http")
        .enable_all()
        .build()
        .context("cannot start threads")?;
    // See `net` for what it is for.
    let probes = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("probe")
        .enable_all()
        .build()
        .context("cannot start a thread")?;
    // From now on SIGHUP ends nothing: one that comes while the model loads is answered after that.
    // The other signals end a start that takes too long.
    let hangup = {
        let _inside = probes.enter();
        listen(SignalKind::hangup())?
    };
    let listener = probes.block_on(Listener::bind(server))?;
    if keys.tenants().len() > 1 {
        let weights = keys.tenants().iter().map(|tenant| tenant.weight);
        args.engine.class_weights = (0..).zip(weights).collect();
        let policy = &mut args.engine.scheduling_policy;
        policy.get_or_insert_with(|| "fair".to_owned());
    }
    let result = start_engine(&args, &keys).and_then(|(engine, names, metrics, heartbeat)| {
        let (tracer, exporter) = server.otlp_traces_endpoint.clone().map(Tracer::new).unzip();
        let exporter = exporter.map(|exporter| probes.spawn(exporter));
        let app = Arc::new(App {
            engine,
            names,
            parsers: args.server.parsers(),
            server: args.server.clone(),
            keys,
            lifecycle: Lifecycle::new(),
            tracer,
            metrics,
            heartbeat,
            last_look: live::LastLook::default(),
            created: now(),
            ids: Ids::new(),
        });
        let signals = {
            let _inside = probes.enter();
            Signals::new(hangup)?
        };
        probes.block_on(serve(app, listener, tls, signals, runtime.handle().clone()))?;
        Ok(exporter)
    });
    // Blocking work that is left, such as a tokenizer in a huge prompt, is nobody's any more.
    runtime.shutdown_timeout(Duration::from_millis(100));
    let result = result.map(|exporter| {
        // Every handle on the tracer is gone: what is left in the queue goes out.
        if let Some(exporter) = exporter {
            let sent = async { tokio::time::timeout(LAST_WORDS, exporter).await };
            let _ = probes.block_on(sent);
        }
    });
    probes.shutdown_timeout(Duration::from_millis(100));
    result
}

type Parts = (AsyncEngine, ModelNames, Arc<Metrics>, Arc<Heartbeat>);

fn start_engine(args: &ServeArgs, keys: &ApiKeys) -> anyhow::Result<Parts> {
    let (engine, names) = args.engine.load()?;
    let limits = engine.frontend().limits().clone();
    let config = vec![
        ("block_size".to_owned(), args.engine.block_size.to_string()),
        (
            "num_gpu_blocks".to_owned(),
            (limits.cache_tokens / args.engine.block_size).to_string(),
        ),
        (
            "enable_prefix_caching".to_owned(),
            (!args.engine.no_enable_prefix_caching).to_string(),
        ),
    ];
    let metrics = Arc::new(Metrics::new(
        &names.0[0],
        limits.max_model_len,
        config,
        keys.tenants(),
    ));
    let heartbeat = Arc::new(Heartbeat::new());
    let observer = {
        let (metrics, heartbeat) = (metrics.clone(), heartbeat.clone());
        Box::new(move |stats: &engine::Stats, working| {
            heartbeat.beat(working);
            metrics.on_step(stats);
        })
    };
    let queue = match args.server.max_num_queued_reqs {
        None => Some(limits.max_num_seqs.saturating_mul(4).max(1024)),
        Some(0) => None,
        Some(most) => Some(most),
    };
    let engine_config = args.engine.config()?;
    let fair = engine_config.scheduling_policy == Policy::Fair;
    let options = AsyncOptions {
        queue: QueueLimits {
            max_num_queued_reqs: queue,
            max_num_queued_tokens: args.server.max_num_queued_tokens.filter(|most| *most > 0),
            class_weights: match fair {
                true => args.engine.class_weights.clone(),
                false => Default::default(),
            },
        },
        observer: Some(observer),
    };
    let engine = match args.server.fake_runner {
        true => fake::start(engine, &args.server, engine_config.policy(), options)?,
        false => {
            let (core, frontend) = engine.into_parts();
            AsyncEngine::start_with(core, frontend, options)
                .context("cannot start the engine's thread")?
        }
    };
    Ok((engine, names, metrics, heartbeat))
}

async fn serve(
    app: Arc<App>,
    listener: Listener,
    tls: Option<Arc<Tls>>,
    mut signals: Signals,
    streams: Handle,
) -> anyhow::Result<()> {
    let address = listener.address(tls.is_some())?;
    let connections = Arc::new(Semaphore::new(
        app.server.max_connections.clamp(1, MAX_PERMITS),
    ));
    let server = Server {
        router: routes::router(app.clone()),
        lifecycle: app.lifecycle.clone(),
        tls: tls.clone(),
        args: app.server.clone(),
        connections: connections.clone(),
        streams,
    };
    let most = connections.available_permits();
    let accepting = tokio::spawn(server.accept(listener));
    if let Some(tls) = tls.clone().filter(|_| app.server.enable_ssl_refresh) {
        tokio::spawn(tls.follow_files());
    }
    let name = app.names.0.join(", ");
    // As with the log: standard output on a full disk is no reason not to serve.
    if let Err(error) = say(format_args!("{name} is served at {address}")) {
        tracing::warn!("{error:#}");
    }
    tracing::info!(%address, "ready");

    let died = tokio::select! {
        () = signals.end(tls.as_ref()) => None,
        cause = app.engine.stopped() => Some(cause),
    };
    // Without its engine the process ends, too, for whoever watches over it to start another one.
    // Open streams end by themselves then, each with an error frame.
    let patience = match &died {
        Some(_) => LAST_WORDS,
        None => app.server.shutdown_timeout,
    };
    tracing::info!(in_flight = app.lifecycle.in_flight(), "draining");
    app.lifecycle.advance(Phase::Draining);
    tokio::select! {
        () = app.lifecycle.drained() => {}
        () = tokio::time::sleep(patience) => {}
        () = signals.end(None) => {}
    }
    tracing::info!(in_flight = app.lifecycle.in_flight(), "stopping");
    app.lifecycle.advance(Phase::Stopping);
    let last_words = async {
        app.engine.shutdown(false).await;
        app.lifecycle.drained().await;
        accepting.abort();
        // Every connection has given its permit back, but for the one that the task above holds.
        let _ = accepting.await;
        let _ = connections.acquire_many(most as u32).await;
    };
    // A client that does not read must not keep the process alive.
    let _ = tokio::time::timeout(LAST_WORDS, last_words).await;
    tracing::info!("ended");
    match died {
        Some(cause) => anyhow::bail!("the engine has stopped: {cause}"),
        None => Ok(()),
    }
}

/// `acquire_many` counts in 32 bits.
const MAX_PERMITS: usize = 1 << 20;

fn listen(kind: SignalKind) -> anyhow::Result<Signal> {
    signal(kind).context("cannot listen for signals")
}

/// Signals that end the process, and the one that renews the certificate.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    /// Takes the signals that end the process, besides `hangup`.
    fn new(hangup: Signal) -> anyhow::Result<Self> {
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            hangup,
        })
    }

    /// Waits for SIGTERM or SIGINT.
    async fn end(&mut self, tls: Option<&Arc<Tls>>) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return,
                _ = self.interrupt.recv() => return,
                _ = self.hangup.recv() => if let Some(tls) = tls.cloned() {
                    // A slow disk must hold up neither this thread, which accepts connections, nor
                    // the next signal.
                    tokio::task::spawn_blocking(move || tls.reload());
                },
            }
        }
    }
}
