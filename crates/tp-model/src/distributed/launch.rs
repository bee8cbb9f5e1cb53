//! Who this process is, from the environment that launchers set.

use std::fmt;
use std::io::Read;

use crate::error::ModelError;

/// The variable that holds the secret where no launcher makes one.
pub(super) const SECRET: &str = "NANO_VLLM_SECRET";

/// One process of several, each of which is a rank: `RANK`, `WORLD_SIZE`, `LOCAL_RANK`,
/// `LOCAL_WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT`, as torchrun sets them.
#[derive(Clone)]
pub struct Launcher {
    /// This process, `0..world_size`.
    pub rank: usize,
    /// How many processes there are.
    pub world_size: usize,
    /// This process among those of its machine.
    pub local_rank: usize,
    /// How many processes this machine has.
    pub local_world_size: usize,
    /// Where rank 0 is.
    pub master_addr: String,
    /// Port of the launcher's store, or of rank 0 if there is no store.
    pub master_port: u16,
    /// How the ranks find each other.
    pub(super) rendezvous: Rendezvous,
}

#[derive(Clone)]
pub(super) enum Rendezvous {
    /// Through the store of torchrun's agent, under a prefix for this attempt.
    Store { prefix: String },
    /// Rank 0 listens; all know a secret.
    Secret(String),
}

impl Launcher {
    /// Reads the environment; `None` if it names no launcher, or one of a single process.
    pub fn from_env() -> Result<Option<Self>, ModelError> {
        Self::parse(|name| std::env::var(name).ok())
    }

    /// Process `rank` of `world_size`, all on machines that trust each other; rank 0 listens at
    /// `master_addr` and `master_port`, to whoever knows `secret`.
    pub fn new(
        rank: usize,
        world_size: usize,
        master_addr: &str,
        master_port: u16,
        secret: &str,
    ) -> Self {
        Self {
            rank,
            world_size,
            local_rank: rank,
            local_world_size: 1,
            master_addr: master_addr.to_owned(),
            master_port,
            rendezvous: Rendezvous::Secret(secret.to_owned()),
        }
    }

    fn parse(var: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, ModelError> {
        let number = |name: &str| match var(name) {
            None => Ok(None),
            Some(text) => match text.parse::<usize>() {
                Ok(number) => Ok(Some(number)),
                Err(_) => Err(wrong(format!("{name}={text} is not a number"))),
            },
        };
        let Some(world_size) = number("WORLD_SIZE")?.filter(|size| *size > 1) else {
            return Ok(None);
        };
        let missing = |name: &str| {
            wrong(format!(
                "WORLD_SIZE={world_size} is set but {name} is not; torchrun sets both (for one \
                 process, unset WORLD_SIZE)"
            ))
        };
        let rank = number("RANK")?.ok_or_else(|| missing("RANK"))?;
        if rank >= world_size {
            return Err(wrong(format!(
                "RANK={rank} is not below WORLD_SIZE={world_size}"
            )));
        }
        let master_addr = var("MASTER_ADDR").ok_or_else(|| missing("MASTER_ADDR"))?;
        let port = number("MASTER_PORT")?.ok_or_else(|| missing("MASTER_PORT"))?;
        let master_port = u16::try_from(port)
            .ok()
            .filter(|port| *port > 0)
            .ok_or_else(|| wrong(format!("MASTER_PORT={port} is not a port")))?;
        let rendezvous = match var("TORCHELASTIC_USE_AGENT_STORE").as_deref() {
            Some("True") => {
                let attempt = var("TORCHELASTIC_RESTART_COUNT").unwrap_or_default();
                Rendezvous::Store {
                    prefix: format!("nano-vllm/{attempt}/"),
                }
            }
            _ => Rendezvous::Secret(var(SECRET).filter(|s| s.len() >= 16).ok_or_else(|| {
                wrong(format!(
                    "without torchrun's store the ranks need a common secret: set {SECRET} to the \
                     same 16 or more characters in every process"
                ))
            })?),
        };
        Ok(Some(Self {
            rank,
            world_size,
            local_rank: number("LOCAL_RANK")?.unwrap_or(rank),
            local_world_size: number("LOCAL_WORLD_SIZE")?.unwrap_or(1).max(1),
            master_addr,
            master_port,
            rendezvous,
        }))
    }
}

impl fmt::Debug for Launcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            rank,
            world_size,
            master_addr,
            master_port,
            ..
        } = self;
        write!(
            f,
            "rank {rank} of {world_size} at {master_addr}:{master_port}"
        )
    }
}

fn wrong(what: String) -> ModelError {
    ModelError::Options(format!("environment: {what}"))
}

/// 32 random bytes, in hexadecimal.
pub(super) fn random_secret() -> std::io::Result<String> {
    let mut bytes = [0; 32];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(vars: &[(&str, &str)]) -> Result<Option<Launcher>, ModelError> {
        Launcher::parse(|name| {
            let found = vars.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    const RANK_1: [(&str, &str); 4] = [
        ("WORLD_SIZE", "2"),
        ("RANK", "1"),
        ("MASTER_ADDR", "h"),
        ("MASTER_PORT", "29500"),
    ];

    #[test]
    fn one_process_needs_no_launcher() {
        assert!(parse(&[]).unwrap().is_none());
        assert!(
            parse(&[("WORLD_SIZE", "1"), ("RANK", "0")])
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let error = |vars: &[(&str, &str)]| parse(vars).unwrap_err().to_string();
        assert!(error(&RANK_1[..1]).contains("RANK is not"));
        assert!(error(&RANK_1[..2]).contains("MASTER_ADDR is not"));
        assert!(error(&RANK_1[..3]).contains("MASTER_PORT is not"));
        assert!(error(&RANK_1).contains(SECRET));
        let with = |name, value| {
            let mut vars = vec![(name, value), (SECRET, "0123456789abcdef")];
            vars.extend(RANK_1);
            error(&vars)
        };
        assert!(with("RANK", "2").contains("RANK=2 is not below"));
        assert!(with("RANK", "one").contains("not a number"));
        assert!(with("MASTER_PORT", "0").contains("not a port"));
        assert!(with("MASTER_PORT", "70000").contains("not a port"));
        assert!(with(SECRET, "short").contains("16 or more"));
    }

    #[test]
    fn torchrun_brings_a_store() {
        let mut vars = vec![("TORCHELASTIC_USE_AGENT_STORE", "True")];
        vars.extend(RANK_1);
        let launcher = parse(&vars).unwrap().unwrap();
        assert_eq!((launcher.rank, launcher.world_size), (1, 2));
        assert!(matches!(launcher.rendezvous, Rendezvous::Store { .. }));
        // Secrets are not printed.
        vars.push((SECRET, "0123456789abcdef"));
        vars.remove(0);
        let launcher = parse(&vars).unwrap().unwrap();
        assert!(!format!("{launcher:?}").contains("0123456789abcdef"));
    }
}
