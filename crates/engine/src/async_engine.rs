//! The asynchronous front: a thread owns the core, handles talk to it through channels.
//!
//! ```text
//! caller: tokenize ──▶ Command::Add ──▶ ┌────────────────┐
//! caller: stop strings ▶ Command::Finish│ core thread    │  owns scheduler, KV cache and model;
//! stream dropped ────▶ Command::Abort ─▶│ commands, step │  no lock anywhere
//! caller: detokenize ◀── token events ──└────────────────┘
//! ```

use std::collections::HashMap;
use std::sync::mpsc::{self, Receiver, RecvError, Sender, TryRecvError};
use std::sync::{Arc, OnceLock};

use batch_scheduler::{Event, FinishReason, Request, RequestId, Stats};
use tokio::sync::{mpsc as events, oneshot, watch};
use tp_model::SeqParams;

use crate::core::{CoreEvent, EngineCore, KvSnapshot, Runner};
use crate::error::RequestError;
use crate::frontend::{Frontend, Prepared};
use crate::queue::{Place, Queue, QueueLimits};
use crate::request::GenerateRequest;
use crate::step_log::StepRecord;
use crate::stream::TokenStream;
use crate::structured::Grammar;

pub(crate) type Delivery = Result<CoreEvent, RequestError>;

/// What callers ask of the core's thread.
pub(crate) enum Command {
    Add {
        request: Request<Arc<SeqParams>>,
        grammar: Option<Box<Grammar>>,
        events: events::UnboundedSender<Delivery>,
        place: Place,
    },
    Abort(RequestId),
    Finish {
        id: RequestId,
        index: u32,
        stop: String,
    },
    Stats(oneshot::Sender<Stats>),
    KvSnapshot(oneshot::Sender<KvSnapshot>),
    Look(oneshot::Sender<Look>),
    Shutdown {
        drain: bool,
        done: oneshot::Sender<()>,
    },
}

/// Is told on the core's thread of the figures after each step, before what it brought goes out,
/// and when work comes to an idle engine; the flag says whether work is left. It must be quick: no
/// step begins meanwhile.
pub type StepObserver = Box<dyn FnMut(&Stats, bool) + Send>;

/// An engine at one moment.
#[derive(Clone, Debug)]
pub struct Look {
    /// Figures.
    pub stats: Stats,
    /// The block map and who holds what.
    pub kv: KvSnapshot,
    /// The last steps, oldest first; see [`EngineCore::recent_steps`].
    pub steps: Vec<StepRecord>,
}

/// How an [`AsyncEngine`] runs.
#[derive(Default)]
pub struct AsyncOptions {
    /// What may wait for its first step; more is refused with [`RequestError::QueueFull`].
    pub queue: QueueLimits,
    /// For metrics and watchdogs.
    pub observer: Option<StepObserver>,
}

/// A handle on an engine that runs on its own thread. Clones share the engine; it ends when the
/// last handle and the last stream are gone, or by [`AsyncEngine::shutdown`].
#[derive(Clone)]
pub struct AsyncEngine {
    commands: Sender<Command>,
    frontend: Arc<Frontend>,
    queue: Arc<Queue>,
    /// Why the engine stopped, once it has.
    cause: Arc<OnceLock<String>>,
    /// Closes with the thread.
    thread: watch::Receiver<()>,
}

impl AsyncEngine {
    /// Moves `core` to a thread of its own.
    pub fn start<R>(core: EngineCore<R>, frontend: Arc<Frontend>) -> std::io::Result<Self>
    where
        R: Runner + Send + 'static,
        R::Ticket: Send,
    {
        Self::start_with(core, frontend, AsyncOptions::default())
    }

    /// As [`AsyncEngine::start`], with a bounded queue and an observer.
    pub fn start_with<R>(
        core: EngineCore<R>,
        frontend: Arc<Frontend>,
        options: AsyncOptions,
    ) -> std::io::Result<Self>
    where
        R: Runner + Send + 'static,
        R::Ticket: Send,
    {
        let (commands, receiver) = mpsc::channel();
        let cause = Arc::new(OnceLock::new());
        let queue = Queue::new(options.queue);
        let (alive, ended) = watch::channel(());
        let thread = CoreThread {
            core,
            observer: options.observer,
            routes: HashMap::new(),
            events: Vec::new(),
            leaving: Vec::new(),
            cause: cause.clone(),
        };
        std::thread::Builder::new()
            .name("engine-core".to_string())
            .spawn(move || {
                let _ending = Ending {
                    cause: thread.cause.clone(),
                    _alive: alive,
                };
                thread.run(&receiver);
            })?;
        Ok(AsyncEngine {
            commands,
            frontend,
            queue,
            cause,
            thread: ended,
        })
    }

    /// Tokenizer, chat template, limits and default parameters.
    pub fn frontend(&self) -> &Arc<Frontend> {
        &self.frontend
    }

    /// Requests that no step has touched yet.
    pub fn num_queued(&self) -> usize {
        self.queue.len()
    }

    /// Starts a request. Tokenizing happens here, on the caller's thread; detokenizing where the
    /// stream is read. Dropping the stream aborts the request.
    pub fn generate(&self, request: GenerateRequest) -> Result<TokenStream, RequestError> {
        let Prepared {
            request,
            state,
            grammar,
        } = self.frontend.prepare(request)?;
        let place = self.queue.enter(request.class, request.prompt.len())?;
        let id = request.id;
        let (sender, receiver) = events::unbounded_channel();
        let add = Command::Add {
            request,
            grammar: grammar.map(Box::new),
            events: sender,
            place,
        };
        self.commands.send(add).map_err(|_| self.dead())?;
        Ok(TokenStream::new(
            id,
            state,
            receiver,
            self.commands.clone(),
            self.cause.clone(),
        ))
    }

    /// Figures of now, between two steps.
    pub async fn stats(&self) -> Result<Stats, RequestError> {
        self.ask(Command::Stats).await
    }

    /// The block map and who holds what, between two steps.
    pub async fn kv_snapshot(&self) -> Result<KvSnapshot, RequestError> {
        self.ask(Command::KvSnapshot).await
    }

    /// Everything that a live view shows, as of one moment between two steps.
    pub async fn look(&self) -> Result<Look, RequestError> {
        self.ask(Command::Look).await
    }

    /// Stops the engine: no new requests from now on. With `drain` the open ones run to their end,
    /// otherwise they end as aborted. Returns when the thread has nothing left to do.
    pub async fn shutdown(&self, drain: bool) {
        // An engine that has stopped already needs nothing more.
        let _ = self.ask(|done| Command::Shutdown { drain, done }).await;
    }

    /// Why the engine stopped; `None` while it runs.
    pub fn stop_cause(&self) -> Option<&str> {
        self.cause.get().map(String::as_str)
    }

    /// Waits until the engine has stopped, and says why.
    pub async fn stopped(&self) -> String {
        // Nothing is ever sent: this ends when the thread does.
        while self.thread.clone().changed().await.is_ok() {}
        self.stop_cause().unwrap_or(PANICKED).to_owned()
    }

    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, RequestError> {
        let (sender, receiver) = oneshot::channel();
        self.commands
            .send(command(sender))
            .map_err(|_| self.dead())?;
        receiver.await.map_err(|_| self.dead())
    }

    fn dead(&self) -> RequestError {
        stopped(&self.cause)
    }
}

/// Why a thread is gone that left no cause: it has panicked. Clients read this.
const PANICKED: &str = "it failed unexpectedly, its log says more";

/// Lives as long as the thread, also through a panic.
struct Ending {
    cause: Arc<OnceLock<String>>,
    /// Closes the channel.
    _alive: watch::Sender<()>,
}

impl Drop for Ending {
    fn drop(&mut self) {
        let _ = self.cause.set(PANICKED.to_owned());
    }
}

/// The error for a thread that is gone.
pub(crate) fn stopped(cause: &OnceLock<String>) -> RequestError {
    let cause = cause.get().map_or(PANICKED, String::as_str);
    RequestError::EngineDead(cause.to_string())
}

struct Route {
    events: events::UnboundedSender<Delivery>,
    /// Sequences that have not ended.
    open: u32,
    /// Given back once a step has computed something for it.
    place: Option<Place>,
}

struct CoreThread<R: Runner> {
    core: EngineCore<R>,
    observer: Option<StepObserver>,
    routes: HashMap<RequestId, Route>,
    events: Vec<CoreEvent>,
    /// Who waits for the shutdown, once one was asked for.
    leaving: Vec<oneshot::Sender<()>>,
    cause: Arc<OnceLock<String>>,
}

impl<R: Runner> CoreThread<R> {
    fn run(mut self, commands: &Receiver<Command>) {
        let cause = self.serve(commands);
        // Before the channels close: whoever finds one closed looks for the cause.
        let _ = self.cause.set(cause);
        // The model's memory is given back before anybody ends the process: a GPU's driver is gone
        // once the process is on its way out.
        let CoreThread { core, leaving, .. } = self;
        drop(core);
        for done in leaving {
            let _ = done.send(());
        }
    }

    /// Steps until there is a reason to stop, and returns it.
    fn serve(&mut self, commands: &Receiver<Command>) -> String {
        loop {
            let idle = !self.core.has_work();
            if idle && !self.leaving.is_empty() {
                return "it was shut down".to_string();
            }
            if idle {
                match commands.recv() {
                    Ok(command) => self.obey(command),
                    Err(RecvError) => return "nobody holds a handle on it".to_string(),
                }
                self.observe();
            }
            loop {
                match commands.try_recv() {
                    Ok(command) => self.obey(command),
                    Err(TryRecvError::Empty) => break,
                    // Streams hold a sender too: nobody is left to read what this would compute.
                    Err(TryRecvError::Disconnected) => {
                        return "nobody holds a handle on it".to_string();
                    }
                }
            }
            let result = self.core.step(&mut self.events);
            if result.is_ok() {
                // Whoever has a token finds figures that its step is in.
                self.observe();
            }
            self.deliver();
            if let Err(dead) = result {
                return dead.to_string();
            }
        }
    }

    fn observe(&mut self) {
        if let Some(observer) = &mut self.observer {
            observer(&self.core.stats(), self.core.has_work());
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Add {
                request,
                grammar,
                events,
                place,
            } => self.add(request, grammar, events, place),
            Command::Abort(id) => {
                self.core.abort(id, &mut self.events);
            }
            Command::Finish { id, index, stop } => {
                let reason = FinishReason::StopString(stop);
                self.core.finish(id, index, reason, &mut self.events);
            }
            // Whoever asked may have gone meanwhile.
            Command::Stats(reply) => drop(reply.send(self.core.stats())),
            Command::KvSnapshot(reply) => drop(reply.send(self.core.kv_snapshot())),
            Command::Look(reply) => drop(reply.send(Look {
                stats: self.core.stats(),
                kv: self.core.kv_snapshot(),
                steps: self.core.recent_steps(),
            })),
            Command::Shutdown { drain, done } => {
                self.leaving.push(done);
                let open: Vec<RequestId> = self.routes.keys().copied().collect();
                for id in open.into_iter().filter(|_| !drain) {
                    self.core.abort(id, &mut self.events);
                }
            }
        }
        self.deliver();
    }

    fn add(
        &mut self,
        request: Request<Arc<SeqParams>>,
        grammar: Option<Box<Grammar>>,
        events: events::UnboundedSender<Delivery>,
        place: Place,
    ) {
        let (id, open) = (request.id, request.n);
        let added = if self.leaving.is_empty() {
            let grammar = grammar.map(|grammar| *grammar);
            let added = self.core.add_constrained(request, grammar);
            added.map_err(RequestError::from)
        } else {
            Err(RequestError::EngineDead("it is shutting down".to_string()))
        };
        match added {
            Ok(()) => {
                let route = Route {
                    events,
                    open,
                    place: Some(place),
                };
                self.routes.insert(id, route);
            }
            Err(error) => drop(events.send(Err(error))),
        }
    }

    fn deliver(&mut self) {
        for event in self.events.drain(..) {
            let id = event.id();
            let Some(route) = self.routes.get_mut(&id) else {
                continue;
            };
            if matches!(event, CoreEvent::Sequence(Event::Finished { .. })) {
                route.open -= 1;
            }
            let open = route.open;
            if matches!(event, CoreEvent::Scheduled { .. }) {
                route.place = None;
            }
            // A stream that was dropped has sent an abort, which is on its way.
            match open {
                0 => {
                    // Its place is free before its reader knows of the end.
                    route.place = None;
                    let _ = route.events.send(Ok(event));
                    self.routes.remove(&id);
                }
                _ => drop(route.events.send(Ok(event))),
            }
        }
    }
}
