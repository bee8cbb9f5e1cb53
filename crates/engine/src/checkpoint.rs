//! The small files of a checkpoint, read from a directory or from memory.

use std::borrow::Cow;
use std::path::PathBuf;
use std::sync::Arc;

use serde::de::DeserializeOwned;

/// A checkpoint's files.
#[derive(Clone, Debug)]
pub enum Checkpoint {
    /// A directory in Hugging Face format.
    Directory(PathBuf),
    /// Files held in memory, as `(name, content)`.
    Memory(Arc<[(&'static str, &'static [u8])]>),
}

/// A checkpoint file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{file}: {message}")]
pub struct CheckpointError {
    /// The file, with its directory.
    pub file: String,
    /// What is wrong, and what was expected.
    pub message: String,
}

impl Checkpoint {
    /// The name under which errors report `file`.
    pub fn path_of(&self, file: &str) -> String {
        match self {
            Checkpoint::Directory(dir) => dir.join(file).display().to_string(),
            Checkpoint::Memory(_) => format!("<embedded>/{file}"),
        }
    }

    /// An error about `file`.
    pub fn error(&self, file: &str, message: impl std::fmt::Display) -> CheckpointError {
        CheckpointError {
            file: self.path_of(file),
            message: message.to_string(),
        }
    }

    /// A file's content; `None` if the checkpoint has no such file.
    pub fn read(&self, file: &str) -> Result<Option<Cow<'static, [u8]>>, CheckpointError> {
        match self {
            Checkpoint::Directory(dir) => match std::fs::read(dir.join(file)) {
                Ok(bytes) => Ok(Some(Cow::Owned(bytes))),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(self.error(file, error)),
            },
            Checkpoint::Memory(files) => Ok(files
                .iter()
                .find(|(name, _)| *name == file)
                .map(|(_, bytes)| Cow::Borrowed(*bytes))),
        }
    }

    /// A JSON file, deserialized; `None` if the checkpoint has no such file.
    pub fn read_json<T: DeserializeOwned>(&self, file: &str) -> Result<Option<T>, CheckpointError> {
        let Some(bytes) = self.read(file)? else {
            return Ok(None);
        };
        serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|error| self.error(file, format_args!("not valid: {error}")))
    }
}
