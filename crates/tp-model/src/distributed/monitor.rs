//! Signs of life between rank 0 and each other rank, on threads and connections of their own: a
//! process that is gone or stopped is noticed whatever the others are doing.

use std::io;
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

use super::wire::{self, Tag};
use crate::comm::{CommError, Health, explain};

const MAX_PAYLOAD: usize = 64 << 10;

/// What a monitor knows.
pub(super) struct Watch {
    /// The rank at the other end.
    pub(super) peer: usize,
    pub(super) world_size: usize,
    pub(super) timeout: Duration,
    pub(super) health: Health,
}

impl Watch {
    /// How often rank 0 asks. With [`Watch::patience`] it stays well below the timeout, so that a
    /// rank that stops is named before those that wait for it run out of time and blame others.
    fn interval(&self) -> Duration {
        (self.timeout / 8).min(Duration::from_secs(5))
    }

    fn patience(&self) -> Duration {
        self.timeout * 5 / 8
    }

    /// Starts to watch over `stream`. Rank 0 asks, the others answer.
    pub(super) fn start(self, stream: TcpStream) -> io::Result<()> {
        stream.set_read_timeout(Some(self.patience()))?;
        stream.set_write_timeout(Some(self.patience()))?;
        let line = stream.try_clone()?;
        self.health.on_failure(move |failure| {
            // A line that is broken too has nobody at its end to tell.
            let _ = wire::write(&line, Tag::Failed, &encode(failure));
        });
        let name = format!("watch-rank-{}", self.peer);
        thread::Builder::new().name(name).spawn(move || {
            let end = match self.peer {
                0 => self.answer(&stream),
                _ => self.ask(&stream),
            };
            match end {
                Ok(Some(failure)) => drop(self.health.fail(failure)),
                Ok(None) => {}
                Err(_) if self.health.is_closed() => {}
                Err(error) => {
                    self.health.fail(CommError {
                        rank: self.peer,
                        world_size: self.world_size,
                        what: explain(&error, self.patience()),
                    });
                }
            }
        })?;
        Ok(())
    }

    /// `None` at the end of the work; a failure that the other end tells of.
    fn ask(&self, stream: &TcpStream) -> io::Result<Option<CommError>> {
        let mut asked = false;
        loop {
            if !asked {
                wire::write(stream, Tag::Ping, &[])?;
            }
            // Until the next question, or news that nobody asked for.
            match wire::read_short(stream, MAX_PAYLOAD)? {
                (Tag::Failed, text) => return Ok(Some(decode(&text, self.world_size))),
                (Tag::Pong, _) => {}
                (tag, _) => return Err(io::Error::other(format!("{tag:?} on a monitor's line"))),
            }
            stream.set_read_timeout(Some(self.interval()))?;
            let news = stream.peek(&mut [0]);
            stream.set_read_timeout(Some(self.patience()))?;
            if self.health.is_closed() || self.health.failure().is_some() {
                return Ok(None);
            }
            asked = news.is_ok();
        }
    }

    fn answer(&self, stream: &TcpStream) -> io::Result<Option<CommError>> {
        loop {
            match wire::read_short(stream, MAX_PAYLOAD)? {
                (Tag::Failed, text) => return Ok(Some(decode(&text, self.world_size))),
                (Tag::Bye, _) => return Ok(None),
                (Tag::Ping, _) => wire::write(stream, Tag::Pong, &[])?,
                (tag, _) => return Err(io::Error::other(format!("{tag:?} on a monitor's line"))),
            }
        }
    }
}

fn encode(failure: &CommError) -> Vec<u8> {
    let mut text = format!("{}\n{}", failure.rank, failure.what).into_bytes();
    text.truncate(MAX_PAYLOAD);
    text
}

fn decode(text: &[u8], world_size: usize) -> CommError {
    let text = String::from_utf8_lossy(text);
    let (rank, what) = text.split_once('\n').unwrap_or(("0", &text));
    CommError {
        rank: rank.parse().unwrap_or(0),
        world_size,
        what: what.to_owned(),
    }
}
