//! Ranks that are processes, connected pair by pair.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tch::Tensor;

use super::{Collective, CommError, Health, sum_in_order};

/// What surely fits the buffers of a connection, so that all may write before anybody reads.
const EAGER_BYTES: usize = 32 << 10;

/// How long the news of a failure may take to arrive.
const GRACE: Duration = Duration::from_millis(300);

/// The connections of one process to all others.
#[derive(Debug)]
pub(crate) struct Peers {
    rank: usize,
    lines: Vec<Option<Mutex<Line>>>,
    health: Health,
}

/// A connection to another process.
#[derive(Debug)]
struct Line {
    stream: TcpStream,
    /// How long it may be silent where something is due.
    patience: Duration,
}

impl Peers {
    /// `streams[i]` leads to rank `i`; there is none to `rank` itself.
    pub(crate) fn new(
        rank: usize,
        streams: Vec<Option<TcpStream>>,
        timeout: Duration,
        health: Health,
    ) -> io::Result<Self> {
        let mut doors = Vec::new();
        for stream in streams.iter().flatten() {
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(timeout))?;
            stream.set_write_timeout(Some(timeout))?;
            doors.push(stream.try_clone()?);
        }
        // Whoever waits for a peer's bytes hears of any rank's failure at once.
        health.on_failure(move |_| {
            for door in &doors {
                let _ = door.shutdown(Shutdown::Both);
            }
        });
        Ok(Self {
            rank,
            lines: streams
                .into_iter()
                .map(|stream| {
                    stream.map(|stream| {
                        Mutex::new(Line {
                            stream,
                            patience: timeout,
                        })
                    })
                })
                .collect(),
            health,
        })
    }

    /// From now on waits so long for `peer`'s bytes.
    pub(crate) fn set_patience(&self, peer: usize, patience: Duration) -> Result<(), CommError> {
        let mut line = self.line(peer)?;
        line.patience = patience;
        let set = line.stream.set_read_timeout(Some(patience));
        set.map_err(|e| self.blame(peer, explain(&e, patience)))
    }

    fn line(&self, peer: usize) -> Result<MutexGuard<'_, Line>, CommError> {
        let line = self.lines.get(peer).and_then(Option::as_ref);
        let line = line.ok_or_else(|| CommError {
            rank: self.rank,
            world_size: self.lines.len(),
            what: format!("is not connected to rank {peer}"),
        })?;
        Ok(line.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A tensor's bytes to a peer, after their number.
    fn write(&self, peer: usize, bytes: &[u8]) -> Result<(), CommError> {
        let line = &mut *self.line(peer)?;
        let mut send = || {
            line.stream.write_all(&(bytes.len() as u64).to_le_bytes())?;
            line.stream.write_all(bytes)
        };
        send().map_err(|e| self.blame(peer, explain(&e, line.patience)))
    }

    fn read(&self, peer: usize, bytes: &mut [u8]) -> Result<(), CommError> {
        let line = &mut *self.line(peer)?;
        let patience = line.patience;
        let mut length = [0; 8];
        let broken = |e: io::Error| self.blame(peer, explain(&e, patience));
        line.stream.read_exact(&mut length).map_err(broken)?;
        let (found, expected) = (u64::from_le_bytes(length), bytes.len() as u64);
        if found != expected {
            return Err(self.health.fail(CommError {
                rank: peer,
                world_size: self.lines.len(),
                what: format!(
                    "sent {found} bytes where {expected} were due: the ranks are not in step"
                ),
            }));
        }
        line.stream.read_exact(bytes).map_err(broken)
    }

    /// The failure of the group, now that a connection to `peer` broke.
    pub(crate) fn blame(&self, peer: usize, what: String) -> CommError {
        // A peer that leaves because of a third rank's failure closes this connection too: the
        // news of that failure is on its way, and is what must be told.
        if let Some(first) = self.health.failure_within(GRACE) {
            return first;
        }
        self.health.fail(CommError {
            rank: peer,
            world_size: self.lines.len(),
            what,
        })
    }
}

/// What an error on a connection to another rank means.
pub(crate) fn explain(error: &io::Error, timeout: Duration) -> String {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => {
            format!("sent nothing for {} s", timeout.as_secs_f32())
        }
        ErrorKind::UnexpectedEof
        | ErrorKind::ConnectionReset
        | ErrorKind::ConnectionAborted
        | ErrorKind::BrokenPipe => "its connection closed: the process has ended".to_owned(),
        _ => format!("its connection broke: {error}"),
    }
}

/// One rank of a group of processes, on the CPU, over TCP.
///
/// As with [`super::Threads`], sums are taken in the order of ranks, element by element. (The ring
/// and halving algorithms of MPI and gloo add in an order that depends on where an element lies in
/// the message, and so on what else is in the batch.)
#[derive(Debug)]
pub struct Tcp {
    peers: Arc<Peers>,
    /// Ranks of the group, as the connections count them.
    members: Vec<usize>,
    /// Which of them this is.
    index: usize,
}

impl Tcp {
    /// The group of `members`, to which this process must belong.
    pub(crate) fn new(peers: Arc<Peers>, members: Vec<usize>) -> Option<Self> {
        let index = members.iter().position(|member| *member == peers.rank)?;
        Some(Self {
            peers,
            members,
            index,
        })
    }

    fn member(&self, rank: usize) -> Result<usize, CommError> {
        let member = self.members.get(rank).filter(|_| rank != self.index);
        member.copied().ok_or_else(|| CommError {
            rank: self.peers.rank,
            world_size: self.peers.lines.len(),
            what: format!("cannot exchange with rank {rank}"),
        })
    }

    /// Everybody's tensor, in rank order.
    fn exchange(&self, tensor: Tensor) -> Result<Vec<Tensor>, CommError> {
        let mine = bytes_of(&tensor);
        let mut theirs = vec![vec![0; mine.len()]; self.members.len()];
        let others = || (0..self.members.len()).filter(|at| *at != self.index);
        if mine.len() <= EAGER_BYTES {
            for at in others() {
                self.peers.write(self.members[at], &mine)?;
            }
            for at in others() {
                self.peers.read(self.members[at], &mut theirs[at])?;
            }
        } else {
            // Pair by pair, the lower rank first: every rank goes through its pairs in the same
            // order, so that somebody always listens to whoever speaks.
            for at in others() {
                let peer = self.members[at];
                if self.index < at {
                    self.peers.write(peer, &mine)?;
                    self.peers.read(peer, &mut theirs[at])?;
                } else {
                    self.peers.read(peer, &mut theirs[at])?;
                    self.peers.write(peer, &mine)?;
                }
            }
        }
        let mut tensors: Vec<Tensor> = Vec::with_capacity(theirs.len());
        for (at, bytes) in theirs.iter().enumerate() {
            tensors.push(match at == self.index {
                true => tensor.shallow_clone(),
                false => Tensor::from_data_size(bytes, &tensor.size(), tensor.kind()),
            });
        }
        Ok(tensors)
    }
}

impl Collective for Tcp {
    fn rank(&self) -> usize {
        self.index
    }

    fn world_size(&self) -> usize {
        self.members.len()
    }

    fn all_reduce_sum(&self, tensor: Tensor) -> Result<Tensor, CommError> {
        match self.members.len() {
            1 => Ok(tensor),
            _ => Ok(sum_in_order(&self.exchange(tensor)?)),
        }
    }

    fn all_gather(&self, tensor: Tensor) -> Result<Tensor, CommError> {
        Ok(Tensor::cat(&self.exchange(tensor)?, -1))
    }

    fn gather(&self, tensor: Tensor, root: usize) -> Result<Option<Tensor>, CommError> {
        if self.index != root {
            self.send(&tensor, root)?;
            return Ok(None);
        }
        let parts = (0..self.members.len()).map(|at| match at == root {
            true => Ok(tensor.shallow_clone()),
            false => self.recv(&tensor, at),
        });
        let parts = parts.collect::<Result<Vec<_>, _>>()?;
        Ok(Some(Tensor::cat(&parts, -1)))
    }

    fn broadcast(&self, tensor: Tensor, root: usize) -> Result<Tensor, CommError> {
        if self.index != root {
            return self.recv(&tensor, root);
        }
        for at in (0..self.members.len()).filter(|at| *at != root) {
            self.send(&tensor, at)?;
        }
        Ok(tensor)
    }

    fn send(&self, tensor: &Tensor, to: usize) -> Result<(), CommError> {
        self.peers.write(self.member(to)?, &bytes_of(tensor))
    }

    fn recv(&self, like: &Tensor, from: usize) -> Result<Tensor, CommError> {
        let mut bytes = vec![0; like.numel() * like.kind().elt_size_in_bytes()];
        self.peers.read(self.member(from)?, &mut bytes)?;
        Ok(Tensor::from_data_size(&bytes, &like.size(), like.kind()))
    }
}

fn bytes_of(tensor: &Tensor) -> Vec<u8> {
    let tensor = tensor.contiguous();
    let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
    tensor.copy_data_u8(&mut bytes, tensor.numel());
    bytes
}
