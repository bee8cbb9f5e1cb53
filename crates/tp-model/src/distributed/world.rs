//! A group of processes, one rank each.

#[cfg(feature = "cuda")]
mod gpus;
mod orders;

use std::io;
use std::net::{Shutdown, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::connect::{Purpose, connect};
use super::fingerprint::Fingerprint;
use super::launch::Launcher;
use super::monitor::Watch;
use super::wire::{self, Tag};
use crate::comm::{CommError, Health, Peers, Tcp, explain, patience};
use crate::options::LoadOptions;
use crate::parallel::{ParallelConfig, ParallelGroups};

pub(crate) use self::orders::Order;

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
