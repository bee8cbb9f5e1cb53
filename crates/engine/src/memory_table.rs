//! Where the memory goes, as a table in the log.

use std::fmt;

/// Bytes of one device, by use. What they leave is free, or taken by others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MemoryTable {
    /// `cuda:0`, `cpu`.
    pub(crate) device: String,
    /// All there is on a GPU; on a CPU what is free and the weights.
    pub(crate) total: u64,
    pub(crate) weights: u64,
    /// Activations of the largest steps and the sampler; none is set aside on a CPU.
    pub(crate) work: u64,
    /// Captured graphs, and how many.
    pub(crate) graphs: (u64, usize),
    pub(crate) max_num_batched_tokens: usize,
    /// Blocks that sequences can have, their tokens and bytes.
    pub(crate) num_blocks: usize,
    pub(crate) block_size: usize,
    pub(crate) block_bytes: u64,
}

impl fmt::Display for MemoryTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cache = (self.num_blocks as u64 + 1) * self.block_bytes;
        let (graph_bytes, graphs) = self.graphs;
        let used = self.weights + self.work + graph_bytes + cache;
        let mut line = |name: &str, bytes: u64, what: String| {
            let line = format!("  {name:<16} {:>12}  {what}", size(bytes));
            write!(f, "\n{}", line.trim_end())
        };
        line(&self.device, self.total, String::new())?;
        line("weights", self.weights, String::new())?;
        if self.work > 0 {
            let tokens = self.max_num_batched_tokens;
            line(
                "working memory",
                self.work,
                format!("steps of {tokens} tokens"),
            )?;
        }
        if graphs > 0 {
            line("CUDA graphs", graph_bytes, format!("{graphs} batch sizes"))?;
        }
        let tokens = self.num_blocks * self.block_size;
        let blocks = format!(
            "{} blocks of {}: {tokens} tokens",
            self.num_blocks, self.block_size
        );
        line("KV cache", cache, blocks)?;
        line("left", self.total.saturating_sub(used), String::new())
    }
}

fn size(bytes: u64) -> String {
    const GIB: f64 = (1u64 << 30) as f64;
    match bytes as f64 / GIB {
        gib if gib >= 1.0 => format!("{gib:.2} GiB"),
        gib => format!("{:.1} MiB", gib * 1024.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_use_has_its_line_and_the_rest_is_what_is_left() {
        let mut table = MemoryTable {
            device: "cuda:0".to_owned(),
            total: 140 << 30,
            weights: 15 << 30,
            work: 3 << 30,
            graphs: (70 << 20, 35),
            max_num_batched_tokens: 8192,
            num_blocks: 1023,
            block_size: 16,
            block_bytes: 2 << 20,
        };
        assert_eq!(
            table.to_string(),
            "
  cuda:0             140.00 GiB
  weights             15.00 GiB
  working memory       3.00 GiB  steps of 8192 tokens
  CUDA graphs          70.0 MiB  35 batch sizes
  KV cache             2.00 GiB  1023 blocks of 16: 16368 tokens
  left               119.93 GiB"
        );
        table.graphs = (0, 0);
        table.work = 0;
        table.total = 1 << 30;
        let text = table.to_string();
        assert!(!text.contains("graphs") && !text.contains("working"));
        assert!(text.ends_with("left                  0.0 MiB"), "{text}");
    }
}
