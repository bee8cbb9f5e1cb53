//! Stages of a pipeline whose ranks are threads of this process and share a GPU: for tests.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use tch::Tensor;
use torch_ext::cuda::Event;

use super::{Collective, CommError, Health, Members, patience};

/// How often a stage that waits looks whether another rank has failed.
const LOOK: Duration = Duration::from_millis(20);

/// One stage of a pipeline. Tensors go to the next stage alone, as copies that streams wait for;
/// no host waits for a GPU. What NCCL's Send and Recv do, where it takes no GPU twice.
#[derive(Debug)]
pub struct Handoff {
    rank: usize,
    device: usize,
    members: Members,
    /// From the stage before, and back to it.
    before: Option<(Receiver<Parcel>, Sender<Parcel>)>,
    /// To the next stage, and back from it.
    next: Option<(Sender<Parcel>, Receiver<Parcel>)>,
    timeout: Duration,
    health: Health,
}

/// A tensor, and the point of a stream from which on it may be read; on its way back, from which on
/// nobody reads it any more.
#[derive(Debug)]
struct Parcel {
    tensor: Tensor,
    ready: Event,
}

impl Handoff {
    /// The stages of a pipeline, in order: stage `s` has GPU `devices[s]`.
    pub fn group(
        devices: &[usize],
        members: &Members,
        timeout: Duration,
        health: &Health,
    ) -> Vec<Self> {
        let mut before = None;
        let stages = devices.iter().enumerate().map(|(rank, device)| {
            let (forth, back) = (channel(), channel());
            let is_last = rank + 1 == devices.len();
            let own = before.take();
            before = Some((forth.1, back.0));
            Self {
                rank,
                device: *device,
                members: members.clone(),
                before: own,
                next: (!is_last).then_some((forth.0, back.1)),
                timeout,
                health: health.clone(),
            }
        });
        stages.collect()
    }

    fn failed(&self, rank: usize, what: impl std::fmt::Display) -> CommError {
        self.health.fail(self.members.error(rank, what.to_string()))
    }

    fn unsupported<T>(&self, what: &str) -> Result<T, CommError> {
        let what = format!("cannot {what}: stages give tensors to the next one alone");
        Err(self.members.error(self.rank, what))
    }

    /// A copy, and the point from which on it is one.
    fn copy(&self, tensor: &Tensor) -> Result<Parcel, CommError> {
        let parcel = || {
            let tensor = tensor.copy();
            let ready = Event::new(self.device, false)?;
            ready.record()?;
            Ok::<_, torch_ext::cuda::CudaError>(Parcel { tensor, ready })
        };
        parcel().map_err(|e| self.failed(self.rank, e))
    }
}

impl Collective for Handoff {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.members.ranks.len()
    }

    fn all_reduce_sum(&self, _: Tensor) -> Result<Tensor, CommError> {
        self.unsupported("sum")
    }

    fn all_gather(&self, _: Tensor) -> Result<Tensor, CommError> {
        self.unsupported("gather")
    }

    fn broadcast(&self, _: Tensor, _: usize) -> Result<Tensor, CommError> {
        self.unsupported("broadcast")
    }

    fn send(&self, tensor: &Tensor, to: usize) -> Result<(), CommError> {
        let next = self.next.as_ref().filter(|_| to == self.rank + 1);
        let Some((line, back)) = next else {
            return self.unsupported("send");
        };
        self.health.check()?;
        // The next stage's stream has read these, or will have before this one goes on: then their
        // memory, which is this stream's, may serve again.
        for used in back.try_iter() {
            let waits = used.ready.wait(self.device);
            waits.map_err(|e| self.failed(self.rank, e))?;
        }
        let parcel = self.copy(tensor)?;
        let sent = line.send(parcel);
        sent.map_err(|_| self.failed(to, "has ended"))
    }

    fn recv(&self, like: &Tensor, from: usize) -> Result<Tensor, CommError> {
        let before = self.before.as_ref().filter(|_| from + 1 == self.rank);
        let Some((line, back)) = before else {
            return self.unsupported("receive");
        };
        let patience = patience(self.timeout, self.rank);
        let start = Instant::now();
        let parcel = loop {
            match line.recv_timeout(LOOK) {
                Ok(parcel) => break parcel,
                Err(RecvTimeoutError::Disconnected) => {
                    self.health.check()?;
                    return Err(self.failed(from, "has ended"));
                }
                Err(RecvTimeoutError::Timeout) => self.health.check()?,
            }
            if start.elapsed() > patience {
                let what = format!("sent nothing for {} s", patience.as_secs_f32());
                return Err(self.failed(from, what));
            }
        };
        if parcel.tensor.size() != like.size() || parcel.tensor.kind() != like.kind() {
            let (got, due) = (parcel.tensor.size(), like.size());
            return Err(self.failed(from, format!("sent {got:?} where {due:?} were due")));
        }
        let waits = parcel.ready.wait(self.device);
        waits.map_err(|e| self.failed(self.rank, e))?;
        let Parcel { tensor, ready } = self.copy(&parcel.tensor)?;
        // If the stage before is gone, so is its stream's need for this memory.
        let _ = back.send(Parcel {
            tensor: parcel.tensor,
            ready,
        });
        Ok(tensor)
    }

    fn check(&self) -> Result<(), CommError> {
        self.health.check()
    }
}
