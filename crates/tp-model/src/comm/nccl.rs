//! Ranks that are GPUs.

use std::time::Duration;

use tch::Tensor;
use torch_ext::cuda::{self, CudaError, NcclId};

use super::calls::{Call, Calls};
use super::join::join_within;
use super::{Collective, CommError, Health, Members};

/// One rank of a group of GPUs, through NCCL. Exchanges are put on libtorch's current stream: the
/// caller does not wait, and they can be captured in a CUDA graph. Where it must wait all the same, it
/// is a failure of the group after the timeout.
#[derive(Debug)]
pub struct Nccl {
    comm: cuda::Nccl,
    calls: Calls,
    members: Members,
    health: Health,
}

impl Nccl {
    /// Joins the group of `id` as its rank `rank`; waits until all `members` do, but no longer than
    /// `timeout`, which is a failure that `health` hears of. Any failure that it hears of ends the
    /// wait and, later on, aborts what is under way, so that a stream that waits for a rank that is
    /// gone comes to its end. Makes `device` the current one of the calling thread.
    pub fn new(
        id: NcclId,
        rank: usize,
        members: Members,
        device: usize,
        timeout: Duration,
        health: &Health,
    ) -> Result<Self, CommError> {
        let world_size = members.ranks.len();
        let join = move || cuda::Nccl::new(id, rank, world_size, device).map_err(|e| e.to_string());
        let comm = join_within(rank, &members, timeout, health, join)?;
        let current = cuda::make_device_current(device);
        current.map_err(|e| health.fail(members.error(rank, e.to_string())))?;
        Self::watched(comm, members, timeout, health)
    }

    /// As [`Nccl::new`], for all ranks of a group of GPUs of this process: rank `r` has
    /// `devices[r]`. The calling thread's current device stays as it is.
    pub fn local_group(
        devices: &[usize],
        members: &Members,
        timeout: Duration,
        health: &Health,
    ) -> Result<Vec<Self>, CommError> {
        let all = devices.to_vec();
        let join = move || cuda::Nccl::local_group(&all).map_err(|e| e.to_string());
        let group = join_within(0, members, timeout, health, join)?;
        let watched = |comm| Self::watched(comm, members.clone(), timeout, health);
        group.into_iter().map(watched).collect()
    }

    fn watched(
        comm: cuda::Nccl,
        members: Members,
        timeout: Duration,
        health: &Health,
    ) -> Result<Self, CommError> {
        let calls = Calls::new(comm.rank(), &members, timeout, health)?;
        let abort = comm.abort_handle();
        // On a thread of its own: it may wait until graphs are dropped, by whoever hears of the
        // failure, and for ever for a call that hangs. Without a thread to be had the process has other
        // troubles.
        health.on_failure(move |_| {
            let _ = std::thread::Builder::new().spawn(move || abort.abort());
        });
        Ok(Self {
            comm,
            calls,
            members,
            health: health.clone(),
        })
    }

    /// Another rank's failure if there was one, else this error.
    fn failed(&self, error: &CudaError) -> CommError {
        let rank = self.comm.rank();
        self.health
            .fail(self.members.error(rank, error.to_string()))
    }
}

impl Collective for Nccl {
    fn rank(&self) -> usize {
        self.comm.rank()
    }

    fn world_size(&self) -> usize {
        self.comm.world_size()
    }

    fn all_reduce_sum(&self, tensor: Tensor) -> Result<Tensor, CommError> {
        let mut tensor = tensor.contiguous();
        let _call = self.calls.enter();
        let summed = self.comm.all_reduce_sum(&mut tensor);
        summed.map(|()| tensor).map_err(|e| self.failed(&e))
    }

    fn all_gather(&self, tensor: Tensor) -> Result<Tensor, CommError> {
        let _call = self.calls.enter();
        let all = self.comm.all_gather(&tensor.contiguous());
        let all = all.map_err(|e| self.failed(&e))?;
        let mut size = tensor.size();
        match size.split_last_mut() {
            // One row: the parts lie behind one another.
            Some((last, rest)) if rest.iter().product::<i64>() == 1 => {
                *last *= self.comm.world_size() as i64;
                Ok(all.view(&size[..]))
            }
            _ => Ok(Tensor::cat(&all.unbind(0), -1)),
        }
    }

    fn broadcast(&self, tensor: Tensor, root: usize) -> Result<Tensor, CommError> {
        let mut tensor = tensor.contiguous();
        let _call = self.calls.enter();
        let told = self.comm.broadcast(&mut tensor, root);
        told.map(|()| tensor).map_err(|e| self.failed(&e))
    }

    fn send(&self, tensor: &Tensor, to: usize) -> Result<(), CommError> {
        let _call = self.calls.enter();
        let sent = self.comm.send(&tensor.contiguous(), to);
        sent.map_err(|e| self.failed(&e))
    }

    fn recv(&self, like: &Tensor, from: usize) -> Result<Tensor, CommError> {
        let mut tensor = Tensor::empty(like.size(), (like.kind(), like.device()));
        let _call = self.calls.enter();
        let received = self.comm.recv(&mut tensor, from);
        received.map(|()| tensor).map_err(|e| self.failed(&e))
    }

    fn enter(&self) -> Option<Call> {
        Some(self.calls.enter())
    }

    fn check(&self) -> Result<(), CommError> {
        self.health.check()
    }
}
