//! A checkpoint in a temporary folder that a test may break, and the tools to break it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Map, Value};
use tp_model::{DtypeChoice, LoadOptions, Model};

/// Weights in one file.
pub const SINGLE: &str = "llama-yarn";
/// Weights in several files with an index.
pub const SHARDED: &str = "qwen3-headdim";

/// A copy of a good fixture; its folder goes when it is dropped.
pub struct Scratch {
    folder: PathBuf,
}

impl Scratch {
    /// Copies a fixture.
    pub fn of(fixture: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let folder =
            std::env::temp_dir().join(format!("tp-model-broken-{}-{number}", std::process::id()));
        fs::create_dir_all(&folder).expect("temporary folder");
        let scratch = Self { folder };
        let from = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fixtures")
            .join(fixture);
        for entry in fs::read_dir(&from).expect("fixture") {
            let path = entry.expect("entry").path();
            let name = path
                .file_name()
                .expect("name")
                .to_string_lossy()
                .into_owned();
            if !name.starts_with("golden") {
                fs::copy(&path, scratch.path(&name)).expect("copy");
            }
        }
        scratch
    }

    /// Path of a file in the folder.
    pub fn path(&self, file: &str) -> PathBuf {
        self.folder.join(file)
    }

    /// Loads what is there now.
    pub fn load(&self) -> Result<Model, String> {
        let options = LoadOptions {
            dtype: DtypeChoice::Float32,
            ..LoadOptions::default()
        };
        Model::load(&self.folder, &options).map_err(|e| e.to_string())
    }

    /// Asserts that loading fails with one line of text that holds every one of `parts`.
    pub fn refused(&self, what: &str, parts: &[&str]) {
        let text = match self.load() {
            Ok(_) => panic!("{what}: loaded as if nothing were wrong"),
            Err(text) => text,
        };
        assert_eq!(
            text.lines().count(),
            1,
            "{what}: more than one line: {text}"
        );
        for part in parts {
            assert!(text.contains(part), "{what}: `{part}` is not in: {text}");
        }
        assert!(
            text.contains(&*self.folder.to_string_lossy()),
            "{what}: no path in: {text}"
        );
    }

    pub fn remove(&self, file: &str) {
        fs::remove_file(self.path(file)).expect("remove");
    }

    pub fn read(&self, file: &str) -> Vec<u8> {
        fs::read(self.path(file)).expect("read")
    }

    pub fn write(&self, file: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.path(file), bytes).expect("write");
    }

    /// Keeps the first `length` bytes.
    pub fn truncate(&self, file: &str, length: usize) {
        let bytes = self.read(file);
        assert!(length < bytes.len(), "nothing to cut");
        self.write(file, &bytes[..length]);
    }

    /// Changes a JSON object in place.
    pub fn edit_json(&self, file: &str, edit: impl FnOnce(&mut Map<String, Value>)) {
        let mut map = serde_json::from_slice(&self.read(file)).expect("a JSON object");
        edit(&mut map);
        self.write(file, serde_json::to_vec(&map).expect("serializes"));
    }

    /// Changes the header of a safetensors file and leaves its data alone.
    pub fn edit_header(&self, file: &str, edit: impl FnOnce(&mut Map<String, Value>)) {
        let bytes = self.read(file);
        let end = header_end(&bytes);
        let mut map = serde_json::from_slice(&bytes[8..end]).expect("a header");
        edit(&mut map);
        let header = serde_json::to_vec(&map).expect("serializes");
        let mut out = (header.len() as u64).to_le_bytes().to_vec();
        out.extend(header);
        out.extend(&bytes[end..]);
        self.write(file, out);
    }

    /// The shard that the index names for a tensor.
    pub fn shard_of(&self, tensor: &str) -> String {
        let index: Value =
            serde_json::from_slice(&self.read("model.safetensors.index.json")).expect("index");
        index["weight_map"][tensor]
            .as_str()
            .expect("mapped")
            .to_owned()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A folder that stays behind in the temporary directory is no reason to fail a test.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Where a safetensors file's header ends and its data begins.
pub fn header_end(bytes: &[u8]) -> usize {
    let length: [u8; 8] = bytes[..8].try_into().expect("eight bytes");
    8 + u64::from_le_bytes(length) as usize
}
