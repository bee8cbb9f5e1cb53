//! One request's output as it comes.

use std::pin::Pin;
use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use batch_scheduler::RequestId;
use futures_core::Stream;
use tokio::sync::mpsc::UnboundedReceiver;

use crate::async_engine::{Command, Delivery, stopped};
use crate::engine::outcome_of;
use crate::error::RequestError;
use crate::output::{OutputDelta, RequestOutput};
use crate::state::RequestState;

/// The news of one request, in order. Ends after the last sequence has ended, or after an error.
///
/// Detokenizing and the search for stop strings happen where the stream is read. Dropping it
/// aborts the request and gives its blocks back.
pub struct TokenStream {
    id: RequestId,
    state: RequestState,
    events: UnboundedReceiver<Delivery>,
    commands: Sender<Command>,
    cause: Arc<OnceLock<String>>,
    failed: Option<RequestError>,
}

impl TokenStream {
    pub(crate) fn new(
        id: RequestId,
        state: RequestState,
        events: UnboundedReceiver<Delivery>,
        commands: Sender<Command>,
        cause: Arc<OnceLock<String>>,
    ) -> Self {
        TokenStream {
            id,
            state,
            events,
            commands,
            cause,
            failed: None,
        }
    }

    /// What has come so far, accumulated: prompt token ids, prompt log-probabilities and metrics
    /// are here too.
    pub fn output(&self) -> &RequestOutput {
        self.state.output()
    }

    /// Waits for the next news. Must not be called on an async runtime's thread.
    pub fn blocking_next(&mut self) -> Option<Result<OutputDelta, RequestError>> {
        while !self.is_done() {
            let delivery = self.events.blocking_recv();
            if let Some(item) = self.take(delivery) {
                return Some(item);
            }
        }
        None
    }

    /// Waits for the next news.
    pub async fn next(&mut self) -> Option<Result<OutputDelta, RequestError>> {
        std::future::poll_fn(|context| Pin::new(&mut *self).poll_next(context)).await
    }

    /// Waits for the end and returns the whole.
    pub async fn collect(mut self) -> Result<RequestOutput, RequestError> {
        while let Some(item) = self.next().await {
            item?;
        }
        outcome_of(self.state_taken())
    }

    /// As [`TokenStream::collect`], for threads outside of an async runtime.
    pub fn blocking_collect(mut self) -> Result<RequestOutput, RequestError> {
        while let Some(item) = self.blocking_next() {
            item?;
        }
        outcome_of(self.state_taken())
    }

    fn state_taken(&mut self) -> RequestState {
        std::mem::replace(&mut self.state, RequestState::ended())
    }

    fn is_done(&self) -> bool {
        self.failed.is_some() || self.state.is_finished()
    }

    fn take(&mut self, delivery: Option<Delivery>) -> Option<Result<OutputDelta, RequestError>> {
        let event = match delivery {
            Some(Ok(event)) => event,
            Some(Err(error)) => return Some(Err(self.fail(error))),
            None => {
                let error = stopped(&self.cause);
                return Some(Err(self.fail(error)));
            }
        };
        let outcome = self.state.on_event(event);
        if let Some((index, stop)) = outcome.stop {
            let id = self.id;
            // A core that is gone has nothing to finish.
            let _ = self.commands.send(Command::Finish { id, index, stop });
        }
        outcome.delta.map(Ok)
    }

    fn fail(&mut self, error: RequestError) -> RequestError {
        self.failed.insert(error).clone()
    }
}

impl Stream for TokenStream {
    type Item = Result<OutputDelta, RequestError>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        while !this.is_done() {
            let delivery = ready!(this.events.poll_recv(context));
            if let Some(item) = this.take(delivery) {
                return Poll::Ready(Some(item));
            }
        }
        Poll::Ready(None)
    }
}

impl Drop for TokenStream {
    fn drop(&mut self) {
        if !self.is_done() {
            let _ = self.commands.send(Command::Abort(self.id));
        }
    }
}
