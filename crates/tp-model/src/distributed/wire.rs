//! Frames on the connections between processes: a length, a tag and a payload.

use std::io::{self, Read, Write};
use std::net::TcpStream;

/// Longest frame. A longer message goes as several: log-probabilities of a prompt, of every token of
/// the vocabulary at each position, take gigabytes. Short in tests, so that they have such messages.
const MAX_FRAME: usize = if cfg!(test) { 1 << 16 } else { 256 << 20 };

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
    /// Goes on in the next frame.
    Part,
}

const TAGS: [Tag; 16] = [
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
    Tag::Part,
];

/// Writes a message: one frame, if it is not too long for one.
pub(super) fn write(stream: &TcpStream, tag: Tag, payload: &[u8]) -> io::Result<()> {
    // The last part has the message's tag, and is not empty unless the message is.
    let before = payload.len().saturating_sub(1) / MAX_FRAME * MAX_FRAME;
    let (parts, last) = payload.split_at(before);
    for part in parts.chunks(MAX_FRAME) {
        write_frame(stream, Tag::Part, part)?;
    }
    write_frame(stream, tag, last)
}

fn write_frame(mut stream: &TcpStream, tag: Tag, payload: &[u8]) -> io::Result<()> {
    let mut frame = Vec::with_capacity(payload.len() + 5);
    frame.extend((payload.len() as u32).to_le_bytes());
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

/// Reads a message.
pub(super) fn read(stream: &TcpStream) -> io::Result<(Tag, Vec<u8>)> {
    let (mut tag, mut payload) = read_short(stream, MAX_FRAME)?;
    while tag == Tag::Part {
        let part;
        (tag, part) = read_short(stream, MAX_FRAME)?;
        payload.extend(part);
    }
    Ok((tag, payload))
}

/// Reads a message, which must have this tag.
pub(super) fn expect(stream: &TcpStream, tag: Tag) -> io::Result<Vec<u8>> {
    match read(stream)? {
        (found, payload) if found == tag => Ok(payload),
        (found, _) => Err(io::Error::other(format!("{found:?} where {tag:?} was due"))),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    #[test]
    fn long_messages_arrive_whole_and_in_order() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let here = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (there, _) = listener.accept().unwrap();
        const N: usize = MAX_FRAME;
        let sizes = [0, 1, N - 1, N, N + 1, 2 * N, 2 * N + 1, 9 * N + 5];
        let message = |size: usize| -> Vec<u8> { (0..size).map(|i| (i * 7 % 251) as u8).collect() };
        thread::scope(|scope| {
            scope.spawn(|| {
                for size in sizes {
                    write(&here, Tag::Output, &message(size)).unwrap();
                    write(&here, Tag::Ping, &[]).unwrap();
                }
                // A frame that says it is longer than any.
                let mut frame = (N as u32 + 1).to_le_bytes().to_vec();
                frame.push(Tag::Ping as u8);
                (&here).write_all(&frame).unwrap();
            });
            for size in sizes {
                assert!(
                    expect(&there, Tag::Output).unwrap() == message(size),
                    "{size}"
                );
                assert_eq!(read(&there).unwrap(), (Tag::Ping, Vec::new()));
            }
            assert!(read(&there).is_err());
        });
    }
}
