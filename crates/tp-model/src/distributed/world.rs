//! A group of processes, one rank each.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

#[cfg(feature = "cuda")]
use tch::Tensor;
use torch_ext::cuda::Memory;

use super::connect::{Purpose, connect};
use super::fingerprint::Fingerprint;
use super::launch::Launcher;
use super::monitor::Watch;
use super::outputs::Outputs;
use super::wire::{self, Tag};
#[cfg(feature = "cuda")]
use crate::comm::{Collective, Members, Nccl, Solo};
use crate::comm::{CommError, Health, Peers, Tcp, explain, patience};
use crate::options::LoadOptions;
use crate::parallel::{ParallelConfig, ParallelGroups};
use crate::runner::{RunnerConfig, WorkingMemory};

/// This process's place in a group of processes. Clones share it.
#[derive(Clone, Debug)]
pub struct World(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    launcher: Launcher,
    timeout: Duration,
    health: Health,
    peers: Arc<Peers>,
    /// For plans: on rank 0 to each other rank in order, on the others to rank 0.
    control: Mutex<Vec<TcpStream>>,
    /// For signs of life, likewise.
    monitors: Vec<TcpStream>,
}

/// What a rank other than 0 is to do next.
#[derive(Debug)]
pub(crate) enum Order {
    /// Make a runner of these sizes.
    Configure(RunnerConfig),
    /// Tell what memory a GPU has left, and what a runner of these sizes takes.
    Measure(RunnerConfig),
    /// Take part in a step.
    Step(Vec<u8>),
    /// Exit with this code.
    Bye(i32),
}

impl World {
    /// Finds the other processes. A process that does not come, or that no answer comes from
    /// later on, for `timeout` is a failure of the group, which every rank hears of.
    pub fn connect(launcher: &Launcher, timeout: Duration) -> Result<Self, CommError> {
        let mut connections = connect(launcher, timeout)?;
        let broken = |e: io::Error| launcher.error(launcher.rank, e.to_string());
        let mut of = |purpose| -> Vec<(usize, TcpStream)> {
            let found = (0..launcher.world_size).filter_map(|rank| {
                let stream = connections.remove(&(purpose, rank))?;
                Some((rank, stream))
            });
            found.collect()
        };
        let (control, watched, data) = (
            of(Purpose::Control),
            of(Purpose::Monitor),
            of(Purpose::Data),
        );
        let health = Health::default();
        // Hooks run in this order: others hear of a failure before their connections close.
        let mut monitors = Vec::new();
        for (peer, stream) in watched {
            monitors.push(stream.try_clone().map_err(broken)?);
            let watch = Watch {
                peer,
                world_size: launcher.world_size,
                timeout,
                health: health.clone(),
            };
            watch.start(stream).map_err(broken)?;
        }
        let mut streams: Vec<_> = (0..launcher.world_size).map(|_| None).collect();
        for (peer, stream) in data {
            streams[peer] = Some(stream);
        }
        let peers = Peers::new(launcher.rank, streams, timeout, health.clone()).map_err(broken)?;
        let mut doors = Vec::new();
        for (_, stream) in &control {
            // Loading takes as long as it takes, and between requests there is silence: the
            // monitors say who lives.
            stream.set_read_timeout(None).map_err(broken)?;
            doors.push(stream.try_clone().map_err(broken)?);
        }
        health.on_failure(move |_| {
            for door in &doors {
                let _ = door.shutdown(Shutdown::Both);
            }
        });
        Ok(Self(Arc::new(Inner {
            launcher: launcher.clone(),
            timeout,
            health,
            peers: Arc::new(peers),
            control: Mutex::new(control.into_iter().map(|(_, stream)| stream).collect()),
            monitors,
        })))
    }

    /// This process, `0..world_size`.
    pub fn rank(&self) -> usize {
        self.0.launcher.rank
    }

    /// How many processes there are.
    pub fn world_size(&self) -> usize {
        self.0.launcher.world_size
    }

    /// How long a rank may keep the others waiting.
    pub fn timeout(&self) -> Duration {
        self.0.timeout
    }

    /// What the environment said.
    pub fn launcher(&self) -> &Launcher {
        &self.0.launcher
    }

    /// The first failure of any rank, and a way to hear of it.
    pub fn health(&self) -> &Health {
        &self.0.health
    }

    /// What connects all ranks.
    pub fn collective(&self) -> Result<Tcp, CommError> {
        self.group((0..self.world_size()).collect())
    }

    /// What connects this rank with the others of its stage, and with the stages before and after
    /// it. A stage waits an eighth of the timeout longer than the one before it, so that the first
    /// to lose patience names the rank at fault and not one that waits itself.
    pub fn groups(&self, parallel: &ParallelConfig) -> Result<ParallelGroups, CommError> {
        if parallel.world_size() != self.world_size() {
            return Err(self.error(format!(
                "is to be one of {} ranks, but there are {} processes",
                parallel.world_size(),
                self.world_size()
            )));
        }
        let (members, stage) = parallel.pp_members(self.rank());
        if let Some(before) = stage.checked_sub(1) {
            let patience = patience(self.0.timeout, stage);
            self.0.peers.set_patience(members[before], patience)?;
        }
        Ok(ParallelGroups {
            tp: Box::new(self.group(parallel.tp_members(self.rank()).0)?),
            pp: Box::new(self.group(members)?),
        })
    }

    fn group(&self, members: Vec<usize>) -> Result<Tcp, CommError> {
        Tcp::new(self.0.peers.clone(), members)
            .ok_or_else(|| self.error("is not in its own group".to_owned()))
    }

    /// Makes sure that all ranks are about to load the same model with the same options in the
    /// same version. Every rank must call this.
    pub fn agree(
        &self,
        dir: &Path,
        options: &LoadOptions<'_>,
        parallel: &ParallelConfig,
    ) -> Result<(), CommError> {
        let mine = Fingerprint::new(dir, options, parallel);
        let control = self.control();
        if self.rank() > 0 {
            let told = wire::write(&control[0], Tag::Fingerprint, &mine.encode());
            told.map_err(|e| self.broken(0, &e))?;
            let agreed = wire::expect(&control[0], Tag::Agreed);
            return agreed.map(|_| ()).map_err(|e| self.broken(0, &e));
        }
        for (line, rank) in control.iter().zip(1..) {
            let theirs = wire::expect(line, Tag::Fingerprint);
            let theirs = theirs.map_err(|e| self.broken(rank, &e))?;
            if let Some(difference) = mine.difference(&theirs) {
                let failure = self.0.launcher.error(rank, difference);
                return Err(self.0.health.fail(failure));
            }
        }
        self.tell(&control, Tag::Agreed, &[])
    }

    /// Ends the group: the other ranks exit with `code`. Rank 0 calls this last; another rank
    /// that does waits for rank 0's end.
    pub fn finish(&self, code: i32) {
        if self.0.health.failure().is_some() {
            return;
        }
        if self.rank() > 0 {
            // A failure is told through the group's health, like any other.
            let _ = self.order();
            return;
        }
        self.0.health.close();
        let code = code.to_le_bytes();
        // A rank that cannot be told any more has ended by itself.
        for line in &self.0.monitors {
            let _ = wire::write(line, Tag::Bye, &code);
        }
        for line in self.control().iter() {
            let _ = wire::write(line, Tag::Bye, &code);
        }
    }

    /// Tells all ranks that this one cannot go on; returns the first failure of the group.
    pub fn fail(&self, what: String) -> CommError {
        self.0.health.fail(self.error(what))
    }

    /// Tells the other ranks the sizes of their runners, and waits until all are ready.
    pub(crate) fn configure(&self, config: &RunnerConfig) -> Result<(), CommError> {
        let control = self.control();
        self.tell(&control, Tag::Config, &config.encode())?;
        for (line, rank) in control.iter().zip(1..) {
            let ready = wire::expect(line, Tag::Ready);
            ready.map_err(|e| self.broken(rank, &e))?;
        }
        Ok(())
    }

    /// Tells rank 0 that this rank has loaded the model and has `bytes` for its cache. Any rank but
    /// rank 0 calls this, between [`World::agree`] and [`follow`](fn@super::follow).
    pub fn loaded(&self, bytes: u64) -> Result<(), CommError> {
        self.tell(&self.control(), Tag::Loaded, &bytes.to_le_bytes())
    }

    /// On rank 0: what each other rank has for its cache, in bytes. Waits until they have loaded
    /// the model.
    pub fn wait_loaded(&self) -> Result<Vec<u64>, CommError> {
        let control = self.control();
        let mut all = Vec::with_capacity(control.len());
        for (line, rank) in control.iter().zip(1..) {
            let bytes = wire::expect(line, Tag::Loaded).map_err(|e| self.broken(rank, &e))?;
            let bytes = bytes.try_into().map(u64::from_le_bytes);
            let unread = |_| {
                self.0
                    .launcher
                    .error(rank, "runs another version".to_owned())
            };
            all.push(bytes.map_err(unread).map_err(|e| self.0.health.fail(e))?);
        }
        Ok(all)
    }

    /// On rank 0: has the other ranks measure what memory their GPUs have left, as this one is about
    /// to: the largest steps take all of them. [`World::wait_measured`] has what they say.
    pub fn measure(&self, config: &RunnerConfig) -> Result<(), CommError> {
        self.tell(&self.control(), Tag::Measure, &config.encode())
    }

    /// What the other ranks measured, after [`World::measure`].
    pub fn wait_measured(&self) -> Result<Vec<(Memory, WorkingMemory)>, CommError> {
        let control = self.control();
        let mut all = Vec::with_capacity(control.len());
        for (line, rank) in control.iter().zip(1..) {
            let bytes = wire::expect(line, Tag::Measured).map_err(|e| self.broken(rank, &e))?;
            let fields = bytes.as_chunks::<8>().0.iter();
            let fields: Vec<u64> = fields.map(|n| u64::from_le_bytes(*n)).collect();
            let &[free, total, allocated, reserved, steps, graphs, num_graphs] = &fields[..] else {
                let what = "runs another version".to_owned();
                return Err(self.0.health.fail(self.0.launcher.error(rank, what)));
            };
            let memory = Memory {
                free,
                total,
                allocated,
                reserved,
            };
            let work = WorkingMemory {
                steps,
                graphs,
                num_graphs: num_graphs as usize,
            };
            all.push((memory, work));
        }
        Ok(all)
    }

    /// Tells rank 0 what [`World::measure`] asked for.
    pub(crate) fn measured(&self, m: Memory, w: WorkingMemory) -> Result<(), CommError> {
        let memory = [m.free, m.total, m.allocated, m.reserved];
        let work = [w.steps, w.graphs, w.num_graphs as u64];
        let fields = [&memory[..], &work].concat().into_iter();
        let fields: Vec<[u8; 8]> = fields.map(u64::to_le_bytes).collect();
        self.tell(&self.control(), Tag::Measured, &fields.concat())
    }

    /// As [`World::groups`], through NCCL: this rank has GPU `device` of this machine. Waits until
    /// all ranks have joined, at most for the timeout.
    #[cfg(feature = "cuda")]
    pub fn gpu_groups(
        &self,
        parallel: &ParallelConfig,
        device: usize,
    ) -> Result<ParallelGroups, CommError> {
        let (rank, stages) = (self.rank(), parallel.pipeline_parallel_size);
        Ok(ParallelGroups {
            tp: match parallel.tensor_parallel_size {
                1 if stages > 1 => Box::new(Solo),
                _ => Box::new(self.nccl_group(parallel.tp_members(rank).0, device)?),
            },
            pp: match stages {
                1 => Box::new(Solo),
                _ => Box::new(self.nccl_group(parallel.pp_members(rank).0, device)?),
            },
        })
    }

    /// Joins the NCCL group of all ranks with GPU `device` of this machine. Waits until all have, at
    /// most for the timeout.
    #[cfg(feature = "cuda")]
    pub fn nccl(&self, device: usize) -> Result<Nccl, CommError> {
        self.nccl_group((0..self.world_size()).collect(), device)
    }

    #[cfg(feature = "cuda")]
    fn nccl_group(&self, members: Vec<usize>, device: usize) -> Result<Nccl, CommError> {
        use torch_ext::cuda::NcclId;
        let group = self.group(members.clone())?;
        let rank = group.rank();
        let mut bytes = [0; 128];
        if rank == 0 {
            let id = NcclId::new().map_err(|e| self.fail(e.to_string()))?;
            bytes = id.bytes();
        }
        let told = Tensor::from_slice(&bytes.map(i64::from));
        let told = group.broadcast(told, 0)?;
        let told = Vec::<i64>::try_from(told).map_err(|e| self.fail(e.to_string()))?;
        for (byte, told) in bytes.iter_mut().zip(told) {
            *byte = told as u8;
        }
        let id = NcclId::from_bytes(bytes);
        let members = Members::new(members, self.world_size());
        let Inner {
            timeout, health, ..
        } = &*self.0;
        Nccl::new(id, rank, members, device, *timeout, health)
    }

    /// Gives rank 0 the output of a step.
    pub(crate) fn send_output(&self, output: &[u8]) -> Result<(), CommError> {
        self.tell(&self.control(), Tag::Output, output)
    }

    /// On rank 0: where outputs come from, if another rank samples. They are read as they come, so
    /// that no two ranks wait for each other to read.
    pub(crate) fn outputs(&self, parallel: &ParallelConfig) -> Result<Option<Outputs>, CommError> {
        let rank = parallel.sampling_rank();
        if rank == 0 {
            return Ok(None);
        }
        let (line, outputs) = Outputs::new(parallel, self.0.timeout, &self.0.health);
        let failed = |e: io::Error| self.0.health.fail(self.error(e.to_string()));
        let stream = self.control()[rank - 1].try_clone().map_err(failed)?;
        let world = self.clone();
        let read = move || {
            loop {
                let output = wire::expect(&stream, Tag::Output);
                if world.0.health.is_closed() {
                    return;
                }
                let output = output.map_err(|e| world.broken(rank, &e));
                let last = output.is_err();
                if line.send(output).is_err() || last {
                    return;
                }
            }
        };
        let thread = thread::Builder::new().name("outputs".to_owned());
        thread.spawn(read).map_err(failed)?;
        Ok(Some(outputs))
    }

    /// Sends a step to all other ranks.
    pub(crate) fn send_step(&self, step: &[u8]) -> Result<(), CommError> {
        self.tell(&self.control(), Tag::Step, step)
    }

    /// Tells rank 0 that this rank can take steps.
    pub(crate) fn ready(&self) -> Result<(), CommError> {
        self.tell(&self.control(), Tag::Ready, &[])
    }

    /// Waits for what rank 0 wants.
    pub(crate) fn order(&self) -> Result<Order, CommError> {
        self.read_order(&self.control()[0])
    }

    /// What rank 0 wants, as it comes, up to the end or the first failure. A thread reads it, so
    /// that this rank can look after its GPU meanwhile.
    pub(crate) fn orders(&self) -> Result<Receiver<Result<Order, CommError>>, CommError> {
        let failed = |e: io::Error| self.0.health.fail(self.error(e.to_string()));
        let stream = self.control()[0].try_clone().map_err(failed)?;
        let (line, orders) = channel();
        let world = self.clone();
        let read = move || {
            loop {
                let order = world.read_order(&stream);
                let last = matches!(order, Err(_) | Ok(Order::Bye(_)));
                if line.send(order).is_err() || last {
                    return;
                }
            }
        };
        let thread = thread::Builder::new().name("orders".to_owned());
        thread.spawn(read).map_err(failed)?;
        Ok(orders)
    }

    fn read_order(&self, line: &TcpStream) -> Result<Order, CommError> {
        let (tag, payload) = wire::read(line).map_err(|e| self.broken(0, &e))?;
        let order = match tag {
            Tag::Step => Some(Order::Step(payload)),
            Tag::Config => RunnerConfig::decode(&payload).map(Order::Configure),
            Tag::Measure => RunnerConfig::decode(&payload).map(Order::Measure),
            Tag::Bye => {
                self.0.health.close();
                let code = payload.try_into().map(i32::from_le_bytes);
                code.ok().map(Order::Bye)
            }
            _ => None,
        };
        order.ok_or_else(|| {
            self.0
                .health
                .fail(self.0.launcher.error(0, format!("sent {tag:?}")))
        })
    }

    fn tell(&self, control: &[TcpStream], tag: Tag, payload: &[u8]) -> Result<(), CommError> {
        let first = usize::from(self.rank() == 0);
        for (line, rank) in control.iter().zip(first..) {
            let told = wire::write(line, tag, payload);
            told.map_err(|e| self.broken(rank, &e))?;
        }
        Ok(())
    }

    fn control(&self) -> MutexGuard<'_, Vec<TcpStream>> {
        let control = &self.0.control;
        control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn broken(&self, rank: usize, error: &io::Error) -> CommError {
        let what = explain(error, self.0.timeout);
        self.0.peers.blame(rank, what)
    }

    fn error(&self, what: String) -> CommError {
        self.0.launcher.error(self.rank(), what)
    }
}

impl RunnerConfig {
    fn fields(&self) -> [usize; 5] {
        [
            self.max_num_seqs,
            self.max_num_batched_tokens,
            self.max_model_len,
            self.block_size,
            self.num_blocks,
        ]
    }

    fn encode(&self) -> Vec<u8> {
        let fields = self.fields().map(|n| (n as u64).to_le_bytes());
        fields.concat()
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (fields, rest) = bytes.as_chunks::<8>();
        let fields: Vec<usize> = fields
            .iter()
            .map(|n| usize::try_from(u64::from_le_bytes(*n)).ok())
            .collect::<Option<_>>()?;
        match (<[usize; 5]>::try_from(fields), rest) {
            (Ok([seqs, tokens, len, block_size, num_blocks]), []) => Some(Self {
                max_num_seqs: seqs,
                max_num_batched_tokens: tokens,
                max_model_len: len,
                block_size,
                num_blocks,
            }),
            _ => None,
        }
    }
}
