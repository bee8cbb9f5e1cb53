//! The two files: opened before the model is loaded, so that a wrong path costs no minutes.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::Path;
use std::sync::mpsc::{Receiver, sync_channel};

use anyhow::{Context, bail};

/// Longest line that is read. A longer one gets an error, whatever it holds.
const MAX_LINE_BYTES: u64 = 64 << 20;
/// Lines that are read ahead of the engine.
const LINES_AHEAD: usize = 16;

/// One line of the input that is not blank.
pub struct InputLine {
    /// Counted from 1, blank lines included.
    pub number: u64,
    /// Without the newline; `Err` holds how many bytes are allowed, and that it had more.
    pub bytes: Result<Vec<u8>, u64>,
}

/// Opens the input; `-` is standard input.
pub fn open_input(path: &str) -> anyhow::Result<Box<dyn BufRead + Send>> {
    if path == "-" {
        return Ok(Box::new(BufReader::new(io::stdin())));
    }
    let context = || format!("cannot read {path}");
    let file = File::open(path).with_context(context)?;
    if file.metadata().with_context(context)?.is_dir() {
        return Err(io::Error::from(io::ErrorKind::IsADirectory)).with_context(context);
    }
    Ok(Box::new(BufReader::new(file)))
}

/// Where answers go. What an earlier run left there is kept until [`Output::start`], so that a
/// run that cannot start destroys nothing.
pub enum Output {
    /// Standard output.
    Stdout,
    /// A file, and its name for errors.
    File(File),
}

impl Output {
    /// Opens the output; `-` is standard output. The input's own file is refused.
    pub fn open(path: &str, input: &str) -> anyhow::Result<Self> {
        if path == "-" {
            return Ok(Self::Stdout);
        }
        let same = Path::new(path).is_file()
            && input != "-"
            && fs::canonicalize(path).ok() == fs::canonicalize(input).ok();
        if same {
            bail!("{path} is both input and output; name another output file");
        }
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false);
        let file = options.open(path);
        Ok(Self::File(
            file.with_context(|| format!("cannot write {path}"))?,
        ))
    }

    /// Empties the file and gives what to write to.
    pub fn start(self) -> io::Result<Box<dyn Write>> {
        match self {
            Self::Stdout => Ok(Box::new(io::stdout().lock())),
            Self::File(file) => {
                // Pipes and devices have no length.
                if file.metadata()?.is_file() {
                    file.set_len(0)?;
                }
                Ok(Box::new(file))
            }
        }
    }
}

/// Reads lines on a thread of its own: an input that is slow to come, such as a pipe, must not
/// hold up the requests that are in the engine. The channel closes at the end of the input.
pub fn read_ahead(mut input: Box<dyn BufRead + Send>) -> Receiver<io::Result<InputLine>> {
    let (sender, receiver) = sync_channel(LINES_AHEAD);
    std::thread::spawn(move || {
        let mut number = 0;
        loop {
            let line = match read_line(&mut *input, MAX_LINE_BYTES) {
                Ok(None) => return,
                Ok(Some(bytes)) => {
                    number += 1;
                    if bytes.as_ref().is_ok_and(|b| b.trim_ascii().is_empty()) {
                        continue;
                    }
                    Ok(InputLine { number, bytes })
                }
                Err(error) => Err(error),
            };
            let last = line.is_err();
            // A closed channel: the run has ended early.
            if sender.send(line).is_err() || last {
                return;
            }
        }
    });
    receiver
}

/// The next line without its newline; `None` at the end, `Err(limit)` for a line of more than
/// `limit` bytes, which is skipped.
fn read_line(input: &mut dyn BufRead, limit: u64) -> io::Result<Option<Result<Vec<u8>, u64>>> {
    let mut line = Vec::new();
    let mut read = input.take(limit + 1).read_until(b'\n', &mut line)?;
    if read == 0 {
        return Ok(None);
    }
    if line.last() == Some(&b'\n') {
        line.pop();
        return Ok(Some(Ok(line)));
    }
    if line.len() as u64 <= limit {
        return Ok(Some(Ok(line)));
    }
    while read > 0 && line.last() != Some(&b'\n') {
        line.clear();
        read = input.take(1 << 20).read_until(b'\n', &mut line)?;
    }
    Ok(Some(Err(limit)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_end_at_newlines_and_long_ones_are_skipped() {
        let mut input: &[u8] = b"12345\n\n123456\nab\n1234567";
        let mut next = || read_line(&mut input, 5).unwrap();
        assert_eq!(next(), Some(Ok(b"12345".to_vec())));
        assert_eq!(next(), Some(Ok(Vec::new())));
        assert_eq!(next(), Some(Err(5)));
        assert_eq!(next(), Some(Ok(b"ab".to_vec())));
        assert_eq!(next(), Some(Err(5)));
        assert_eq!(next(), None);
        assert_eq!(
            read_line(&mut &b"12345"[..], 5).unwrap(),
            Some(Ok(b"12345".to_vec()))
        );
    }

    #[test]
    fn blank_lines_count_but_are_not_handed_out() {
        let lines: Vec<_> = read_ahead(Box::new(&b"a\n\n \r\nb\n\nc"[..]))
            .iter()
            .map(|line| line.unwrap())
            .map(|line| (line.number, line.bytes.unwrap()))
            .collect();
        let expected = [(1, "a"), (4, "b"), (6, "c")].map(|(n, b)| (n, b.as_bytes().to_vec()));
        assert_eq!(lines, expected);
    }
}
