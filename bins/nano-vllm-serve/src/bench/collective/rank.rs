//! One GPU of a group, and how the time of what it does with the others is taken.

use anyhow::Context;
use tch::{Device, Kind, Tensor};
use torch_ext::cuda::{Event, Graph, GraphPool, Kernels, Stream, synchronize};
use tp_model::comm::{Collective, CommError, Health, Nccl, OneShot};

use super::percentiles;

/// What the ranks exchange: what a model does.
pub(super) const KIND: Kind = Kind::BFloat16;

/// One GPU of a group.
pub(super) struct Rank {
    pub(super) device: usize,
    /// None where ranks share a GPU.
    pub(super) nccl: Option<Nccl>,
    /// None where ranks are processes, or cannot read each other's memory.
    pub(super) one_shot: Option<OneShot>,
    /// On the host, for a common start.
    pub(super) meeting: Box<dyn Collective>,
    pub(super) health: Health,
}

/// How often something is done.
#[derive(Clone, Copy)]
pub(super) struct Counts {
    /// In a row, between two looks at the clock.
    pub(super) repeats: usize,
    /// Looks at the clock that count.
    pub(super) samples: usize,
}

impl Rank {
    pub(super) fn rank(&self) -> usize {
        self.meeting.rank()
    }

    pub(super) fn world_size(&self) -> usize {
        self.meeting.world_size()
    }

    /// Makes the GPU and a stream of its own the current ones of this thread.
    pub(super) fn start(&self) -> anyhow::Result<Kernels> {
        Stream::new(self.device)?.make_current()?;
        Ok(Kernels::new(self.device)?)
    }

    /// A tensor of `size` on this GPU.
    pub(super) fn full(&self, size: &[i64], value: f64) -> anyhow::Result<Tensor> {
        Ok(Tensor::f_full(
            size,
            value,
            (KIND, Device::Cuda(self.device)),
        )?)
    }

    /// Seconds of one `op`, as a graph of `repeats` of them is replayed: without what it takes the
    /// host to launch them. All ranks call this.
    pub(super) fn time_graph(
        &self,
        counts: Counts,
        mut op: impl FnMut() -> anyhow::Result<()>,
    ) -> anyhow::Result<(f64, f64)> {
        // Loads code, connects.
        op()?;
        self.meet()?;
        let repeats = counts.repeats;
        let (mut graph, recorded) =
            Graph::capture(GraphPool::new()?, || (0..repeats).try_for_each(|_| op()))?;
        recorded?;
        // The first replay ends at about the same time on all ranks, and by then the second one
        // has been launched.
        self.time(counts, || {
            graph.replay()?;
            Ok(())
        })
    }

    /// Seconds of one `op`, as the host launches them one after the other.
    pub(super) fn time_eager(
        &self,
        counts: Counts,
        mut op: impl FnMut() -> anyhow::Result<()>,
    ) -> anyhow::Result<(f64, f64)> {
        self.time(counts, || (0..counts.repeats).try_for_each(|_| op()))
    }

    /// Median and 99th percentile of a `counts.repeats`-th of `run`, which is called once more
    /// before each time that counts.
    fn time(
        &self,
        counts: Counts,
        mut run: impl FnMut() -> anyhow::Result<()>,
    ) -> anyhow::Result<(f64, f64)> {
        let warmup = counts.samples.div_ceil(10);
        let (start, end) = (
            Event::new(self.device, true)?,
            Event::new(self.device, true)?,
        );
        let mut times = Vec::with_capacity(counts.samples);
        for turn in 0..warmup + counts.samples {
            self.meet()?;
            run()?;
            start.record()?;
            run()?;
            end.record()?;
            end.synchronize()?;
            self.check()?;
            if turn >= warmup {
                let ms = f64::from(end.since(&start)?);
                times.push(ms / 1e3 / counts.repeats as f64);
            }
        }
        Ok(percentiles(&mut times))
    }

    /// Waits until all ranks are here, and have nothing under way.
    pub(super) fn meet(&self) -> anyhow::Result<()> {
        synchronize(self.device)?;
        drop(self.meeting.all_gather(Tensor::from_slice(&[0i32]))?);
        Ok(())
    }

    /// Fails if an exchange did.
    fn check(&self) -> Result<(), CommError> {
        let nccl = self.nccl.as_ref().map_or(Ok(()), Collective::check);
        nccl.and_then(|()| self.one_shot.as_ref().map_or(Ok(()), Collective::check))
    }

    /// Fails unless all of `got` is `want`.
    pub(super) fn expect(&self, what: &str, got: &Tensor, want: f64) -> anyhow::Result<()> {
        let right = got.f_eq(want)?.f_all()?.f_int64_value(&[])? != 0;
        self.check()?;
        anyhow::ensure!(
            right,
            "{what} of {:?} on rank {} is wrong: expected {want} everywhere",
            got.size(),
            self.rank()
        );
        Ok(())
    }

    /// This error, told to all ranks.
    pub(super) fn tell(&self, error: &anyhow::Error) -> CommError {
        self.health.fail(CommError {
            rank: self.rank(),
            world_size: self.world_size(),
            what: format!("{error:#}"),
        })
    }
}

/// The thread's result.
pub(super) fn joined<T>(result: std::thread::Result<T>) -> anyhow::Result<T> {
    result
        .map_err(|_| anyhow::anyhow!("it panicked"))
        .context("a rank's thread")
}
