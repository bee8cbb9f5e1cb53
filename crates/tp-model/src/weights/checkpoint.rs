//! The safetensors files of a checkpoint directory.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use tch::Kind;
use torch_ext::{Advice, Mmap};

use super::header::{self, TensorInfo};
use super::matrix::Matrix;
use crate::error::ModelError;

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// A checkpoint whose files are mapped and whose headers are checked. No tensor data is read
/// until it is asked for.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    shards: Vec<Shard>,
    /// Which shard holds a tensor.
    by_name: BTreeMap<String, usize>,
    /// The file to blame for a tensor that is nowhere.
    listing: PathBuf,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    file: Mmap,
    tensors: BTreeMap<String, TensorInfo>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens `model.safetensors.index.json` and the shards it names, else `model.safetensors`,
    /// else every `*.safetensors` in the directory.
    pub(crate) fn open(dir: &Path) -> Result<Self, ModelError> {
        let index = dir.join(INDEX);
        if index.exists() {
            return Self::open_index(dir, index);
        }
        let single = dir.join(SINGLE);
        let paths = match single.exists() {
            true => vec![single],
            false => list_safetensors(dir)?,
        };
        let listing = paths.first().cloned().unwrap_or_else(|| dir.to_owned());
        let shards = paths
            .into_iter()
            .map(Shard::open)
            .collect::<Result<Vec<_>, _>>()?;
        let mut by_name = BTreeMap::new();
        for (at, shard) in shards.iter().enumerate() {
            for name in shard.tensors.keys() {
                if let Some(first) = by_name.insert(name.clone(), at) {
                    let other: &Shard = &shards[first];
                    let found = format!("another in {}", other.path.display());
                    return Err(ModelError::tensor(
                        &shard.path,
                        name,
                        "one tensor of that name",
                        found,
                    ));
                }
            }
        }
        Ok(Self {
            shards,
            by_name,
            listing,
        })
    }

    fn open_index(dir: &Path, path: PathBuf) -> Result<Self, ModelError> {
        let text = std::fs::read_to_string(&path).map_err(|e| ModelError::io(&path, e))?;
        let index: Index = serde_json::from_str(&text)
            .map_err(|e| ModelError::malformed(&path, format!("not a safetensors index: {e}")))?;
        let mut shards: Vec<Shard> = Vec::new();
        let mut opened: BTreeMap<String, usize> = BTreeMap::new();
        let mut by_name = BTreeMap::new();
        for (name, file) in index.weight_map {
            // A plain name: an index must not reach outside its directory.
            if Path::new(&file).file_name() != Some(OsStr::new(&file)) {
                return Err(ModelError::tensor(
                    &path,
                    &name,
                    "a file of this directory",
                    file,
                ));
            }
            let at = match opened.get(&file) {
                Some(at) => *at,
                None => {
                    let shard = dir.join(&file);
                    if !shard.exists() {
                        let expected = format!("shard {file} in {}", dir.display());
                        return Err(ModelError::tensor(&path, &name, expected, "no such file"));
                    }
                    shards.push(Shard::open(shard)?);
                    opened.insert(file, shards.len() - 1);
                    shards.len() - 1
                }
            };
            if !shards[at].tensors.contains_key(&name) {
                let expected = format!("a tensor, as {INDEX} says");
                return Err(ModelError::tensor(
                    &shards[at].path,
                    &name,
                    expected,
                    "none",
                ));
            }
            by_name.insert(name, at);
        }
        Ok(Self {
            shards,
            by_name,
            listing: path,
        })
    }

    /// Bytes of all tensors.
    pub(crate) fn bytes(&self) -> u64 {
        let tensors = self.by_name.iter();
        tensors
            .map(|(name, at)| self.shards[*at].tensors[name].bytes.len() as u64)
            .sum()
    }

    /// Names of all tensors, and the file that each is in.
    pub(crate) fn names(&self) -> impl Iterator<Item = (&str, &Path)> {
        self.by_name
            .iter()
            .map(|(name, at)| (name.as_str(), self.shards[*at].path.as_path()))
    }

    /// A tensor of the given shape, as a matrix whose columns are the last dimension.
    pub(crate) fn matrix(&self, name: &str, shape: &[usize]) -> Result<Matrix<'_>, ModelError> {
        let Some(&at) = self.by_name.get(name) else {
            let expected = format!("a tensor of shape {shape:?}");
            return Err(ModelError::tensor(&self.listing, name, expected, "none"));
        };
        let shard = &self.shards[at];
        let info = &shard.tensors[name];
        if info.shape != shape {
            return Err(ModelError::tensor(
                &shard.path,
                name,
                format!("shape {shape:?}"),
                format!("{:?}", info.shape),
            ));
        }
        let kind = info.kind().ok_or_else(|| {
            ModelError::tensor(&shard.path, name, "dtype F32, BF16 or F16", &info.dtype)
        })?;
        let cols = *shape.last().unwrap_or(&1);
        Ok(Matrix::new(&shard.file[info.bytes.clone()], kind, cols))
    }

    /// Says that a range of a tensor's bytes is not needed any more, so that loading does not
    /// hold the file in memory beside the weights.
    pub(crate) fn forget(&self, name: &str, range: Range<usize>) {
        if let Some(shard) = self.by_name.get(name).map(|at| &self.shards[*at]) {
            let start = shard.tensors[name].bytes.start;
            let bytes = start + range.start..start + range.end;
            let _ = shard.file.advise(bytes, Advice::DontNeed);
        }
    }

    /// The dtype that a tensor has in its file, if it is there.
    pub(crate) fn kind_of(&self, name: &str) -> Option<Kind> {
        let at = *self.by_name.get(name)?;
        self.shards[at].tensors.get(name)?.kind()
    }
}

impl Shard {
    fn open(path: PathBuf) -> Result<Self, ModelError> {
        let file = Mmap::open(&path).map_err(|e| ModelError::io(&path, e))?;
        let tensors = header::parse(&path, &file)?;
        // Advice is only that: without it loading is slower.
        let _ = file.advise(0..file.len(), Advice::Sequential);
        Ok(Self {
            path,
            file,
            tensors,
        })
    }
}

fn list_safetensors(dir: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let entries = std::fs::read_dir(dir).map_err(|e| ModelError::io(dir, e))?;
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| ModelError::io(dir, e))?.path();
        if path.extension() == Some(OsStr::new("safetensors")) {
            paths.push(path);
        }
    }
    if paths.is_empty() {
        return Err(ModelError::malformed(
            dir,
            format!("expected weights in {INDEX}, {SINGLE} or *.safetensors, found none of them"),
        ));
    }
    paths.sort();
    Ok(paths)
}
