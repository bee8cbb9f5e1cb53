//! API keys, and the tenants that they belong to.

use std::path::Path;

use anyhow::{Context, bail, ensure};
use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use sha2::{Digest, Sha256};
use subtle::{ConditionallySelectable, ConstantTimeEq};

/// Who sends a request, as an index into [`ApiKeys::tenants`]; 0 if no key is needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TenantId(pub u32);

/// One or several keys that count as one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tenant {
    /// What metrics and logs call it. Says nothing about the key.
    pub name: String,
    /// Its share of the machine when several compete.
    pub weight: u32,
}

/// The keys that are let in, as hashes. Nothing about a key shows in how long a comparison takes.
#[derive(Debug, Default)]
pub struct ApiKeys {
    keys: Vec<([u8; 32], TenantId)>,
    tenants: Vec<Tenant>,
}

impl ApiKeys {
    /// Keys from flags and from a file with one a line, which may go on with `name=` and
    /// `weight=`. Keys of one name are one tenant; one without a name is called by its place.
    pub fn new(keys: &[String], file: Option<&Path>) -> anyhow::Result<Self> {
        let mut all = Self::default();
        for key in keys {
            ensure!(!key.trim().is_empty(), "--api-key is empty");
            all.add(key, None, None)?;
        }
        let Some(path) = file else {
            return Ok(all);
        };
        let place = || format!("--api-key-file {}", path.display());
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", place()))?;
        for (at, line) in text.lines().enumerate() {
            if !line.trim().is_empty() {
                all.add_line(line)
                    .with_context(|| format!("{}, line {}", place(), at + 1))?;
            }
        }
        // An empty file must not open the server to everybody.
        ensure!(all.keys.len() > keys.len(), "{} holds no key", place());
        Ok(all)
    }

    fn add_line(&mut self, line: &str) -> anyhow::Result<()> {
        let mut words = line.split_whitespace();
        let key = words.next().unwrap_or_default();
        let (mut name, mut weight) = (None, None);
        for word in words {
            // A word that is none of these may be a part of a key: it must not show.
            match word.split_once('=') {
                Some(("name", value)) => name = Some(value),
                Some(("weight", value)) => {
                    let value: u32 = value.parse().context("weight must be a whole number")?;
                    ensure!((1..=1000).contains(&value), "weight must be 1 to 1000");
                    weight = Some(value);
                }
                _ => bail!("a key may be followed by name=NAME and weight=N only"),
            }
        }
        self.add(key, name, weight)
    }

    fn add(&mut self, key: &str, name: Option<&str>, weight: Option<u32>) -> anyhow::Result<()> {
        let name = match name {
            None => format!("key-{}", self.keys.len() + 1),
            Some(name) => {
                let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
                ensure!(
                    (1..=64).contains(&name.len()) && name.chars().all(plain),
                    "name must have 1 to 64 letters, digits, or -_."
                );
                name.to_owned()
            }
        };
        let known = self.tenants.iter().position(|tenant| tenant.name == name);
        let at = known.unwrap_or(self.tenants.len());
        match self.tenants.get(at) {
            None => self.tenants.push(Tenant {
                name,
                weight: weight.unwrap_or(1),
            }),
            Some(tenant) => ensure!(
                weight.is_none_or(|weight| weight == tenant.weight),
                "keys named {name} have different weights"
            ),
        }
        let tenant = TenantId(u32::try_from(at)?);
        self.keys.push((hash(key.as_bytes()), tenant));
        Ok(())
    }

    /// Whether no key is needed.
    pub fn is_open(&self) -> bool {
        self.keys.is_empty()
    }

    /// Everybody who has a key.
    pub fn tenants(&self) -> &[Tenant] {
        &self.tenants
    }

    /// Who sends the request; `None` if it brings none of the keys and one is needed.
    pub fn admit(&self, headers: &HeaderMap) -> Option<TenantId> {
        if self.is_open() {
            return Some(TenantId::default());
        }
        let sent = headers.get(AUTHORIZATION).and_then(|value| {
            let (scheme, key) = value.as_bytes().split_at_checked(7)?;
            scheme.eq_ignore_ascii_case(b"bearer ").then_some(key)
        })?;
        let sent = hash(sent.trim_ascii());
        // All of them, whether or not one has matched already.
        let (mut any, mut who) = (subtle::Choice::from(0), 0);
        for (key, tenant) in &self.keys {
            let same = key.ct_eq(&sent);
            who.conditional_assign(&tenant.0, same);
            any |= same;
        }
        bool::from(any).then_some(TenantId(who))
    }
}

fn hash(key: &[u8]) -> [u8; 32] {
    Sha256::digest(key).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admit(keys: &ApiKeys, value: &str) -> Option<u32> {
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, value.parse().unwrap());
        keys.admit(&headers).map(|tenant| tenant.0)
    }

    #[test]
    fn one_of_the_keys_is_needed() {
        let keys = ApiKeys::new(&["one".into(), "two".into()], None).unwrap();
        assert_eq!(admit(&keys, "Bearer one"), Some(0));
        assert_eq!(admit(&keys, "bearer two"), Some(1));
        assert_eq!(admit(&keys, "Bearer  two "), Some(1));
        for bad in [
            "",
            "Bearer",
            "Bearer ",
            "Bearer on",
            "Bearer onee",
            "Basic one",
            "one",
        ] {
            assert_eq!(admit(&keys, bad), None, "{bad}");
        }
        assert_eq!(keys.admit(&HeaderMap::new()), None);
        assert!(ApiKeys::default().admit(&HeaderMap::new()).is_some());
        assert!(ApiKeys::new(&[" ".into()], None).is_err());
    }

    #[test]
    fn a_file_names_keys_and_weighs_them() {
        let path = std::env::temp_dir().join(format!("nano-vllm-keys-{}", std::process::id()));
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            ApiKeys::new(&["flag".into()], Some(&path)).map_err(|error| format!("{error:#}"))
        };
        let keys = read("old name=team weight=3\n\nnew name=team\nplain\n").unwrap();
        let tenant = |name: &str, weight| Tenant {
            name: name.into(),
            weight,
        };
        let all = [tenant("key-1", 1), tenant("team", 3), tenant("key-4", 1)];
        assert_eq!(keys.tenants(), all);
        for (key, who) in [("flag", 0), ("old", 1), ("new", 1), ("plain", 2)] {
            assert_eq!(admit(&keys, &format!("Bearer {key}")), Some(who), "{key}");
        }
        for bad in [
            "\n",
            "secret weight=0",
            "secret weight=x",
            "secret name=a/b",
            "secret name=",
            "secret more",
            "secret name=a weight=2\nsecret2 name=a weight=3",
        ] {
            let error = read(bad).unwrap_err();
            assert!(error.contains("--api-key-file"), "{error}");
            assert!(
                !error.contains("secret") && !error.contains("more"),
                "{error}"
            );
        }
        std::fs::remove_file(&path).unwrap();
    }
}
