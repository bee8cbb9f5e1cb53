//! Frames on the connections between processes: a length, a tag and a payload.

use std::io::{self, Read, Write};
use std::net::TcpStream;

/// Longest payload: a step's plan with millions of tokens.
const MAX_PAYLOAD: usize = 256 << 20;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Tag {
    /// First on each connection: secret, rank and purpose.
    Hello = 1,
    /// A listener's address, or rank 0's table of them.
    Addresses,
    /// What a rank is about to load.
    Fingerprint,
    /// A rank may go on.
    Agreed,
    /// Sizes of the runner, as 64-bit numbers.
    Config,
    /// A rank has its model and its cache.
    Ready,
    /// A step.
    Step,
    /// The end, with rank 0's exit code.
    Bye,
    /// Are you there?
    Ping,
    /// I am.
    Pong,
    /// A rank, and why it failed.
    Failed,
    /// What a step came to, from the rank that samples.
    Output,
    /// A rank has its model; how many bytes it has for its cache.
    Loaded,
    /// Run the largest steps of a runner of these sizes.
    Measure,
    /// What that takes, as 64-bit numbers.
    Measured,
}

const TAGS: [Tag; 15] = [
    Tag::Hello,
    Tag::Addresses,
    Tag::Fingerprint,
    Tag::Agreed,
    Tag::Config,
    Tag::Ready,
    Tag::Step,
    Tag::Bye,
    Tag::Ping,
    Tag::Pong,
    Tag::Failed,
    Tag::Output,
    Tag::Loaded,
    Tag::Measure,
    Tag::Measured,
];

/// Writes one frame.
pub(super) fn write(mut stream: &TcpStream, tag: Tag, payload: &[u8]) -> io::Result<()> {
    let length = u32::try_from(payload.len())
        .ok()
        .filter(|_| payload.len() <= MAX_PAYLOAD)
        .ok_or_else(|| io::Error::other(format!("a message of {} bytes", payload.len())))?;
    let mut frame = Vec::with_capacity(payload.len() + 5);
    frame.extend(length.to_le_bytes());
    frame.push(tag as u8);
    frame.extend(payload);
    stream.write_all(&frame)
}

/// Reads one frame of at most `most` bytes.
pub(super) fn read_short(mut stream: &TcpStream, most: usize) -> io::Result<(Tag, Vec<u8>)> {
    let mut head = [0; 5];
    stream.read_exact(&mut head)?;
    let [length @ .., tag] = head;
    let length = u32::from_le_bytes(length) as usize;
    let tag = TAGS.into_iter().find(|known| *known as u8 == tag);
    let (Some(tag), true) = (tag, length <= most) else {
        return Err(io::Error::other("a message that no rank sends"));
    };
    let mut payload = vec![0; length];
    stream.read_exact(&mut payload)?;
    Ok((tag, payload))
}

/// Reads one frame.
pub(super) fn read(stream: &TcpStream) -> io::Result<(Tag, Vec<u8>)> {
    read_short(stream, MAX_PAYLOAD)
}

/// Reads one frame, which must have this tag.
pub(super) fn expect(stream: &TcpStream, tag: Tag) -> io::Result<Vec<u8>> {
    match read(stream)? {
        (found, payload) if found == tag => Ok(payload),
        (found, _) => Err(io::Error::other(format!("{found:?} where {tag:?} was due"))),
    }
}
