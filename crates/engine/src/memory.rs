//! How large the KV cache gets.

use crate::config::{ConfigError, EngineConfig, MaxModelLen};

/// Most memory that the KV cache takes on a CPU unless told otherwise.
const DEFAULT_CPU_CACHE: u64 = 4 << 30;

/// Sizes that depend on each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CacheSize {
    /// Blocks in the buffers, block 0 included, which no sequence can have.
    pub(crate) num_blocks: usize,
    pub(crate) max_model_len: usize,
}

/// Memory that a KV cache can have, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Budget {
    /// All that could be had.
    pub(crate) free: u64,
    /// What it takes unless told otherwise.
    pub(crate) usual: u64,
}

impl Budget {
    /// On a CPU: what is free, and a modest part of it.
    pub(crate) fn of_host(free: u64) -> Self {
        Budget {
            free,
            usual: DEFAULT_CPU_CACHE.min(free / 2),
        }
    }

    /// On a GPU of which `utilization` may be used: `total` bytes, `free` of them left by weights
    /// and other processes, `work` needed for activations, graphs and the sampler.
    pub(crate) fn of_gpu(total: u64, free: u64, work: u64, utilization: f64) -> Self {
        let spared = (total as f64 * (1.0 - utilization)) as u64;
        let free = free.saturating_sub(work);
        Budget {
            free,
            usual: free.saturating_sub(spared),
        }
    }
}

/// The longest sequence that is asked for: the model's own context length is `model_len`.
pub(crate) fn wanted_model_len(
    config: &EngineConfig,
    model_len: usize,
) -> Result<usize, ConfigError> {
    match config.max_model_len {
        MaxModelLen::Model | MaxModelLen::Auto => Ok(model_len),
        MaxModelLen::Tokens(tokens) if tokens > model_len => Err(ConfigError::new(
            "max_model_len",
            format!("{tokens} exceeds the model's own {model_len}; lower it"),
        )),
        MaxModelLen::Tokens(tokens) => Ok(tokens),
    }
}

/// `model_len` is the model's own context length, `block_bytes` the size of a block of all layers.
pub(crate) fn size_cache(
    config: &EngineConfig,
    model_len: usize,
    block_bytes: u64,
    budget: Budget,
) -> Result<CacheSize, ConfigError> {
    let block_size = config.block_size;
    let free = budget.free;
    let wanted_len = wanted_model_len(config, model_len)?;
    // The last token of a sequence is never fed to the model, so it needs no place.
    let blocks_for = |len: usize| len.saturating_sub(1).max(1).div_ceil(block_size);
    let most = config
        .max_num_seqs
        .saturating_mul(blocks_for(wanted_len))
        .saturating_add(1);
    let budget = config.kv_cache_memory_bytes.unwrap_or(budget.usual);
    let (option, num_blocks) = match config.num_gpu_blocks_override {
        // The override counts blocks that sequences can have.
        Some(blocks) => ("num_gpu_blocks_override", blocks.saturating_add(1)),
        None => {
            let fit = usize::try_from(budget / block_bytes.max(1)).unwrap_or(usize::MAX);
            ("kv_cache_memory_bytes", most.min(fit))
        }
    };
    let bytes = (num_blocks as u64).saturating_mul(block_bytes);
    if bytes > free {
        return Err(ConfigError::new(
            option,
            format!(
                "a KV cache of {} does not fit the {} of memory that are free; {}",
                mib(bytes),
                mib(free),
                match (free / block_bytes.max(1)).saturating_sub(1) {
                    0 => format!("not even one block of {block_size} tokens would"),
                    blocks => format!("at most {blocks} blocks of {block_size} tokens would"),
                }
            ),
        ));
    }
    let usable = num_blocks.saturating_sub(1);
    let longest = match usable {
        0 => 0,
        blocks => blocks.saturating_mul(block_size).saturating_add(1),
    };
    let max_model_len = match config.max_model_len {
        MaxModelLen::Auto => wanted_len.min(longest),
        _ => wanted_len,
    };
    if max_model_len == 0 || max_model_len > longest {
        let blocks = blocks_for(wanted_len);
        let needed = (blocks as u64 + 1).saturating_mul(block_bytes);
        let (holds, raise) = match config.num_gpu_blocks_override {
            Some(_) => (
                format!("num_gpu_blocks_override gives {usable}"),
                format!("num_gpu_blocks_override to at least {blocks}"),
            ),
            None => (
                format!("there are {}", mib(bytes.max(budget.min(free)))),
                format!("kv_cache_memory_bytes to at least {needed}"),
            ),
        };
        let lower = match longest {
            0 => String::new(),
            longest => format!("max_model_len to at most {longest}, or "),
        };
        return Err(ConfigError::new(
            "max_model_len",
            format!(
                "one sequence of {wanted_len} tokens needs a KV cache of {} ({blocks} blocks), \
                 but {holds}; set {lower}{raise}",
                mib(needed),
            ),
        ));
    }
    Ok(CacheSize {
        num_blocks,
        max_model_len,
    })
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// Memory that this machine can give without swapping: the kernel's estimate, and the limit of the
/// control group if a container sets one.
pub(crate) fn free_host_memory() -> u64 {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let available = read("/proc/meminfo").and_then(|text| {
        let line = text
            .lines()
            .find(|line| line.starts_with("MemAvailable:"))?;
        let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
        Some(kib * 1024)
    });
    let number = |path: &str| read(path)?.trim().parse::<u64>().ok();
    let group = number("/sys/fs/cgroup/memory.max")
        .map(|limit| limit.saturating_sub(number("/sys/fs/cgroup/memory.current").unwrap_or(0)));
    // Where neither can be read, assume enough for the default.
    let known = available.into_iter().chain(group).min();
    known.unwrap_or(2 * DEFAULT_CPU_CACHE)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn config() -> EngineConfig {
        EngineConfig {
            max_num_seqs: 4,
            ..EngineConfig::new("m")
        }
    }

    #[test]
    fn the_cache_holds_all_sequences_at_full_length_if_that_fits() {
        let size = size_cache(&config(), 161, 1 << 20, Budget::of_host(64 * GIB)).unwrap();
        assert_eq!((size.num_blocks, size.max_model_len), (41, 161));
    }

    #[test]
    fn the_default_takes_at_most_four_gib_and_half_of_what_is_free() {
        let blocks = |free| {
            size_cache(&config(), 16_384, 1 << 20, Budget::of_host(free))
                .unwrap()
                .num_blocks as u64
        };
        assert_eq!(blocks(64 * GIB), 4096);
        assert_eq!(blocks(6 * GIB), 3072);
    }

    #[test]
    fn what_does_not_fit_is_refused_with_what_would() {
        let mut tight = config();
        tight.kv_cache_memory_bytes = Some(11 << 20);
        let error = size_cache(&tight, 1000, 1 << 20, Budget::of_host(GIB)).unwrap_err();
        assert_eq!(error.option, "max_model_len");
        let advice = "max_model_len to at most 161, or kv_cache_memory_bytes to at least 67108864";
        assert!(error.message.contains(advice), "{error}");
        // Both pieces of advice work.
        tight.max_model_len = MaxModelLen::Tokens(161);
        assert_eq!(
            size_cache(&tight, 1000, 1 << 20, Budget::of_host(GIB))
                .unwrap()
                .max_model_len,
            161
        );
        tight.max_model_len = MaxModelLen::Tokens(162);
        assert!(size_cache(&tight, 1000, 1 << 20, Budget::of_host(GIB)).is_err());
        tight.max_model_len = MaxModelLen::Model;
        tight.kv_cache_memory_bytes = Some(67_108_864);
        assert!(size_cache(&tight, 1000, 1 << 20, Budget::of_host(GIB)).is_ok());
    }

    #[test]
    fn auto_takes_what_fits() {
        let mut auto = config();
        auto.max_model_len = MaxModelLen::Auto;
        auto.kv_cache_memory_bytes = Some(11 << 20);
        assert_eq!(
            size_cache(&auto, 1000, 1 << 20, Budget::of_host(GIB))
                .unwrap()
                .max_model_len,
            161
        );
        assert_eq!(
            size_cache(&auto, 100, 1 << 20, Budget::of_host(GIB))
                .unwrap()
                .max_model_len,
            100
        );
    }

    #[test]
    fn more_than_there_is_is_refused_before_it_is_allocated() {
        let mut greedy = config();
        greedy.kv_cache_memory_bytes = Some(8 * GIB);
        let error = size_cache(&greedy, 1 << 20, 1 << 20, Budget::of_host(GIB)).unwrap_err();
        assert_eq!(error.option, "kv_cache_memory_bytes");
        greedy.num_gpu_blocks_override = Some(usize::MAX);
        let error = size_cache(&greedy, 1000, 1 << 20, Budget::of_host(GIB)).unwrap_err();
        assert_eq!(error.option, "num_gpu_blocks_override");
        let error = size_cache(&greedy, 1000, 1 << 20, Budget::of_host(1)).unwrap_err();
        assert!(error.message.contains("not even one block"), "{error}");
    }

    #[test]
    fn a_short_override_is_named_with_the_blocks_that_would_do() {
        let mut few = config();
        few.num_gpu_blocks_override = Some(3);
        let error = size_cache(&few, 1000, 1 << 20, Budget::of_host(GIB)).unwrap_err();
        let advice = "max_model_len to at most 49, or num_gpu_blocks_override to at least 63";
        assert!(error.message.contains(advice), "{error}");
        few.num_gpu_blocks_override = Some(63);
        assert!(size_cache(&few, 1000, 1 << 20, Budget::of_host(GIB)).is_ok());
        // A cache without room for one block has no length to recommend.
        let mut none = config();
        none.kv_cache_memory_bytes = Some(1);
        let error = size_cache(&none, 1000, 1 << 20, Budget::of_host(GIB)).unwrap_err();
        assert!(!error.message.contains("at most"), "{error}");
    }

    #[test]
    fn a_gpu_keeps_its_share_and_its_working_memory() {
        let gpu = Budget::of_gpu(100 * GIB, 80 * GIB, 10 * GIB, 0.9);
        assert_eq!(gpu.free, 70 * GIB);
        assert!(gpu.usual.abs_diff(60 * GIB) < 1 << 20);
        assert_eq!(Budget::of_gpu(100, 5, 10, 0.9).free, 0);
    }
}
