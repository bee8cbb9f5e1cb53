//! Ranks that are GPUs of this process and can read each other's memory, or share one GPU.

use std::time::Duration;

use tch::{Kind, Tensor};
use torch_ext::cuda;

use super::{Call, Collective, CommError, Health, Members, Nccl, Threads};

/// Longest message in bytes that takes one trip among so many ranks: every rank reads all of the
/// others' parts, where NCCL moves less. Up to 2 MiB is faster than NCCL between two H200s; for more
/// ranks this is a guess by the traffic.
const fn short(world_size: usize) -> usize {
    (8 << 20) / (world_size * world_size)
}

/// One rank of a group of GPUs of this process, through our own kernels. Exchanges are put on
/// libtorch's current stream, and can be captured in a CUDA graph.
///
/// Sums are taken in the order of ranks, in float32: equal inputs give equal bits on every rank, and
/// a row's result does not depend on the rows beside it.
#[derive(Debug)]
pub struct OneShot {
    ranks: cuda::OneShot,
    members: Members,
    health: Health,
    /// For long messages; `None`: there is nothing else.
    long: Option<Nccl>,
    /// For ranks that share a GPU, where a thread that has the driver do something that waits for
    /// the device (to load code, to allocate) would wait for another rank's kernel, which waits for
    /// this thread: nobody starts an exchange before all threads are about to, and nobody goes on before all have.
    meeting: Option<Threads>,
}

impl OneShot {
    /// The ranks of a group, in order: rank `r` has GPU `devices[r]`. GPUs may occur more than once,
    /// for tests. A rank that waits longer than `timeout` for another fails, and with it, through
    /// `health`, the whole group.
    pub fn group(
        devices: &[usize],
        members: &Members,
        timeout: Duration,
        health: &Health,
    ) -> Result<Vec<Self>, CommError> {
        let ranks = cuda::OneShot::group(devices, timeout);
        let ranks = ranks.map_err(|error| members.error(0, error.to_string()))?;
        if let Some(rank) = ranks.first() {
            let alarm = rank.alarm();
            health.on_failure(move |_| alarm.ring());
        }
        let shared = (1..devices.len()).any(|at| devices[..at].contains(&devices[at]));
        let mut meetings = Threads::group(devices.len(), timeout, health).into_iter();
        let rank = |ranks| Self {
            ranks,
            members: members.clone(),
            health: health.clone(),
            long: None,
            meeting: meetings.next().filter(|_| shared),
        };
        Ok(ranks.into_iter().map(rank).collect())
    }

    /// The same rank, with `nccl` for long messages and for all that is not a sum.
    pub fn with_nccl(self, nccl: Nccl) -> Self {
        Self {
            long: Some(nccl),
            ..self
        }
    }

    fn failed(&self, error: impl std::fmt::Display) -> CommError {
        self.health.fail(self.error(error.to_string()))
    }

    fn error(&self, what: String) -> CommError {
        self.members.error(self.ranks.rank(), what)
    }

    /// NCCL, if this message should go that way.
    fn long(&self, tensor: &Tensor) -> Option<&Nccl> {
        let bytes = tensor.numel() * tensor.kind().elt_size_in_bytes();
        // In float32 the model runs on libtorch's kernels alone, on its default stream.
        let halves = matches!(tensor.kind(), Kind::BFloat16 | Kind::Half);
        self.long
            .as_ref()
            .filter(|_| !halves || bytes > short(self.ranks.world_size()))
    }

    /// As [`Collective::meet`], unless this is captured: then nothing runs.
    fn start(&self) -> Result<(), CommError> {
        match self.meeting.is_some() && self.ranks.is_capturing().map_err(|e| self.failed(e))? {
            true => Ok(()),
            false => self.meet(),
        }
    }

    /// An exchange, which all ranks start before any of them goes on, if they share a GPU.
    fn together<T>(
        &self,
        exchange: impl FnOnce() -> Result<T, torch_ext::Error>,
    ) -> Result<T, CommError> {
        self.start()?;
        let result = exchange().map_err(|e| self.failed(e))?;
        self.start()?;
        Ok(result)
    }

    fn unsupported<T>(&self, verb: &str, peer: usize) -> Result<T, CommError> {
        let what = format!("cannot {verb} rank {peer}: one-shot exchanges are among all ranks");
        Err(self.error(what))
    }
}

impl Collective for OneShot {
    fn rank(&self) -> usize {
        self.ranks.rank()
    }

    fn world_size(&self) -> usize {
        self.ranks.world_size()
    }

    fn all_reduce_sum(&self, tensor: Tensor) -> Result<Tensor, CommError> {
        if let Some(nccl) = self.long(&tensor) {
            return nccl.all_reduce_sum(tensor);
        }
        self.together(|| self.ranks.all_reduce_sum(&tensor.contiguous()))
    }

    fn all_reduce_norm(
        &self,
        x: &Tensor,
        residual: &mut Tensor,
        weight: &Tensor,
        eps: f64,
    ) -> Result<Option<Tensor>, CommError> {
        let width = weight.size()[0] as usize;
        let halves = matches!(x.kind(), Kind::BFloat16 | Kind::Half);
        if !halves || !cuda::OneShot::norms(width) || self.long(x).is_some() {
            return Ok(None);
        }
        let x = x.contiguous();
        let normed = self.together(|| self.ranks.all_reduce_norm(&x, residual, weight, eps))?;
        Ok(Some(normed))
    }

    fn all_gather(&self, tensor: Tensor) -> Result<Tensor, CommError> {
        if let Some(nccl) = &self.long {
            return nccl.all_gather(tensor);
        }
        let all = self.together(|| self.ranks.all_gather(&tensor.contiguous()))?;
        Ok(Tensor::cat(&all.unbind(0), -1))
    }

    fn gather(&self, tensor: Tensor, root: usize) -> Result<Option<Tensor>, CommError> {
        if let Some(nccl) = &self.long {
            return nccl.gather(tensor, root);
        }
        let all = self.together(|| self.ranks.gather(&tensor.contiguous(), root))?;
        Ok(all.map(|all| Tensor::cat(&all.unbind(0), -1)))
    }

    fn broadcast(&self, tensor: Tensor, root: usize) -> Result<Tensor, CommError> {
        if let Some(nccl) = &self.long {
            return nccl.broadcast(tensor, root);
        }
        self.together(|| self.ranks.broadcast(&tensor.contiguous(), root))
    }

    fn send(&self, tensor: &Tensor, to: usize) -> Result<(), CommError> {
        match &self.long {
            Some(nccl) => nccl.send(tensor, to),
            None => self.unsupported("send to", to),
        }
    }

    fn recv(&self, like: &Tensor, from: usize) -> Result<Tensor, CommError> {
        match &self.long {
            Some(nccl) => nccl.recv(like, from),
            None => self.unsupported("receive from", from),
        }
    }

    fn meet(&self) -> Result<(), CommError> {
        match &self.meeting {
            Some(meeting) => meeting.all_gather(Tensor::from_slice(&[0i32])).map(|_| ()),
            None => Ok(()),
        }
    }

    fn enter(&self) -> Option<Call> {
        self.long.as_ref().and_then(Collective::enter)
    }

    fn check(&self) -> Result<(), CommError> {
        if let Some(rank) = self.ranks.alarm().late() {
            let what = "kept the other GPUs waiting for too long".to_owned();
            return Err(self.health.fail(self.members.error(rank, what)));
        }
        self.health.check()
    }
}
