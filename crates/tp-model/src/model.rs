//! A loaded model: configuration, weights, and who computes.

use std::path::Path;
use std::sync::atomic::AtomicU64;

use tch::{Device, Kind, Tensor};

use crate::attention::{AttentionBackend, AttentionBatch};
use crate::comm::{Collective, CommError, Solo};
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::kv_cache::{KvCache, KvShape};
use crate::models::Decoder;
use crate::options::LoadOptions;
use crate::parallel::{ParallelGroups, Stage};
use crate::weights::{LoadContext, Shard, Source};

/// A model that is ready to run. It holds no state of any sequence: see [`crate::Session`] for
/// one sequence and [`crate::Runner`] for a batch.
#[derive(Debug)]
pub struct Model {
    config: ModelConfig,
    decoder: Decoder,
    attention: Box<dyn AttentionBackend>,
    groups: ParallelGroups,
    stage: Stage,
    /// Dtype of activations.
    activations: Kind,
    #[cfg(feature = "cuda")]
    kernels: Option<std::sync::Arc<torch_ext::cuda::Kernels>>,
    #[cfg(feature = "cuda")]
    deterministic: bool,
    #[cfg(feature = "cuda")]
    enforce_eager: bool,
    device: Device,
    kind: Kind,
}

impl Model {
    /// Loads the checkpoint in `dir`.
    pub fn load(dir: &Path, options: &LoadOptions<'_>) -> Result<Self, ModelError> {
        Self::load_shard(dir, options, Box::new(Solo))
    }

    /// Loads the share of `comm`'s rank of the checkpoint in `dir`: its heads, its columns of the
    /// MLP and its part of the vocabulary. Nothing else of the files is read, and no other rank is
    /// waited for. A model that cannot be divided so is an error that names the sizes that work.
    pub fn load_shard(
        dir: &Path,
        options: &LoadOptions<'_>,
        comm: Box<dyn Collective>,
    ) -> Result<Self, ModelError> {
        let config = ModelConfig::from_dir(dir)?;
        let partition = vec![config.num_layers];
        Self::load_stage(dir, options, ParallelGroups::tensor(comm), partition)
    }

    /// As [`Model::load_shard`], of the stage that the rank has in `groups.pp` alone: its layers, on
    /// the first stage the embedding, and on the last the final norm and the output projection.
    /// `partition` says how many layers each stage has
    /// ([`ParallelConfig::partition`](crate::ParallelConfig::partition)).
    pub fn load_stage(
        dir: &Path,
        options: &LoadOptions<'_>,
        groups: ParallelGroups,
        partition: Vec<usize>,
    ) -> Result<Self, ModelError> {
        let _no_grad = tch::no_grad_guard();
        let config = ModelConfig::from_dir(dir)?;
        let shard = Shard {
            rank: groups.tp.rank(),
            world_size: groups.tp.world_size(),
        };
        shard.check(&config)?;
        let layers: usize = partition.iter().sum();
        if layers != config.num_layers || partition.len() != groups.pp.world_size() {
            return Err(ModelError::Options(format!(
                "{partition:?} are not the {} layers of this model on {} stages",
                config.num_layers,
                groups.pp.world_size()
            )));
        }
        let stage = Stage::new(groups.pp.rank(), partition)?;
        check_device(options.device)?;
        let kind = options.dtype.resolve(&config);
        let activations = match options.device {
            Device::Cpu => Kind::Float,
            _ => kind,
        };
        let compute =
            options
                .backend
                .build(options.device, kind, &config, options.deterministic)?;
        let source = options.format.open(dir)?;
        let total = match &source {
            Source::Checkpoint(checkpoint) => checkpoint.bytes(),
            Source::Dummy(_) => config.num_parameters() * 4,
        } / (shard.world_size * stage.count()) as u64;
        let context = LoadContext {
            source,
            shard,
            ops: compute.ops,
            weights: kind,
            activations,
            device: options.device,
            progress: options.progress,
            done: AtomicU64::new(0),
            total,
        };
        let (decoder, used) = Decoder::load(&context, &config, &stage)?;
        // Old checkpoints hold rotary frequencies, which follow from the configuration; and the
        // output projection may be there twice although it is tied.
        context.finish(&used, |name| {
            name.ends_with("rotary_emb.inv_freq")
                || (name == "lm_head.weight" && config.tie_word_embeddings)
                || stage.is_elsewhere(name, config.tie_word_embeddings)
        });
        Ok(Self {
            config,
            decoder,
            attention: compute.attention,
            #[cfg(feature = "cuda")]
            kernels: compute.kernels,
            #[cfg(feature = "cuda")]
            deterministic: options.deterministic,
            #[cfg(feature = "cuda")]
            enforce_eager: options.enforce_eager,
            groups,
            stage,
            activations,
            device: options.device,
            kind,
        })
    }

    /// The same model with another attention, made of its own.
    #[cfg(test)]
    pub(crate) fn map_attention(
        mut self,
        map: impl FnOnce(Box<dyn AttentionBackend>) -> Box<dyn AttentionBackend>,
    ) -> Self {
        self.attention = map(self.attention);
        self
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where the model runs.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Dtype of weights and cache.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What connects this rank to the others.
    pub fn groups(&self) -> &ParallelGroups {
        &self.groups
    }

    /// Which layers this rank has.
    pub fn stage(&self) -> &Stage {
        &self.stage
    }

    /// Whether this rank gets the logits.
    pub fn has_logits(&self) -> bool {
        self.stage.is_last() && self.groups.tp.rank() == 0
    }

    /// Which share of the model this is.
    pub fn shard(&self) -> Shard {
        Shard {
            rank: self.groups.tp.rank(),
            world_size: self.groups.tp.world_size(),
        }
    }

    /// Bytes of this rank's weights.
    pub fn weight_bytes(&self) -> usize {
        self.decoder.weight_bytes()
    }

    /// Shape of this rank's cache for blocks of `block_size` tokens.
    pub fn kv_shape(&self, block_size: usize) -> KvShape {
        KvShape {
            num_layers: self.stage.layers().len(),
            num_kv_heads: self.shard().kv_heads(self.config.num_kv_heads).0,
            head_dim: self.config.head_dim,
            block_size,
            kind: self.kind,
        }
    }

    /// Bytes of one block of `block_size` tokens, keys and values of all layers that this rank has.
    pub fn kv_bytes_per_block(&self, block_size: usize) -> usize {
        self.kv_shape(block_size).bytes_per_block()
    }

    /// As [`Model::kv_bytes_per_block`], on the stage that has most layers. All stages have the
    /// same number of blocks, so this is what limits it.
    pub fn most_kv_bytes_per_block(&self, block_size: usize) -> usize {
        let largest = KvShape {
            num_layers: self.stage.most_layers(),
            ..self.kv_shape(block_size)
        };
        largest.bytes_per_block()
    }

    /// How many blocks of `block_size` tokens fit `bytes`.
    pub fn num_blocks_for(&self, bytes: usize, block_size: usize) -> usize {
        bytes / self.kv_bytes_per_block(block_size)
    }

    /// Runs this rank's layers for the tokens `ids` (int64), with what comes from the stage before,
    /// and writes their keys and values. On the last stage: final hidden states of the tokens at
    /// `rows` (int64; `None`: of all). The others send their output on and return `None`.
    pub(crate) fn forward(
        &self,
        ids: &Tensor,
        rows: Option<&Tensor>,
        cache: &KvCache,
        batch: &AttentionBatch,
    ) -> Result<Option<Tensor>, CommError> {
        let input = self.receive(ids.size()[0])?;
        let output = self.forward_stage(ids, input, rows, cache, batch)?;
        if self.stage.is_last() {
            return Ok(Some(output));
        }
        self.hand_on(&output)?;
        Ok(None)
    }

    /// As [`Model::forward`], of this stage alone: `input` is what [`Model::receive`] gave, and
    /// what a stage that is not the last returns is for [`Model::hand_on`].
    pub(crate) fn forward_stage(
        &self,
        ids: &Tensor,
        input: Option<Tensor>,
        rows: Option<&Tensor>,
        cache: &KvCache,
        batch: &AttentionBatch,
    ) -> Result<Tensor, CommError> {
        self.decoder.forward(
            ids,
            input,
            rows,
            cache,
            batch,
            self.attention.as_ref(),
            self.groups.tp.as_ref(),
        )
    }

    /// What the stage before has for this one, `[tokens, hidden]` in the dtype of activations;
    /// `None` on the first stage.
    pub(crate) fn receive(&self, tokens: i64) -> Result<Option<Tensor>, CommError> {
        let Some(before) = self.stage.index().checked_sub(1) else {
            return Ok(None);
        };
        let like = self.activations(tokens);
        self.groups.pp.recv(&like, before).map(Some)
    }

    /// Gives this stage's output to the next one.
    pub(crate) fn hand_on(&self, output: &Tensor) -> Result<(), CommError> {
        self.groups.pp.send(output, self.stage.index() + 1)
    }

    /// Room for what goes from stage to stage, `[tokens, hidden]`.
    pub(crate) fn activations(&self, tokens: i64) -> Tensor {
        let size = [tokens, self.config.hidden_size as i64];
        Tensor::empty(size, (self.activations, self.device))
    }

    /// Logits (float32, `[rows, vocab]`) of the last stage's hidden states, where
    /// [`Model::has_logits`]; `None` on the stage's other ranks, which must call this too.
    pub(crate) fn logits(&self, hidden: &Tensor) -> Result<Option<Tensor>, CommError> {
        self.decoder.logits(hidden, self.groups.tp.as_ref())
    }

    /// As [`Model::logits`], in the dtype of activations.
    #[cfg(feature = "cuda")]
    pub(crate) fn raw_logits(&self, hidden: &Tensor) -> Result<Option<Tensor>, CommError> {
        self.decoder.raw_logits(hidden, self.groups.tp.as_ref())
    }

    /// Whether logits must not depend on what else is in a step.
    #[cfg(feature = "cuda")]
    pub(crate) fn deterministic(&self) -> bool {
        self.deterministic
    }

    /// Whether decode steps go without captured graphs.
    #[cfg(feature = "cuda")]
    pub(crate) fn enforce_eager(&self) -> bool {
        self.enforce_eager
    }

    /// The CUDA kernels, if those run this model.
    #[cfg(feature = "cuda")]
    pub(crate) fn kernels(&self) -> Option<std::sync::Arc<torch_ext::cuda::Kernels>> {
        self.kernels.clone()
    }
}

/// Loads libtorch's CUDA half if the model is to run there.
fn check_device(device: Device) -> Result<(), ModelError> {
    let Device::Cuda(index) = device else {
        return Ok(());
    };
    torch_ext::cuda::load().map_err(|e| ModelError::Options(format!("device cuda: {e}")))?;
    match torch_ext::cuda::device_count() {
        count if index < count => Ok(()),
        count => Err(ModelError::Options(format!(
            "device cuda:{index}: libtorch sees {count} CUDA devices; check the driver"
        ))),
    }
}
