use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::Path;

/// How a range of a file is going to be used; see `madvise(2)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// It will be read front to back: read ahead aggressively.
    Sequential,
    /// It will be read soon: start reading it now.
    WillNeed,
    /// It is not needed any more: drop it from this process. Reading it again is still valid.
    DontNeed,
}

/// A read-only mapping of a whole file.
///
/// The file must not be truncated while it is mapped: reading past its new end would stop the
/// process (`SIGBUS`). Checkpoints are written once and replaced by renaming, which is fine.
#[derive(Debug)]
pub struct Mmap(memmap2::Mmap);

impl Mmap {
    /// Maps the file at `path`. An empty file gives an empty mapping.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: the mapping is private to this value and only read. That nobody truncates the
        // file is the documented contract; a concurrent write shows as other bytes, which every
        // reader of a checkpoint has to expect anyway.
        let map = unsafe { memmap2::Mmap::map(&file)? };
        Ok(Self(map))
    }

    /// Advises the system on how the bytes of `range` will be used. Out-of-range parts are
    /// ignored; systems without `madvise` ignore all of it.
    pub fn advise(&self, range: std::ops::Range<usize>, advice: Advice) -> io::Result<()> {
        let end = range.end.min(self.0.len());
        let (from, len) = (range.start.min(end), end.saturating_sub(range.start));
        if len == 0 {
            return Ok(());
        }
        #[cfg(unix)]
        match advice {
            Advice::Sequential => self.0.advise_range(memmap2::Advice::Sequential, from, len),
            Advice::WillNeed => self.0.advise_range(memmap2::Advice::WillNeed, from, len),
            // SAFETY: the mapping is backed by a file and never written, so dropped pages come
            // back with the same bytes.
            Advice::DontNeed => unsafe {
                self.0
                    .unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, from, len)
            },
        }
        #[cfg(not(unix))]
        {
            let _ = (advice, from);
            Ok(())
        }
    }
}

impl Deref for Mmap {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_survive_every_advice() {
        let path = std::env::temp_dir().join(format!("torch-ext-mmap-{}", std::process::id()));
        let bytes: Vec<u8> = (0..100_003u32).map(|i| (i * 31) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let map = Mmap::open(&path).unwrap();
        for advice in [Advice::Sequential, Advice::WillNeed, Advice::DontNeed] {
            map.advise(0..map.len(), advice).unwrap();
            map.advise(5_000..usize::MAX, advice).unwrap();
            map.advise(200_000..300_000, advice).unwrap();
            assert_eq!(&map[..], &bytes[..]);
        }
        std::fs::write(&path, b"").unwrap();
        assert!(Mmap::open(&path).unwrap().is_empty());
        std::fs::remove_file(&path).unwrap();
        assert_eq!(
            Mmap::open(&path).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
    }
}
