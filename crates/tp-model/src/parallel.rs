//! How a model is divided among ranks: into stages of layers, and each stage between ranks.

use std::ops::Range;

#[cfg(feature = "cuda")]
use crate::comm::Call;
use crate::comm::{Collective, Solo};
use crate::error::ModelError;

/// How a model is divided, in vLLM's names. Rank `r` is rank `r % tensor_parallel_size` of stage
/// `r / tensor_parallel_size`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParallelConfig {
    /// Ranks among which each layer is divided.
    pub tensor_parallel_size: usize,
    /// Stages among which the layers are divided.
    pub pipeline_parallel_size: usize,
    /// How many layers each stage has. Unset: the same number; of what is left one each to the
    /// stages before the last, from the back, because the last has the output projection, too.
    pub pp_layer_partition: Option<Vec<usize>>,
}

impl ParallelConfig {
    /// One rank.
    pub const SOLO: ParallelConfig = ParallelConfig::tensor(1);

    /// One stage on `size` ranks.
    pub const fn tensor(size: usize) -> Self {
        Self {
            tensor_parallel_size: size,
            pipeline_parallel_size: 1,
            pp_layer_partition: None,
        }
    }

    /// How many ranks there are.
    pub fn world_size(&self) -> usize {
        self.tensor_parallel_size
            .saturating_mul(self.pipeline_parallel_size)
    }

    /// The ranks that have the stage of `rank`, in order, and which of them it is.
    pub fn tp_members(&self, rank: usize) -> (Vec<usize>, usize) {
        let size = self.tensor_parallel_size;
        let first = rank / size * size;
        ((first..first + size).collect(), rank % size)
    }

    /// The ranks that have the same part of every stage as `rank`, from the first stage to the
    /// last, and which of them it is.
    pub fn pp_members(&self, rank: usize) -> (Vec<usize>, usize) {
        let size = self.tensor_parallel_size;
        let members = (0..self.pipeline_parallel_size).map(|stage| stage * size + rank % size);
        (members.collect(), rank / size)
    }

    /// The rank that has all logits, and samples: the first of the last stage.
    pub fn sampling_rank(&self) -> usize {
        self.world_size() - self.tensor_parallel_size
    }

    /// How many of a model's layers each stage has. What cannot be is an error that names what can.
    pub fn partition(&self, num_layers: usize) -> Result<Vec<usize>, ModelError> {
        let stages = self.pipeline_parallel_size;
        let wrong = |what: String| Err(ModelError::Options(what));
        if stages == 0 || stages > num_layers {
            return wrong(format!(
                "pipeline_parallel_size {stages} does not fit this model, which has {num_layers} \
                 layers; sizes that do: 1 to {num_layers}"
            ));
        }
        let mut even = vec![num_layers / stages; stages];
        for one in even.iter_mut().rev().skip(1).take(num_layers % stages) {
            *one += 1;
        }
        let Some(partition) = &self.pp_layer_partition else {
            return Ok(even);
        };
        let list = |partition: &[usize]| {
            let numbers: Vec<String> = partition.iter().map(usize::to_string).collect();
            numbers.join(",")
        };
        let sum = partition
            .iter()
            .fold(0, |sum: usize, n| sum.saturating_add(*n));
        let obstacle = if partition.len() != stages {
            let count = partition.len();
            format!("has {count} numbers for {stages} stages (pipeline_parallel_size)")
        } else if partition.contains(&0) {
            "leaves a stage without a layer".to_owned()
        } else if sum != num_layers {
            format!("adds up to {sum}, but this model has {num_layers} layers")
        } else {
            return Ok(partition.clone());
        };
        wrong(format!(
            "pp_layer_partition {} {obstacle}; one that does: {}",
            list(partition),
            list(&even)
        ))
    }
}

/// What connects a rank with the others.
#[derive(Debug)]
pub struct ParallelGroups {
    /// With the ranks of the same stage.
    pub tp: Box<dyn Collective>,
    /// With the same part of the other stages: rank 0 of it is the first stage.
    pub pp: Box<dyn Collective>,
}

impl ParallelGroups {
    /// A rank of a model of one stage.
    pub fn tensor(tp: Box<dyn Collective>) -> Self {
        Self {
            tp,
            pp: Box::new(Solo),
        }
    }

    /// As [`Collective::enter`], for both groups.
    #[cfg(feature = "cuda")]
    pub fn enter(&self) -> [Option<Call>; 2] {
        [self.tp.enter(), self.pp.enter()]
    }
}

/// Which layers of a model a rank has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    index: usize,
    partition: Vec<usize>,
}

impl Stage {
    /// Stage `index` of those that have so many layers each.
    pub(crate) fn new(index: usize, partition: Vec<usize>) -> Result<Self, ModelError> {
        match index < partition.len() {
            true => Ok(Self { index, partition }),
            false => Err(ModelError::Options(format!(
                "pipeline parallelism: stage {index} of {} does not exist",
                partition.len()
            ))),
        }
    }

    /// Which stage it is, `0..count`.
    pub fn index(&self) -> usize {
        self.index
    }

    /// How many stages there are.
    pub fn count(&self) -> usize {
        self.partition.len()
    }

    /// The layers of this stage among those of the model.
    pub fn layers(&self) -> Range<usize> {
        let start = self.partition[..self.index].iter().sum();
        start..start + self.partition[self.index]
    }

    /// The number of layers of the stage that has most.
    pub fn most_layers(&self) -> usize {
        self.partition.iter().copied().max().unwrap_or(0)
    }

    /// Whether it has the embedding.
    pub fn is_first(&self) -> bool {
        self.index == 0
    }

    /// Whether it has the final norm and the output projection.
    pub fn is_last(&self) -> bool {
        self.index + 1 == self.partition.len()
    }

    /// Whether a tensor of the checkpoint is another stage's.
    pub(crate) fn is_elsewhere(&self, name: &str, tied: bool) -> bool {
        let layer = name
            .strip_prefix("model.layers.")
            .and_then(|rest| rest.split('.').next())
            .and_then(|index| index.parse::<usize>().ok());
        match (layer, name) {
            (Some(layer), _) => {
                layer < self.partition.iter().sum() && !self.layers().contains(&layer)
            }
            (_, "model.embed_tokens.weight") => !(self.is_first() || (tied && self.is_last())),
            (_, "model.norm.weight" | "lm_head.weight") => !self.is_last(),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(stages: usize, partition: Option<&[usize]>) -> ParallelConfig {
        ParallelConfig {
            pipeline_parallel_size: stages,
            pp_layer_partition: partition.map(<[usize]>::to_vec),
            ..ParallelConfig::tensor(2)
        }
    }

    #[test]
    fn layers_are_split_as_in_vllm() {
        for expected in [
            vec![16, 16],
            vec![4, 3],
            vec![2, 3, 2],
            vec![4, 4, 4, 4, 4, 4, 5, 5, 5, 4],
            vec![1, 1, 2, 1],
            vec![2, 2, 2, 1],
            vec![1, 1, 1],
        ] {
            let layers = expected.iter().sum();
            let found = config(expected.len(), None).partition(layers);
            assert_eq!(found.unwrap(), expected);
        }
    }

    #[test]
    fn what_does_not_add_up_is_refused_with_what_does() {
        let error = |stages, partition: Option<&[usize]>| {
            let refused = config(stages, partition).partition(7).unwrap_err();
            refused.to_string()
        };
        assert!(error(8, None).contains("sizes that do: 1 to 7"));
        assert!(error(0, None).contains("sizes that do: 1 to 7"));
        for (wrong, why) in [
            (&[3, 3][..], "3,3 adds up to 6, but this model has 7 layers"),
            (&[7], "has 1 numbers for 2 stages"),
            (&[2, 3, 2], "has 3 numbers for 2 stages"),
            (&[7, 0], "without a layer"),
            (&[usize::MAX, 8], "adds up to"),
        ] {
            let error = error(2, Some(wrong));
            assert!(
                error.contains(why) && error.ends_with("one that does: 4,3"),
                "{error}"
            );
        }
        assert_eq!(config(2, Some(&[1, 6])).partition(7).unwrap(), [1, 6]);
    }

    #[test]
    fn ranks_count_through_a_stage_first() {
        let grid = config(3, None);
        assert_eq!((grid.world_size(), grid.sampling_rank()), (6, 4));
        assert_eq!(grid.tp_members(3), (vec![2, 3], 1));
        assert_eq!(grid.pp_members(3), (vec![1, 3, 5], 1));
        let stage = Stage::new(1, grid.partition(8).unwrap()).unwrap();
        assert_eq!((stage.layers(), stage.most_layers()), (3..6, 3));
        assert!(Stage::new(3, vec![1, 1, 1]).is_err());
    }

    #[test]
    fn every_tensor_is_some_stages() {
        let stages = |index| Stage::new(index, vec![2, 1, 2]).unwrap();
        for (name, tied, owners) in [
            ("model.embed_tokens.weight", false, vec![0]),
            ("model.embed_tokens.weight", true, vec![0, 2]),
            ("model.norm.weight", false, vec![2]),
            ("lm_head.weight", false, vec![2]),
            ("model.layers.1.mlp.up_proj.weight", false, vec![0]),
            ("model.layers.2.mlp.up_proj.weight", false, vec![1]),
            ("model.layers.4.mlp.up_proj.weight", false, vec![2]),
            // Nobody's: everybody may complain.
            ("model.layers.5.mlp.up_proj.weight", false, vec![0, 1, 2]),
            ("something.else", false, vec![0, 1, 2]),
        ] {
            let found: Vec<usize> = (0..3)
                .filter(|index| !stages(*index).is_elsewhere(name, tied))
                .collect();
            assert_eq!(found, owners, "{name}");
        }
    }
}
