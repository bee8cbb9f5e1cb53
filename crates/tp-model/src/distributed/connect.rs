//! How the processes of a group find each other: three connections from each to rank 0, and one
//! between any other two.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use super::launch::{Launcher, Rendezvous, random_secret};
use super::store::Store;
use super::wire::{self, Tag};
use crate::comm::CommError;

/// How long a stranger may take to say who it is.
const HELLO_TIMEOUT: Duration = Duration::from_secs(2);
const MAX_HELLO: usize = 1024;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Purpose {
    /// Plans.
    Control,
    /// Signs of life.
    Monitor,
    /// Tensors.
    Data,
}

const PURPOSES: [Purpose; 3] = [Purpose::Control, Purpose::Monitor, Purpose::Data];

/// Connections by purpose and rank.
pub(super) type Connections = BTreeMap<(Purpose, usize), TcpStream>;

struct Rendezvoused<'a> {
    launcher: &'a Launcher,
    secret: String,
    deadline: Instant,
    timeout: Duration,
}

/// Connects this process with all others, within `timeout`.
pub(super) fn connect(launcher: &Launcher, timeout: Duration) -> Result<Connections, CommError> {
    let deadline = Instant::now() + timeout;
    match launcher.rank {
        0 => lead(launcher, deadline, timeout),
        _ => join(launcher, deadline, timeout),
    }
}

/// Rank 0: listens where all can know, and tells the others of each other.
fn lead(
    launcher: &Launcher,
    deadline: Instant,
    timeout: Duration,
) -> Result<Connections, CommError> {
    let mine = |what: String| launcher.error(0, what);
    let (listener, secret) = match &launcher.rendezvous {
        Rendezvous::Secret(secret) => {
            let listener = listen(launcher, launcher.master_port).map_err(mine)?;
            (listener, secret.clone())
        }
        Rendezvous::Store { prefix } => {
            let listener = listen(launcher, 0).map_err(mine)?;
            let secret = random_secret().map_err(|e| mine(format!("/dev/urandom: {e}")))?;
            let port = listener
                .local_addr()
                .map_err(|e| mine(e.to_string()))?
                .port();
            let publish = || {
                let mut store = Store::new(launcher.reach_master(deadline)?)?;
                store.set(&format!("{prefix}port"), port.to_string().as_bytes())?;
                store.set(&format!("{prefix}secret"), secret.as_bytes())
            };
            publish().map_err(|e: io::Error| mine(format!("the launcher's store: {e}")))?;
            (listener, secret)
        }
    };
    let meeting = Rendezvoused {
        launcher,
        secret,
        deadline,
        timeout,
    };
    let others = 1..launcher.world_size;
    let all = others.clone().flat_map(|rank| PURPOSES.map(|p| (p, rank)));
    let connections = meeting.accept(&listener, all.collect())?;
    let control = |rank| &connections[&(Purpose::Control, rank)];
    let mut table = Vec::new();
    for rank in others.clone() {
        let address = wire::expect(control(rank), Tag::Addresses);
        let address = address.map_err(|e| meeting.broken(rank, &e))?;
        table.push(String::from_utf8_lossy(&address).into_owned());
    }
    for rank in others {
        let sent = wire::write(control(rank), Tag::Addresses, table.join("\n").as_bytes());
        sent.map_err(|e| meeting.broken(rank, &e))?;
    }
    Ok(connections)
}

/// The other ranks.
fn join(
    launcher: &Launcher,
    deadline: Instant,
    timeout: Duration,
) -> Result<Connections, CommError> {
    let mine = |what: String| launcher.error(launcher.rank, what);
    let (port, secret) = match &launcher.rendezvous {
        Rendezvous::Secret(secret) => (launcher.master_port, secret.clone()),
        Rendezvous::Store { prefix } => {
            let ask = || {
                let mut store = Store::new(launcher.reach_master(deadline)?)?;
                let mut text = |key| {
                    let value = store.wait(&format!("{prefix}{key}"))?;
                    String::from_utf8(value).map_err(io::Error::other)
                };
                let port = text("port")?.parse().map_err(io::Error::other)?;
                Ok((port, text("secret")?))
            };
            ask().map_err(|e: io::Error| {
                mine(format!(
                    "the launcher's store does not say where rank 0 is: {e}"
                ))
            })?
        }
    };
    let meeting = Rendezvoused {
        launcher,
        secret,
        deadline,
        timeout,
    };
    let mut connections = Connections::new();
    let rank_0 = launcher
        .resolve(port)
        .map_err(|e| mine(format!("{}: {e}", launcher.master_addr)))?;
    for purpose in PURPOSES {
        connections.insert((purpose, 0), meeting.call(0, rank_0, purpose)?);
    }
    let control = &connections[&(Purpose::Control, 0)];
    let own = control.local_addr().and_then(|address| {
        // Where rank 0's answers arrive, the others' will, too.
        let listener = TcpListener::bind((address.ip(), 0))?;
        let address = listener.local_addr()?;
        wire::write(control, Tag::Addresses, address.to_string().as_bytes())?;
        Ok(listener)
    });
    let listener = own.map_err(|e| meeting.broken(0, &e))?;
    let table = wire::expect(control, Tag::Addresses).map_err(|e| {
        let hint = "; all ranks need the same secret and different values of RANK";
        let mut error = meeting.broken(0, &e);
        error.what.push_str(hint);
        error
    })?;
    let table = String::from_utf8_lossy(&table).into_owned();
    for (rank, address) in (1..launcher.rank).zip(table.lines()) {
        let address = address
            .parse()
            .map_err(|_| launcher.error(0, format!("told of address `{address}`")))?;
        let stream = meeting.call(rank, address, Purpose::Data)?;
        connections.insert((Purpose::Data, rank), stream);
    }
    let later = (launcher.rank + 1..launcher.world_size).map(|rank| (Purpose::Data, rank));
    connections.extend(meeting.accept(&listener, later.collect())?);
    Ok(connections)
}

impl Rendezvoused<'_> {
    /// Takes the connections that are `due`, and no others.
    fn accept(
        &self,
        listener: &TcpListener,
        mut due: Vec<(Purpose, usize)>,
    ) -> Result<Connections, CommError> {
        let mine = |e: io::Error| self.launcher.error(self.launcher.rank, e.to_string());
        listener.set_nonblocking(true).map_err(mine)?;
        let mut connections = Connections::new();
        while let Some((_, missing)) = due.first() {
            if Instant::now() > self.deadline {
                let what = format!("did not connect within {} s", self.timeout.as_secs_f32());
                return Err(self.launcher.error(*missing, what));
            }
            let Ok((stream, from)) = listener.accept() else {
                std::thread::sleep(Duration::from_millis(5));
                continue;
            };
            // Anybody can connect: whoever does not know the secret is sent away.
            let Some(who) = self.introduced(&stream) else {
                tracing::warn!(%from, "a connection from somebody who is no rank of this group");
                continue;
            };
            let Some(at) = due.iter().position(|one| *one == who) else {
                let what = "is there twice, or beyond the world size".to_owned();
                return Err(self.launcher.error(who.1, what));
            };
            due.swap_remove(at);
            self.prepare(&stream).map_err(mine)?;
            connections.insert(who, stream);
        }
        Ok(connections)
    }

    /// Who is calling.
    fn introduced(&self, stream: &TcpStream) -> Option<(Purpose, usize)> {
        stream.set_nonblocking(false).ok()?;
        stream.set_read_timeout(Some(HELLO_TIMEOUT)).ok()?;
        let (tag, hello) = wire::read_short(stream, MAX_HELLO).ok()?;
        let hello = String::from_utf8(hello).ok()?;
        let mut lines = hello.lines();
        let (secret, rank, purpose) = (lines.next()?, lines.next()?, lines.next()?);
        let purpose = PURPOSES.get(purpose.parse::<usize>().ok()?)?;
        (tag == Tag::Hello && same(secret.as_bytes(), self.secret.as_bytes()))
            .then_some((*purpose, rank.parse().ok()?))
    }

    fn call(
        &self,
        rank: usize,
        address: SocketAddr,
        purpose: Purpose,
    ) -> Result<TcpStream, CommError> {
        let hello = format!(
            "{}\n{}\n{}",
            self.secret, self.launcher.rank, purpose as usize
        );
        let greet = |stream: TcpStream| {
            self.prepare(&stream)?;
            wire::write(&stream, Tag::Hello, hello.as_bytes())?;
            Ok(stream)
        };
        reach(address, self.deadline).and_then(greet).map_err(|e| {
            self.launcher
                .error(rank, format!("cannot be reached at {address}: {e}"))
        })
    }

    fn prepare(&self, stream: &TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(self.timeout))?;
        stream.set_write_timeout(Some(self.timeout))
    }

    fn broken(&self, rank: usize, error: &io::Error) -> CommError {
        self.launcher
            .error(rank, crate::comm::explain(error, self.timeout))
    }
}

impl Launcher {
    pub(super) fn error(&self, rank: usize, what: String) -> CommError {
        CommError {
            rank,
            world_size: self.world_size,
            what,
        }
    }

    fn resolve(&self, port: u16) -> io::Result<SocketAddr> {
        let mut found = (self.master_addr.as_str(), port).to_socket_addrs()?;
        let addresses: Vec<_> = found.by_ref().collect();
        let v4 = addresses.iter().find(|address| address.is_ipv4());
        v4.or(addresses.first())
            .copied()
            .ok_or_else(|| io::Error::other("the name has no address"))
    }

    fn reach_master(&self, deadline: Instant) -> io::Result<TcpStream> {
        let stream = reach(self.resolve(self.master_port)?, deadline)?;
        let left = deadline.saturating_duration_since(Instant::now());
        stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        Ok(stream)
    }
}

/// Listens for ranks of this machine only, or of all.
fn listen(launcher: &Launcher, port: u16) -> Result<TcpListener, String> {
    let tell = |e: io::Error| format!("cannot listen at {}:{port}: {e}", launcher.master_addr);
    let any: IpAddr = match launcher.resolve(port).map_err(tell)?.ip() {
        ip if ip.is_loopback() => ip,
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    TcpListener::bind((any, port)).map_err(tell)
}

/// Connects to somebody who may not listen yet.
fn reach(address: SocketAddr, deadline: Instant) -> io::Result<TcpStream> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match TcpStream::connect_timeout(&address, left.max(Duration::from_millis(1))) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Compares in a time that does not tell where the difference is.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |diff, (a, b)| diff | (a ^ b)) == 0
}
