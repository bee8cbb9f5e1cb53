//! A client of the key-value store that torchrun's agent serves to its workers (c10d's `TCPStore`).

use std::io::{self, Read, Write};
use std::net::TcpStream;

const MAGIC: u32 = 0x3c85_f7ce;
const VALIDATE: u8 = 0;
const SET: u8 = 1;
const GET: u8 = 3;
const WAIT: u8 = 6;
const STOP_WAITING: u8 = 0;

/// Longest value that is taken: ours are addresses and secrets.
const MAX_VALUE: u64 = 1 << 16;

/// A connection to the store.
#[derive(Debug)]
pub(super) struct Store(TcpStream);

impl Store {
    /// Introduces itself on a fresh connection.
    pub(super) fn new(mut stream: TcpStream) -> io::Result<Self> {
        let mut hello = vec![VALIDATE];
        hello.extend(MAGIC.to_le_bytes());
        stream.write_all(&hello)?;
        Ok(Self(stream))
    }

    /// Sets a key; nobody answers.
    pub(super) fn set(&mut self, key: &str, value: &[u8]) -> io::Result<()> {
        let mut message = vec![SET];
        put(&mut message, key.as_bytes());
        put(&mut message, value);
        self.0.write_all(&message)
    }

    /// Waits for a key, for as long as the connection's timeout, and returns its value.
    pub(super) fn wait(&mut self, key: &str) -> io::Result<Vec<u8>> {
        let mut message = vec![WAIT];
        message.extend(1u64.to_le_bytes());
        put(&mut message, key.as_bytes());
        self.0.write_all(&message)?;
        let mut answer = [0];
        self.0.read_exact(&mut answer)?;
        if answer[0] != STOP_WAITING {
            return Err(io::Error::other(format!(
                "the store stopped waiting for {key}"
            )));
        }
        let mut message = vec![GET];
        put(&mut message, key.as_bytes());
        self.0.write_all(&message)?;
        let mut length = [0; 8];
        self.0.read_exact(&mut length)?;
        let length = u64::from_le_bytes(length);
        if length > MAX_VALUE {
            return Err(io::Error::other(format!("{length} bytes under {key}")));
        }
        let mut value = vec![0; length as usize];
        self.0.read_exact(&mut value)?;
        Ok(value)
    }
}

fn put(message: &mut Vec<u8>, bytes: &[u8]) {
    message.extend((bytes.len() as u64).to_le_bytes());
    message.extend(bytes);
}
