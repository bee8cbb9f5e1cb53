//! Where a model comes from: a local directory or a repository of the Hugging Face hub.
//!
//! A hub model is looked up the way `huggingface_hub` does it and lands in the same cache, so
//! that files which another tool has fetched are used and not fetched again.

use std::path::{Path, PathBuf};

use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

/// Files beside the weights; only `config.json` must exist.
const SIDE_FILES: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "quantization_config.json",
];
const INDEX: &str = "model.safetensors.index.json";

/// Why a model's files could not be had.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// A path that does not lead to a directory.
    #[error("model directory `{0}` does not exist (a hub id looks like `org/name`)")]
    NoSuchDirectory(PathBuf),
    /// Neither a directory nor something the hub could know.
    #[error(
        "`{0}` is neither a directory nor a hub id; expected a path or `org/name` of letters, \
         digits, `-`, `_` and `.`"
    )]
    BadId(String),
    /// A file is not in the cache and may not or cannot be fetched.
    #[error(
        "{repo}: `{file}` is not in the cache {} and {reason}; fetch it once with network access \
         or give a local directory",
        cache.display()
    )]
    NotCached {
        /// Repository.
        repo: String,
        /// The file that is missing.
        file: String,
        /// Cache folder that was searched.
        cache: PathBuf,
        /// Why it was not fetched.
        reason: String,
    },
    /// The repository does not exist, or the token does not open it.
    #[error(
        "{repo} at revision `{revision}` does not exist on {endpoint} or needs a token with access \
         (set HF_TOKEN)"
    )]
    NotFound {
        /// Repository.
        repo: String,
        /// Revision asked for.
        revision: String,
        /// The hub's address.
        endpoint: String,
    },
    /// The repository holds no weights that this engine reads.
    #[error("{repo} holds no *.safetensors file; convert its weights to safetensors")]
    NoSafetensors {
        /// Repository.
        repo: String,
    },
    /// A file could not be read.
    #[error("{}: {message}", path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A download broke off.
    #[error("{repo}: downloading `{file}` failed: {message}; run again to resume")]
    Download {
        /// Repository.
        repo: String,
        /// The file.
        file: String,
        /// What the client reported.
        message: String,
    },
}

/// How to reach the hub. [`HubOptions::from_env`] reads what `huggingface_hub` reads.
#[derive(Clone, Debug)]
pub struct HubOptions {
    /// Cache folder (`HF_HUB_CACHE`, else `$HF_HOME/hub`, else `~/.cache/huggingface/hub`).
    pub cache_dir: PathBuf,
    /// Address of the hub (`HF_ENDPOINT`).
    pub endpoint: String,
    /// Access token (`HF_TOKEN`, else the file that `hf auth login` writes).
    pub token: Option<String>,
    /// Use the cache only (`HF_HUB_OFFLINE`).
    pub offline: bool,
    /// Show a progress bar for each download on stderr.
    pub progress: bool,
}

impl HubOptions {
    /// Options as the environment sets them, with progress bars.
    pub fn from_env() -> Self {
        let var = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
        let cache = var("HF_HUB_CACHE").map_or_else(Cache::from_env, |dir| Cache::new(dir.into()));
        let offline = var("HF_HUB_OFFLINE")
            .is_some_and(|v| ["1", "on", "yes", "true"].contains(&v.to_ascii_lowercase().as_str()));
        HubOptions {
            token: var("HF_TOKEN").or_else(|| cache.token()),
            cache_dir: cache.path().clone(),
            endpoint: var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_string()),
            offline,
            progress: true,
        }
    }
}

/// Returns the directory that holds `model`'s files, after fetching what is missing.
///
/// `model` is a directory, or a hub id such as `Qwen/Qwen3-0.6B`; `revision` (branch, tag or
/// commit, default `main`) applies to the latter only. With `weights` false the safetensors files
/// are left where they are (dummy weights need none).
pub fn resolve(
    model: &str,
    revision: Option<&str>,
    weights: bool,
    options: &HubOptions,
) -> Result<PathBuf, HubError> {
    let path = Path::new(model);
    if path.is_dir() {
        return Ok(path.to_path_buf());
    }
    let looks_like_path = path.is_absolute() || model.starts_with('.') || model.starts_with('~');
    if looks_like_path || model.matches('/').count() > 1 {
        return Err(HubError::NoSuchDirectory(path.to_path_buf()));
    }
    let valid = |part: &str| {
        !part.is_empty()
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    if !model.split('/').all(valid) {
        return Err(HubError::BadId(model.to_string()));
    }
    let hub = Hub {
        repo_id: model,
        revision: revision.unwrap_or("main"),
        weights,
        options,
    };
    if options.offline {
        return hub.use_cache("HF_HUB_OFFLINE is set".to_string());
    }
    hub.use_network()
}

struct Hub<'a> {
    repo_id: &'a str,
    revision: &'a str,
    weights: bool,
    options: &'a HubOptions,
}

impl Hub<'_> {
    fn repo(&self) -> Repo {
        Repo::with_revision(
            self.repo_id.to_string(),
            RepoType::Model,
            self.revision.to_string(),
        )
    }

    fn repo_dir(&self) -> PathBuf {
        self.options.cache_dir.join(self.repo().folder_name())
    }

    /// The snapshot that the cache holds for the revision, complete or not.
    fn snapshot(&self) -> Option<PathBuf> {
        let dir = self.repo_dir();
        let commit = std::fs::read_to_string(dir.join("refs").join(self.revision))
            .unwrap_or_else(|_| self.revision.to_string());
        let snapshot = dir.join("snapshots").join(commit.trim());
        snapshot.is_dir().then_some(snapshot)
    }

    fn not_cached(&self, file: &str, reason: String) -> HubError {
        HubError::NotCached {
            repo: self.repo_id.to_string(),
            file: file.to_string(),
            cache: self.options.cache_dir.clone(),
            reason,
        }
    }

    fn use_cache(&self, reason: String) -> Result<PathBuf, HubError> {
        let Some(snapshot) = self.snapshot() else {
            return Err(self.not_cached("config.json", reason));
        };
        if !snapshot.join("config.json").exists() {
            return Err(self.not_cached("config.json", reason));
        }
        if self.weights {
            let index = snapshot.join(INDEX);
            let shards = if index.exists() {
                shards_of(&index)?
            } else {
                vec!["model.safetensors".to_string()]
            };
            if let Some(missing) = shards.iter().find(|file| !snapshot.join(file).exists()) {
                return Err(self.not_cached(missing, reason));
            }
        }
        Ok(snapshot)
    }

    fn use_network(&self) -> Result<PathBuf, HubError> {
        let options = self.options;
        let api = ApiBuilder::from_cache(Cache::new(options.cache_dir.clone()))
            .with_endpoint(options.endpoint.clone())
            .with_token(options.token.clone())
            .with_progress(options.progress)
            .with_retries(2)
            .build()
            .map_err(|error| self.not_cached("config.json", error.to_string()))?
            .repo(self.repo());
        let info = match api.info() {
            Ok(info) => info,
            Err(error) => return self.without_listing(&error),
        };
        let snapshot = self.repo_dir().join("snapshots").join(&info.sha);
        let remote: Vec<&str> = info
            .siblings
            .iter()
            .map(|file| file.rfilename.as_str())
            .collect();
        for file in SIDE_FILES {
            // config.json is asked for even if unlisted, so that its absence is reported.
            if file == "config.json" || remote.contains(&file) {
                self.fetch(&api, &snapshot, file)?;
            }
        }
        if self.weights {
            let shards = if remote.contains(&INDEX) {
                shards_of(&self.fetch(&api, &snapshot, INDEX)?)?
            } else {
                let at_root = |file: &&&str| file.ends_with(".safetensors") && !file.contains('/');
                remote
                    .iter()
                    .filter(at_root)
                    .map(|f| f.to_string())
                    .collect()
            };
            if shards.is_empty() {
                return Err(HubError::NoSafetensors {
                    repo: self.repo_id.to_string(),
                });
            }
            for shard in shards {
                self.fetch(&api, &snapshot, &shard)?;
            }
        }
        Ok(snapshot)
    }

    /// The hub did not list the repository: a complete cached copy still serves.
    fn without_listing(&self, error: &ApiError) -> Result<PathBuf, HubError> {
        let message = error.to_string();
        let refused = [401, 403, 404]
            .iter()
            .any(|code| message.contains(&format!("status code {code}")));
        if refused {
            return Err(HubError::NotFound {
                repo: self.repo_id.to_string(),
                revision: self.revision.to_string(),
                endpoint: self.options.endpoint.clone(),
            });
        }
        let reason = format!("{} cannot be reached ({message})", self.options.endpoint);
        let snapshot = self.use_cache(reason)?;
        tracing::warn!(
            "{} cannot be reached; using the cached copy of {}",
            self.options.endpoint,
            self.repo_id
        );
        Ok(snapshot)
    }

    fn fetch(&self, api: &ApiRepo, snapshot: &Path, file: &str) -> Result<PathBuf, HubError> {
        let cached = snapshot.join(file);
        if cached.exists() {
            return Ok(cached);
        }
        api.download(file).map_err(|error| HubError::Download {
            repo: self.repo_id.to_string(),
            file: file.to_string(),
            message: error.to_string(),
        })
    }
}

/// The shard files that an index names, each once.
fn shards_of(index: &Path) -> Result<Vec<String>, HubError> {
    let bad = |message: String| HubError::BadFile {
        path: index.to_path_buf(),
        message,
    };
    let text = std::fs::read(index).map_err(|error| bad(error.to_string()))?;
    let json: serde_json::Value =
        serde_json::from_slice(&text).map_err(|error| bad(error.to_string()))?;
    let map = json["weight_map"]
        .as_object()
        .ok_or_else(|| bad("no `weight_map` object".to_string()))?;
    let mut shards = Vec::new();
    for (tensor, file) in map {
        match file.as_str() {
            // A name with a separator would leave the snapshot's folder.
            Some(file) if !file.contains(['/', '\\']) => shards.push(file.to_string()),
            _ => {
                return Err(bad(format!(
                    "`weight_map` names no plain file for `{tensor}`"
                )));
            }
        }
    }
    shards.sort();
    shards.dedup();
    Ok(shards)
}
