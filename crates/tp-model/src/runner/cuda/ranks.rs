//! Several GPUs: rank 0 tells the others of each step, and its GPU gives theirs what it sampled.
//! No host waits for that: it is a broadcast on the stream, behind the step.

use std::thread;
use std::time::{Duration, Instant};

use tch::{Kind, Tensor};
use torch_ext::cuda::Readback;

use super::CudaRunner;
use crate::distributed::{Followers, StepMessage};
use crate::error::RunnerError;
use crate::runner::guarded;

/// How long rank 0 asks for a step's tokens without rest.
const BUSY: Duration = Duration::from_millis(20);
const REST: Duration = Duration::from_micros(50);

impl CudaRunner {
    /// Makes this the runner of rank 0, which `followers` do as.
    pub(crate) fn lead(&mut self, followers: Followers) {
        self.followers = Some(followers);
    }

    /// The ranks that follow this one, if any do.
    pub(crate) fn followers(&self) -> Option<&Followers> {
        self.followers.as_ref()
    }

    /// Whether this is the only rank.
    pub(super) fn is_alone(&self) -> bool {
        self.model.groups().tp.world_size() == 1
    }

    /// On rank 0: an error of this rank is the group's, and the group's first one is what every
    /// rank reports.
    pub(super) fn tell_failure<T>(
        &self,
        step: u64,
        result: Result<T, RunnerError>,
    ) -> Result<T, RunnerError> {
        let Some(followers) = &self.followers else {
            return result;
        };
        result.map_err(|error| {
            let known = followers.health().failure();
            followers.fail(error.to_string());
            match known {
                Some(source) => RunnerError::Comm { step, source },
                None => error,
            }
        })
    }

    /// Takes part in a step that rank 0 tells of. Returns when it is launched.
    pub(crate) fn follow(&mut self, message: &[u8]) -> Result<(), RunnerError> {
        let unreadable = |what| RunnerError::Plan { step: 0, what };
        let message = StepMessage::decode(message).map_err(unreadable)?;
        let step = message.plan.step;
        let _no_grad = tch::no_grad_guard();
        guarded(step, || {
            self.stream
                .make_current()
                .map_err(|e| RunnerError::Device {
                    step,
                    what: e.to_string(),
                })?;
            self.step(message.plan, &message.refused).map(|_| ())
        })
    }

    /// Gives the other ranks the tokens that this one sampled.
    pub(super) fn share_tokens(&self, tokens: &Tensor) -> Result<(), String> {
        if self.is_alone() {
            return Ok(());
        }
        let told = self.model.groups().tp.broadcast(tokens.shallow_clone(), 0);
        told.map(|_| ()).map_err(|e| e.to_string())
    }

    /// Takes the tokens that rank 0 sampled for rows of these slots (int32 `[rows]` on the device).
    pub(super) fn learn_tokens(&self, slots: &Tensor) -> Result<(), String> {
        let like = Tensor::empty(slots.size(), (Kind::Int, self.model.device()));
        let tokens = self.model.groups().tp.broadcast(like, 0);
        let tokens = tokens.map_err(|e| e.to_string())?;
        self.kernels
            .keep_tokens(&tokens, slots, &self.last_token)
            .map_err(|e| e.to_string())
    }

    /// Waits for a step's tokens; with other ranks no longer than the group's timeout, since the
    /// GPU waits for theirs.
    pub(super) fn wait_for(&self, readback: &Readback) -> Result<Tensor, String> {
        let text = |e: torch_ext::cuda::CudaError| e.to_string();
        let Some(followers) = &self.followers else {
            return readback.wait().map_err(text);
        };
        let start = Instant::now();
        // A kernel that waits for a late rank says which, if it gives up first.
        let patience = followers.timeout() + followers.timeout() / 8;
        while !readback.is_done().map_err(text)? {
            followers.health().check().map_err(|e| e.to_string())?;
            match start.elapsed() {
                waited if waited > patience => {
                    return Err(format!(
                        "the GPUs have not finished a step within {} s: one of them or its rank hangs",
                        patience.as_secs_f32()
                    ));
                }
                waited if waited > BUSY => thread::sleep(REST),
                _ => thread::yield_now(),
            }
        }
        self.model.groups().tp.check().map_err(|e| e.to_string())?;
        readback.wait().map_err(text)
    }
}
