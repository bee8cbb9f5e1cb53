//! API keys.

use std::path::Path;

use anyhow::Context;
use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// The keys that are let in, as hashes. Nothing about a key shows in how long a comparison takes.
#[derive(Debug, Default)]
pub struct ApiKeys(Vec<[u8; 32]>);

impl ApiKeys {
    /// Keys from flags and from a file with one a line.
    pub fn new(keys: &[String], file: Option<&Path>) -> anyhow::Result<Self> {
        let mut all: Vec<String> = keys.to_vec();
        if let Some(path) = file {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("cannot read --api-key-file {}", path.display()))?;
            let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
            let before = all.len();
            all.extend(lines.map(str::to_owned));
            // An empty file must not open the server to everybody.
            anyhow::ensure!(
                all.len() > before,
                "--api-key-file {} holds no key",
                path.display()
            );
        }
        anyhow::ensure!(
            all.iter().all(|key| !key.trim().is_empty()),
            "--api-key is empty"
        );
        Ok(Self(all.iter().map(|key| hash(key.as_bytes())).collect()))
    }

    /// Whether no key is needed.
    pub fn is_open(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the request brings one of the keys, or none is needed.
    pub fn admit(&self, headers: &HeaderMap) -> bool {
        if self.is_open() {
            return true;
        }
        let sent = headers.get(AUTHORIZATION).and_then(|value| {
            let (scheme, key) = value.as_bytes().split_at_checked(7)?;
            scheme.eq_ignore_ascii_case(b"bearer ").then_some(key)
        });
        let Some(sent) = sent else {
            return false;
        };
        let sent = hash(sent.trim_ascii());
        // All of them, whether or not one has matched already.
        self.0
            .iter()
            .fold(subtle::Choice::from(0), |any, key| any | key.ct_eq(&sent))
            .into()
    }
}

fn hash(key: &[u8]) -> [u8; 32] {
    Sha256::digest(key).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_the_keys_is_needed() {
        let keys = ApiKeys::new(&["one".into(), "two".into()], None).unwrap();
        let admit = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(AUTHORIZATION, value.parse().unwrap());
            keys.admit(&headers)
        };
        assert!(admit("Bearer one") && admit("bearer two") && admit("Bearer  two "));
        for bad in [
            "",
            "Bearer",
            "Bearer ",
            "Bearer on",
            "Bearer onee",
            "Basic one",
            "one",
        ] {
            assert!(!admit(bad), "{bad}");
        }
        assert!(!keys.admit(&HeaderMap::new()));
        assert!(ApiKeys::default().admit(&HeaderMap::new()));
        assert!(ApiKeys::new(&[" ".into()], None).is_err());
    }
}
