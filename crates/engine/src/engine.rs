//! The blocking front: requests in, outputs out, no thread but the caller's to step the model.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, TryRecvError};

use batch_scheduler::{FinishReason as CoreReason, RequestId, Stats};

use crate::core::{CoreEvent, EngineCore, EngineDead, KvSnapshot, Runner};
use crate::error::RequestError;
use crate::frontend::{Frontend, Prepared};
use crate::output::{FinishReason, OutputDelta, RequestOutput};
use crate::report::StepReport;
use crate::request::GenerateRequest;
use crate::state::RequestState;

/// An engine that runs on the caller's thread.
pub struct Engine<R: Runner = tp_model::Runner> {
    core: EngineCore<R>,
    frontend: Arc<Frontend>,
    requests: HashMap<RequestId, RequestState>,
    events: Vec<CoreEvent>,
}

/// What one [`Engine::step`] brought.
#[derive(Debug, Default)]
pub struct EngineStep {
    /// News of sequences, in order.
    pub deltas: Vec<(RequestId, OutputDelta)>,
    /// Requests that ended.
    pub finished: Vec<(RequestId, Result<RequestOutput, RequestError>)>,
    /// What the step did; only after [`Engine::trace`].
    pub report: Option<StepReport>,
}

impl<R: Runner> Engine<R> {
    /// An engine of parts that were made for the same limits.
    pub fn new(core: EngineCore<R>, frontend: Arc<Frontend>) -> Self {
        Engine {
            core,
            frontend,
            requests: HashMap::new(),
            events: Vec::new(),
        }
    }

    /// Tokenizer, chat template, limits and default parameters.
    pub fn frontend(&self) -> &Arc<Frontend> {
        &self.frontend
    }

    /// The parts, for use in another front. Requests in flight are forgotten.
    pub fn into_parts(self) -> (EngineCore<R>, Arc<Frontend>) {
        (self.core, self.frontend)
    }

    /// Runs requests to their end; the results stand in the order of the requests. A request that
    /// is refused or fails has its error there, and the others go on.
    pub fn generate(
        &mut self,
        requests: Vec<GenerateRequest>,
    ) -> Vec<Result<RequestOutput, RequestError>> {
        self.generate_with(requests, |_| ())
    }

    /// As [`Engine::generate`], and calls `on_done` with the index of each request that ends.
    /// Prompts are tokenized on a thread of their own while the model works on earlier ones.
    /// Requests that were added by hand go on meanwhile, but what they bring is lost: use one way
    /// or the other.
    pub fn generate_with(
        &mut self,
        requests: Vec<GenerateRequest>,
        mut on_done: impl FnMut(usize),
    ) -> Vec<Result<RequestOutput, RequestError>> {
        let mut results: Vec<Option<Result<RequestOutput, RequestError>>> = Vec::new();
        results.resize_with(requests.len(), || None);
        let frontend = self.frontend.clone();
        let (sender, prepared) = mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for (at, request) in requests.into_iter().enumerate() {
                    if sender.send((at, frontend.prepare(request))).is_err() {
                        return;
                    }
                }
            });
            let mut places = HashMap::new();
            let mut open = true;
            while open || !places.is_empty() {
                let wait = !self.core.has_work() && places.is_empty();
                open = open
                    && self.take_prepared(&prepared, wait, |at, added| match added {
                        Ok(id) => {
                            places.insert(id, at);
                        }
                        Err(error) => {
                            results[at] = Some(Err(error));
                            on_done(at);
                        }
                    });
                for (id, result) in self.step().finished {
                    if let Some(at) = places.remove(&id) {
                        results[at] = Some(result);
                        on_done(at);
                    }
                }
            }
        });
        // A step planned before a stop string was found may still be in flight.
        while self.requests.is_empty() && self.core.has_work() {
            self.step();
        }
        let unanswered = || {
            Err(RequestError::Failed(
                "the tokenizer's thread ended".to_string(),
            ))
        };
        let results = results.into_iter();
        results
            .map(|result| result.unwrap_or_else(unanswered))
            .collect()
    }

    /// Adds what was prepared meanwhile; with `wait`, at least one. Returns whether more may come.
    fn take_prepared(
        &mut self,
        prepared: &Receiver<(usize, Result<Prepared, RequestError>)>,
        wait: bool,
        mut added: impl FnMut(usize, Result<RequestId, RequestError>),
    ) -> bool {
        if wait {
            match prepared.recv() {
                Ok((at, request)) => added(at, request.and_then(|p| self.add_prepared(p))),
                Err(_) => return false,
            }
        }
        loop {
            match prepared.try_recv() {
                Ok((at, request)) => added(at, request.and_then(|p| self.add_prepared(p))),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// Takes in a request, for callers that step by hand.
    pub fn add_request(&mut self, request: GenerateRequest) -> Result<RequestId, RequestError> {
        let prepared = self.frontend.prepare(request)?;
        self.add_prepared(prepared)
    }

    fn add_prepared(&mut self, prepared: Prepared) -> Result<RequestId, RequestError> {
        let Prepared {
            request,
            state,
            grammar,
        } = prepared;
        let id = request.id;
        self.core.add_constrained(request, grammar)?;
        self.requests.insert(id, state);
        Ok(id)
    }

    /// Ends a request. What it has so far comes with the next step, marked as aborted.
    pub fn abort(&mut self, id: RequestId) -> bool {
        self.core.abort(id, &mut self.events)
    }

    /// Whether any request is open.
    pub fn has_work(&self) -> bool {
        self.core.has_work() || !self.requests.is_empty()
    }

    /// One step of the model (with overlap: launches one and collects an earlier one). If the
    /// engine dies, every open request ends with [`RequestError::EngineDead`].
    pub fn step(&mut self) -> EngineStep {
        let mut step = EngineStep::default();
        let mut events = std::mem::take(&mut self.events);
        let result = self.core.step(&mut events);
        let mut stops = Vec::new();
        for event in events.drain(..) {
            self.take_event(event, &mut step, &mut stops);
        }
        for (id, index, stop) in stops {
            let reason = CoreReason::StopString(stop);
            self.core.finish(id, index, reason, &mut events);
        }
        for event in events.drain(..) {
            self.take_event(event, &mut step, &mut Vec::new());
        }
        self.events = events;
        if let Err(EngineDead(cause)) = result {
            let mut open: Vec<RequestId> = self.requests.drain().map(|(id, _)| id).collect();
            open.sort();
            let failed = |id| (id, Err(RequestError::EngineDead(cause.clone())));
            step.finished.extend(open.into_iter().map(failed));
        }
        step.report = self.core.take_report();
        step
    }

    fn take_event(
        &mut self,
        event: CoreEvent,
        step: &mut EngineStep,
        stops: &mut Vec<(RequestId, u32, String)>,
    ) {
        let id = event.id();
        let Some(state) = self.requests.get_mut(&id) else {
            return;
        };
        let outcome = state.on_event(event);
        step.deltas.extend(outcome.delta.map(|delta| (id, delta)));
        stops.extend(outcome.stop.map(|(index, stop)| (id, index, stop)));
        if state.is_finished()
            && let Some(state) = self.requests.remove(&id)
        {
            step.finished.push((id, outcome_of(state)));
        }
    }

    /// Turns step reports on; they come with each [`EngineStep`].
    pub fn trace(&mut self) {
        self.core.trace();
    }

    /// Figures of now.
    pub fn stats(&self) -> Stats {
        self.core.stats()
    }

    /// The block map and who holds what.
    pub fn kv_snapshot(&self) -> KvSnapshot {
        self.core.kv_snapshot()
    }
}

/// A finished request's output; its error if a sequence could not go on.
pub(crate) fn outcome_of(state: RequestState) -> Result<RequestOutput, RequestError> {
    let output = state.into_output();
    let failed = output.outputs.iter().find_map(|seq| {
        let finish = seq.finish.as_ref()?;
        (finish.reason == FinishReason::Error).then(|| finish.error.clone().unwrap_or_default())
    });
    match failed {
        Some(message) => Err(RequestError::Failed(message)),
        None => Ok(output),
    }
}
