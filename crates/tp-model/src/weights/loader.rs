//! Builds layers from a source of weights, reading only this rank's share.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};

use tch::{Device, Kind, Tensor};

use super::{Checkpoint, Dummy, Matrix, Shard};
use crate::error::ModelError;
use crate::layers::{Linear, Ops, RmsNorm};

/// Elements that are converted at a time: small enough to stay in a cache, and to let the pages
/// behind them go soon.
const BLOCK_ELEMENTS: usize = 1 << 19;

/// Where weights come from.
#[derive(Debug)]
pub(crate) enum Source {
    /// Files.
    Checkpoint(Checkpoint),
    /// A random generator.
    Dummy(Dummy),
}

impl Source {
    /// Fails unless there is a tensor of that name and shape.
    fn expect(&self, name: &str, shape: [usize; 2]) -> Result<(), ModelError> {
        match self {
            Source::Checkpoint(checkpoint) => checkpoint.matrix(name, &shape).map(|_| ()),
            Source::Dummy(_) if Dummy::max_rows(shape[1]) > 0 => Ok(()),
            Source::Dummy(_) => Err(ModelError::Options(format!(
                "dummy weights: `{name}` has {} columns, more than can be made up",
                shape[1]
            ))),
        }
    }
}

/// How a weight of `[out, in]` is divided between ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Split {
    /// By output: each rank computes a range of outputs.
    Out,
    /// By input: each rank computes a summand of all outputs.
    In,
    /// By output, of a size that the ranks need not divide: all but the last ranks compute the
    /// same number of outputs, and the last ones' are padded to that number.
    Vocabulary,
}

/// One tensor of a layer whose tensors are stacked along the output dimension.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part<'a> {
    /// Name without `.weight` or `.bias`.
    pub name: &'a str,
    /// Output features over all ranks.
    pub out_features: usize,
    /// How many neighbouring ranks have the same share: 1, or more for the key and value heads of
    /// a model that has fewer of them than there are ranks.
    pub replicas: usize,
}

impl<'a> Part<'a> {
    /// A tensor of which every rank has a share of its own.
    pub(crate) fn new(name: &'a str, out_features: usize) -> Self {
        Self {
            name,
            out_features,
            replicas: 1,
        }
    }
}

/// Called with bytes done and bytes in total.
pub(crate) type Progress<'a> = &'a (dyn Fn(u64, u64) + Sync);

/// What all loaders of a model share.
pub(crate) struct LoadContext<'a> {
    pub(crate) source: Source,
    pub(crate) shard: Shard,
    pub(crate) ops: Ops,
    /// Dtype of weights.
    pub(crate) weights: Kind,
    /// Dtype of activations, norms and biases.
    pub(crate) activations: Kind,
    pub(crate) device: Device,
    pub(crate) progress: Option<Progress<'a>>,
    /// Bytes read so far.
    pub(crate) done: AtomicU64,
    /// Bytes to read.
    pub(crate) total: u64,
}

impl LoadContext<'_> {
    /// Ends loading: warns of tensors that no layer used, except those for which `known` says
    /// that they are redundant.
    pub(crate) fn finish(&self, used: &BTreeSet<String>, known: impl Fn(&str) -> bool) {
        if let Some(progress) = self.progress {
            progress(self.total, self.total);
        }
        let Source::Checkpoint(source) = &self.source else {
            return;
        };
        for (name, path) in source.names() {
            if !used.contains(name) && !known(name) {
                tracing::warn!(tensor = name, file = %path.display(), "unused tensor in the checkpoint");
            }
        }
    }
}

/// Reads tensors and makes layers of them, in one thread.
pub(crate) struct Loader<'a> {
    context: &'a LoadContext<'a>,
    used: BTreeSet<String>,
}

impl<'a> Loader<'a> {
    pub(crate) fn new(context: &'a LoadContext<'a>) -> Self {
        Self {
            context,
            used: BTreeSet::new(),
        }
    }

    /// The rank's share.
    pub(crate) fn shard(&self) -> Shard {
        self.context.shard
    }

    /// Names of the tensors that were read.
    pub(crate) fn into_used(self) -> BTreeSet<String> {
        self.used
    }

    /// A layer of `parts` stacked, each `[out_features, in_features]`, with their biases.
    pub(crate) fn linear(
        &mut self,
        parts: &[Part<'_>],
        in_features: usize,
        split: Split,
        bias: bool,
    ) -> Result<Box<dyn Linear>, ModelError> {
        // Before anything is allocated on the word of a configuration.
        for part in parts {
            let shape = [part.out_features, in_features];
            self.context
                .source
                .expect(&format!("{}.weight", part.name), shape)?;
        }
        let cols = match split {
            Split::In => self.context.shard.range(in_features),
            Split::Out | Split::Vocabulary => 0..in_features,
        };
        let rows_of = |shard: Shard, part: &Part<'_>| match split {
            Split::Out => shard.replicated(part.replicas).range(part.out_features),
            Split::Vocabulary => shard.vocab_range(part.out_features),
            Split::In => 0..part.out_features,
        };
        let size_of = |part: &Part<'_>| match split {
            Split::Vocabulary => self.context.shard.vocab_rows(part.out_features),
            _ => rows_of(self.context.shard, part).len(),
        };
        let out: usize = parts.iter().map(size_of).sum();
        let mut builder = self.context.ops.linear_builder(
            out,
            cols.len(),
            self.context.weights,
            self.context.device,
        )?;
        let mut at = 0;
        for part in parts {
            let name = format!("{}.weight", part.name);
            let shape = [part.out_features, in_features];
            let rows = rows_of(self.context.shard, part);
            self.for_each_block(&name, shape, rows, cols.len(), |block| {
                builder.put(at, block, cols.clone())?;
                at += block.rows();
                Ok(())
            })?;
        }
        // A bias that is added before the sum over ranks is added by one rank.
        let bias = match bias && (split != Split::In || self.context.shard.rank == 0) {
            true => {
                let mut biases = Vec::with_capacity(parts.len());
                for part in parts {
                    let name = format!("{}.bias", part.name);
                    let rows = rows_of(self.context.shard, part);
                    let whole = self.vector(&name, part.out_features, None)?;
                    biases.push(whole.narrow(0, rows.start as i64, rows.len() as i64));
                }
                Some(Tensor::cat(&biases, 0))
            }
            false => None,
        };
        builder.finish(bias, self.context.activations)
    }

    /// A norm of `dim` dimensions; `name` is without `.weight`.
    pub(crate) fn norm(&mut self, name: &str, dim: usize, eps: f64) -> Result<RmsNorm, ModelError> {
        Ok(RmsNorm {
            weight: self.vector(&format!("{name}.weight"), dim, Some(1.0))?,
            eps,
            ops: self.context.ops.clone(),
        })
    }

    /// A vector in the dtype of activations. `dummy` is the value that it has in a dummy model;
    /// random without.
    fn vector(&mut self, name: &str, len: usize, dummy: Option<f64>) -> Result<Tensor, ModelError> {
        let tensor = match (&self.context.source, dummy) {
            (Source::Dummy(_), Some(value)) => Tensor::full(
                [len as i64],
                value,
                (self.context.activations, self.context.device),
            ),
            (Source::Dummy(source), None) => source.rows(name, 0, 1, len).to_tensor(),
            (Source::Checkpoint(source), _) => source.matrix(name, &[len])?.to_tensor(),
        };
        self.count(name, tensor.numel() * self.source_size(name));
        Ok(tensor
            .view([len as i64])
            .to_kind(self.context.activations)
            .to_device(self.context.device))
    }

    /// Calls `f` with successive blocks of `rows` of a tensor, of which it takes `wanted_cols`.
    fn for_each_block(
        &mut self,
        name: &str,
        [all_rows, cols]: [usize; 2],
        rows: std::ops::Range<usize>,
        wanted_cols: usize,
        mut f: impl FnMut(&Matrix<'_>) -> Result<(), ModelError>,
    ) -> Result<(), ModelError> {
        let step = (BLOCK_ELEMENTS / cols).max(1);
        let matrix = match &self.context.source {
            Source::Checkpoint(source) => Some(source.matrix(name, &[all_rows, cols])?),
            Source::Dummy(_) => None,
        };
        let size = self.source_size(name);
        for first in rows.clone().step_by(step) {
            let last = (first + step).min(rows.end);
            match (&self.context.source, &matrix) {
                (Source::Dummy(source), _) => f(&source.rows(name, first, last - first, cols))?,
                (Source::Checkpoint(source), Some(matrix)) => {
                    let block = matrix.slice(first..last);
                    f(&block)?;
                    source.forget(name, first * cols * size..last * cols * size);
                }
                _ => {}
            }
            self.count(name, (last - first) * wanted_cols * size);
        }
        Ok(())
    }

    fn source_size(&self, name: &str) -> usize {
        match &self.context.source {
            Source::Checkpoint(source) => source.kind_of(name),
            Source::Dummy(_) => None,
        }
        .unwrap_or(Kind::Float)
        .elt_size_in_bytes()
    }

    fn count(&mut self, name: &str, bytes: usize) {
        if !self.used.contains(name) {
            self.used.insert(name.to_owned());
        }
        let context = self.context;
        let done = context.done.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        if let Some(progress) = context.progress {
            progress(done.min(context.total), context.total);
        }
    }
}
