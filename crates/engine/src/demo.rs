//! The demo model, compiled into the program: a small chat model that needs no download.

use std::path::{Path, PathBuf};

use tp_model::Runner;

use crate::builder::BuildError;
use crate::config::EngineConfig;
use crate::engine::Engine;
use crate::ranks::{follow_in, tell};

/// The checkpoint's files, by name.
pub const FILES: [(&str, &[u8]); 6] = [
    (
        "config.json",
        include_bytes!("../../../models/demo/config.json"),
    ),
    (
        "generation_config.json",
        include_bytes!("../../../models/demo/generation_config.json"),
    ),
    (
        "tokenizer.json",
        include_bytes!("../../../models/demo/tokenizer.json"),
    ),
    (
        "tokenizer_config.json",
        include_bytes!("../../../models/demo/tokenizer_config.json"),
    ),
    (
        "chat_template.jinja",
        include_bytes!("../../../models/demo/chat_template.jinja"),
    ),
    (
        "model.safetensors",
        include_bytes!("../../../models/demo/model.safetensors"),
    ),
];

/// KV cache unless the configuration says otherwise: 16 sequences at full length in float32, and
/// quick to set up.
const CACHE_BYTES: u64 = 256 << 20;

/// An engine on the demo model; `config.model` is not looked at.
///
/// The weights go through a temporary folder, which is gone when this returns: on a disk of memory
/// that takes a few milliseconds, and the loader's checks see a checkpoint like any other.
pub fn engine(config: &EngineConfig) -> Result<Engine<Runner>, BuildError> {
    let mut config = config.clone();
    if config.num_gpu_blocks_override.is_none() {
        config.kv_cache_memory_bytes.get_or_insert(CACHE_BYTES);
    }
    let folder = unpack().map_err(|error| tell(&config, error))?;
    Engine::from_directory(&config, &folder.0, None)
}

/// As [`crate::follow`], for ranks of the demo model.
pub fn follow(config: &EngineConfig) -> Result<i32, BuildError> {
    let folder = unpack().map_err(|error| tell(config, error))?;
    follow_in(config, folder, None)
}

fn unpack() -> Result<Folder, BuildError> {
    let folder = Folder::create()?;
    for (name, bytes) in FILES {
        let path = folder.0.join(name);
        std::fs::write(&path, bytes).map_err(|source| BuildError::Io {
            what: format!("unpacking the demo model to {}", path.display()),
            source,
        })?;
    }
    Ok(folder)
}

/// A folder that is removed when dropped.
struct Folder(PathBuf);

impl Folder {
    fn create() -> Result<Self, BuildError> {
        let base = std::env::temp_dir();
        // Creating fails if the name is taken, by another process or by somebody who guessed it.
        for attempt in 0..1000 {
            let path = base.join(format!("nano-vllm-demo-{}-{attempt}", std::process::id()));
            match std::fs::create_dir(&path) {
                Ok(()) => return Ok(Folder(path)),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(source) => {
                    return Err(BuildError::Io {
                        what: format!("creating {}", path.display()),
                        source,
                    });
                }
            }
        }
        Err(BuildError::Io {
            what: format!("unpacking the demo model to {}", base.display()),
            source: std::io::ErrorKind::AlreadyExists.into(),
        })
    }
}

impl AsRef<Path> for Folder {
    fn as_ref(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What cannot be removed is the operating system's to clean up.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
