//! Decode steps as CUDA graphs, one for each of some batch sizes.

use tch::Tensor;
use torch_ext::cuda::{Graph, GraphPool};

use crate::attention::AttentionBatch;

/// A captured step of `size` rows.
#[derive(Debug)]
pub(super) struct DecodeGraph {
    pub(super) size: usize,
    pub(super) graph: Graph,
    /// Logits, `[size, vocab]`, where this rank gets them; on a stage that is not the last what the
    /// next one gets, `[size, hidden]`. Overwritten by every replay.
    pub(super) output: Option<Tensor>,
    /// What was sampled, int32 `[size]`, where this rank is alone: of rows whose
    /// [`sample_slots`](torch_ext::cuda::StepTensors::sample_slots) are not negative.
    pub(super) tokens: Option<Tensor>,
    /// What the kernels read: kept for as long as the graph.
    pub(super) _batch: AttentionBatch,
}

/// Graphs by size.
#[derive(Debug)]
pub(super) struct DecodeGraphs {
    pub(super) pool: GraphPool,
    /// Ascending.
    pub(super) graphs: Vec<DecodeGraph>,
}

impl DecodeGraphs {
    /// The smallest graph that holds `rows` rows.
    pub(super) fn fitting(&mut self, rows: usize) -> Option<&mut DecodeGraph> {
        let at = self.graphs.partition_point(|graph| graph.size < rows);
        self.graphs.get_mut(at)
    }
}

/// Sizes to capture: 1, 2, 4, multiples of 8 up to 256, of 32 beyond, and the largest batch itself.
pub(super) fn capture_sizes(max_num_seqs: usize) -> Vec<usize> {
    let steps = [1, 2, 4].into_iter();
    let eights = (8..=256).step_by(8);
    let beyond = (288..=512).step_by(32);
    let mut sizes: Vec<usize> = steps
        .chain(eights)
        .chain(beyond)
        .filter(|size| *size < max_num_seqs)
        .collect();
    sizes.push(max_num_seqs);
    sizes
}

#[cfg(test)]
mod tests {
    use super::capture_sizes;

    #[test]
    fn the_largest_batch_has_a_graph() {
        assert_eq!(capture_sizes(1), [1]);
        assert_eq!(capture_sizes(7), [1, 2, 4, 7]);
        assert_eq!(capture_sizes(24), [1, 2, 4, 8, 16, 24]);
        assert_eq!(capture_sizes(257).last(), Some(&257));
        assert!(capture_sizes(2048).len() < 50);
    }
}
