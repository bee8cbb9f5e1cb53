//! Ranks that are threads of one process and hand each other tensors.

use std::cell::Cell;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tch::Tensor;

use super::{Collective, CommError, Health, Members, patience, sum_in_order};
use crate::parallel::{ParallelConfig, ParallelGroups};

/// How often a rank looks again before it sleeps: most exchanges are over by then.
const LOOKS: usize = 64;

/// One rank of a group of threads, on the CPU.
///
/// Every sum is taken in the order of ranks, whoever comes first, so that equal inputs give equal
/// bits; and element by element, so that a row's result does not depend on the rows beside it.
#[derive(Debug)]
pub struct Threads {
    rank: usize,
    hub: Arc<Hub>,
    /// Number of the next exchange.
    round: Cell<u64>,
}

#[derive(Debug)]
struct Hub {
    members: Members,
    timeout: Duration,
    health: Health,
    state: Mutex<State>,
    news: Condvar,
}

#[derive(Debug)]
struct State {
    /// Exchanges by number, modulo 2: nobody enters exchange `n + 2` before everybody has left `n`.
    rounds: [Round; 2],
    /// What was sent and not received, by `(from, to)`.
    mail: HashMap<(usize, usize), VecDeque<Tensor>>,
}

#[derive(Debug, Default)]
struct Round {
    tensors: Vec<Option<Tensor>>,
    arrived: usize,
    left: usize,
}

impl Threads {
    /// The ranks of a group, in order. A rank that waits longer than `timeout` for another fails,
    /// and with it, through `health`, the whole group.
    pub fn group(world_size: usize, timeout: Duration, health: &Health) -> Vec<Threads> {
        Self::part(Members::all(world_size), timeout, health)
    }

    /// The groups of all ranks of a divided model, in order. A stage waits an eighth of `timeout`
    /// longer than the one before it, so that the first to lose patience names the rank at fault
    /// and not one that waits itself.
    pub fn grid(
        parallel: &ParallelConfig,
        timeout: Duration,
        health: &Health,
    ) -> Vec<ParallelGroups> {
        let world_size = parallel.world_size();
        let part =
            |members| Self::part(Members::new(members, world_size), timeout, health).into_iter();
        // What is handed out next, by the group's first rank: ranks come in order.
        let mut tp = HashMap::new();
        let mut pp = HashMap::new();
        let ranks = (0..world_size).map(|rank| {
            let seat = |groups: &mut HashMap<usize, _>, members: Vec<usize>| {
                let group = groups.entry(members[0]);
                let seat = group.or_insert_with(|| part(members)).next();
                seat.expect("a group has a seat for each of its ranks")
            };
            ParallelGroups {
                tp: Box::new(seat(&mut tp, parallel.tp_members(rank).0)),
                pp: Box::new(seat(&mut pp, parallel.pp_members(rank).0)),
            }
        });
        ranks.collect()
    }

    fn part(members: Members, timeout: Duration, health: &Health) -> Vec<Threads> {
        let size = members.ranks.len();
        let round = || Round {
            tensors: (0..size).map(|_| None).collect(),
            arrived: 0,
            left: 0,
        };
        let hub = Arc::new(Hub {
            members,
            timeout,
            health: health.clone(),
            state: Mutex::new(State {
                rounds: [round(), round()],
                mail: HashMap::new(),
            }),
            news: Condvar::new(),
        });
        let sleepers = Arc::downgrade(&hub);
        health.on_failure(move |_| {
            if let Some(hub) = sleepers.upgrade() {
                // Under the lock: a rank that is about to sleep has not missed it.
                let _state = hub.lock();
                hub.news.notify_all();
            }
        });
        let rank = |rank| Threads {
            rank,
            hub: hub.clone(),
            round: Cell::new(0),
        };
        (0..size).map(rank).collect()
    }

    /// Everybody's tensor, in rank order. They share storage with the senders' tensors, which
    /// nobody writes to any more.
    fn exchange(&self, tensor: Tensor) -> Result<Vec<Tensor>, CommError> {
        let hub = &*self.hub;
        let number = self.round.get();
        let index = (number % 2) as usize;
        self.round.set(number + 1);
        let mut state = hub.lock();
        let round = &mut state.rounds[index];
        round.tensors[self.rank] = Some(tensor);
        round.arrived += 1;
        let size = hub.members.ranks.len();
        if round.arrived == size {
            hub.news.notify_all();
        }
        let mut state = hub
            .wait(state, hub.timeout, |state| {
                state.rounds[index].arrived == size
            })
            .map_err(|timeout| {
                let late = timeout.rounds[index]
                    .tensors
                    .iter()
                    .position(Option::is_none);
                drop(timeout);
                hub.late(late.unwrap_or(self.rank), hub.timeout)
            })??;
        let round = &mut state.rounds[index];
        let all = round.tensors.iter().flatten().map(Tensor::shallow_clone);
        let all = all.collect();
        round.left += 1;
        if round.left == size {
            // Last out: the place is free for the exchange after the next.
            round.tensors.fill_with(|| None);
            (round.arrived, round.left) = (0, 0);
        }
        Ok(all)
    }
}

impl Hub {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that holds the lock panics.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `ready`. The outer error is a timeout; the inner one another rank's failure.
    fn wait<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        timeout: Duration,
        ready: impl Fn(&State) -> bool,
    ) -> Result<Result<MutexGuard<'a, State>, CommError>, MutexGuard<'a, State>> {
        for _ in 0..LOOKS {
            if ready(&state) {
                return Ok(Ok(state));
            }
            drop(state);
            std::thread::yield_now();
            state = self.lock();
        }
        let deadline = Instant::now() + timeout;
        while !ready(&state) {
            if let Err(failure) = self.health.check() {
                return Ok(Err(failure));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(state);
            }
            let woken = self.news.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(Ok(state))
    }

    fn late(&self, member: usize, waited: Duration) -> CommError {
        let what = format!("sent nothing for {} s", waited.as_secs_f32());
        self.health.fail(self.error(member, what))
    }

    fn error(&self, member: usize, what: String) -> CommError {
        self.members.error(member, what)
    }

    fn check_peer(&self, rank: usize, peer: usize) -> Result<(), CommError> {
        match peer < self.members.ranks.len() && peer != rank {
            true => Ok(()),
            false => Err(self.error(rank, format!("cannot exchange with rank {peer}"))),
        }
    }
}

impl Collective for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.hub.members.ranks.len()
    }

    fn all_reduce_sum(&self, tensor: Tensor) -> Result<Tensor, CommError> {
        if self.hub.members.ranks.len() == 1 {
            return Ok(tensor);
        }
        Ok(sum_in_order(&self.exchange(tensor)?))
    }

    fn all_gather(&self, tensor: Tensor) -> Result<Tensor, CommError> {
        Ok(Tensor::cat(&self.exchange(tensor)?, -1))
    }

    fn gather(&self, tensor: Tensor, root: usize) -> Result<Option<Tensor>, CommError> {
        let all = self.exchange(tensor)?;
        Ok((self.rank == root).then(|| Tensor::cat(&all, -1)))
    }

    fn broadcast(&self, tensor: Tensor, root: usize) -> Result<Tensor, CommError> {
        let all = self.exchange(tensor)?;
        // A copy each: what a collective returns may be written to.
        all.get(root).map(Tensor::copy).ok_or_else(|| {
            let what = format!("there is no rank {root} to broadcast");
            self.hub.error(self.rank, what)
        })
    }

    fn send(&self, tensor: &Tensor, to: usize) -> Result<(), CommError> {
        self.hub.check_peer(self.rank, to)?;
        self.hub.health.check()?;
        let mut state = self.hub.lock();
        let letters = state.mail.entry((self.rank, to)).or_default();
        letters.push_back(tensor.copy());
        self.hub.news.notify_all();
        Ok(())
    }

    fn recv(&self, _like: &Tensor, from: usize) -> Result<Tensor, CommError> {
        let hub = &*self.hub;
        hub.check_peer(self.rank, from)?;
        let key = (from, self.rank);
        let waiting = |state: &State| state.mail.get(&key).is_some_and(|m| !m.is_empty());
        let patience = match from < self.rank {
            true => patience(hub.timeout, self.rank),
            false => hub.timeout,
        };
        let mut state = hub.wait(hub.lock(), patience, waiting).map_err(|state| {
            drop(state);
            hub.late(from, patience)
        })??;
        let letter = state.mail.get_mut(&key).and_then(VecDeque::pop_front);
        letter.ok_or_else(|| hub.late(from, patience))
    }
}
