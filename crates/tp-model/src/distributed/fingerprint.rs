//! What ranks must have in common.

use std::fs::File;
use std::hash::{DefaultHasher, Hasher};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use crate::options::LoadOptions;
use crate::parallel::ParallelConfig;

/// How much of each file is compared, at as many places: enough to tell checkpoints apart without
/// reading them.
const SAMPLES: u64 = 32;
const SAMPLE_BYTES: usize = 4096;

/// Named values. Those of all ranks must be equal.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Fingerprint(Vec<(&'static str, String)>);

impl Fingerprint {
    pub(super) fn new(dir: &Path, options: &LoadOptions<'_>, parallel: &ParallelConfig) -> Self {
        let model = match digest(dir) {
            Ok(digest) => format!("{digest:016x}"),
            // Loading will say what is wrong; the others must not agree to nothing.
            Err(error) => format!("unreadable ({error})"),
        };
        Self(vec![
            ("version", env!("CARGO_PKG_VERSION").to_owned()),
            (
                "tensor_parallel_size",
                parallel.tensor_parallel_size.to_string(),
            ),
            (
                "pipeline_parallel_size",
                parallel.pipeline_parallel_size.to_string(),
            ),
            (
                "pp_layer_partition",
                match &parallel.pp_layer_partition {
                    None => "none".to_owned(),
                    Some(partition) => format!("{partition:?}"),
                },
            ),
            ("model", model),
            ("dtype", format!("{:?}", options.dtype)),
            ("load format", format!("{:?}", options.format)),
            ("backend", format!("{:?}", options.backend)),
            ("deterministic", options.deterministic.to_string()),
            ("device", device_kind(options)),
        ])
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let lines: Vec<String> = self.0.iter().map(|(n, v)| format!("{n}\t{v}")).collect();
        lines.join("\n").into_bytes()
    }

    /// What another rank has that this one has not.
    pub(super) fn difference(&self, theirs: &[u8]) -> Option<String> {
        let theirs = String::from_utf8_lossy(theirs);
        let mut lines = theirs.lines();
        for (name, mine) in &self.0 {
            let found = lines.next().and_then(|line| line.split_once('\t'));
            match found {
                Some((other, value)) if other == *name && value == mine => {}
                Some((other, value)) if other == *name => {
                    return Some(format!(
                        "was started with another {name} ({value}) than rank 0 ({mine})"
                    ));
                }
                _ => return Some(format!("runs another version: it does not tell its {name}")),
            }
        }
        lines.next().map(|_| "runs another version".to_owned())
    }
}

fn device_kind(options: &LoadOptions<'_>) -> String {
    match options.device {
        tch::Device::Cuda(_) => "cuda".to_owned(),
        other => format!("{other:?}").to_lowercase(),
    }
}

/// A number that depends on the configuration and on samples of the weights.
fn digest(dir: &Path) -> io::Result<u64> {
    let mut hasher = DefaultHasher::new();
    hasher.write(&std::fs::read(dir.join("config.json"))?);
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            files.push(path);
        }
    }
    files.sort();
    for path in files {
        hasher.write(path.file_name().unwrap_or_default().as_encoded_bytes());
        let mut file = File::open(&path)?;
        let len = file.metadata()?.len();
        hasher.write_u64(len);
        for sample in 0..SAMPLES {
            file.seek(SeekFrom::Start(len / SAMPLES * sample))?;
            let mut bytes = Vec::new();
            Read::by_ref(&mut file)
                .take(SAMPLE_BYTES as u64)
                .read_to_end(&mut bytes)?;
            hasher.write(&bytes);
        }
    }
    Ok(hasher.finish())
}
