//! What rank 0 and the others say to each other on the control connections, from the sizes of runners to
//! the end.

use std::io;
use std::net::TcpStream;
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use torch_ext::cuda::Memory;

use super::World;
use crate::comm::CommError;
use crate::distributed::outputs::Outputs;
use crate::distributed::wire::{self, Tag};
use crate::parallel::ParallelConfig;
use crate::runner::{RunnerConfig, WorkingMemory};

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
    /// rank 0 calls this, between [`World::agree`] and [`follow`](fn@crate::distributed::follow).
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
