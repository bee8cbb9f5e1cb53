//! Capturing decode steps, and what memory the largest steps take.

use std::sync::Arc;

use tch::{Kind, Tensor};
use torch_ext::cuda::{Graph, Kernels};

use super::graphs::{DecodeGraph, capture_sizes};
use super::{CudaRunner, options};
use crate::error::ModelError;
use crate::model::Model;
use crate::runner::{RunnerConfig, WorkingMemory};

/// Memory of a captured graph beside its tensors, about.
const GRAPH_BYTES: u64 = 2 << 20;

impl CudaRunner {
    /// What the largest steps take beside weights and cache, found by running them on a cache
    /// of two blocks. The model comes back.
    pub(crate) fn measure(
        model: Model,
        device: usize,
        kernels: Arc<Kernels>,
        config: &RunnerConfig,
    ) -> Result<(Model, WorkingMemory), ModelError> {
        let config = RunnerConfig {
            num_blocks: 2,
            ..*config
        };
        let _no_grad = tch::no_grad_guard();
        let mut runner = Self::without_graphs(model, kernels, &config)?;
        runner.meet_stages().map_err(options)?;
        runner.rehearse().map_err(options)?;
        runner.capture_graph(config.max_num_seqs)?;
        runner
            .prompts(config.max_num_batched_tokens)
            .map_err(options)?;
        runner.kernels.finish_rehearsal();
        // A rank that hangs before this keeps the others waiting here.
        let waits = runner.model.groups().enter();
        torch_ext::cuda::synchronize(device).map_err(options)?;
        drop(waits);
        let during = torch_ext::cuda::memory(device).map_err(options)?;
        let model = runner.into_model();
        torch_ext::cuda::release_memory().map_err(options)?;
        let after = torch_ext::cuda::memory(device).map_err(options)?;
        let num_graphs = match model.enforce_eager() {
            true => 0,
            false => capture_sizes(config.max_num_seqs).len(),
        };
        let work = WorkingMemory {
            steps: after.free.saturating_sub(during.free),
            graphs: num_graphs as u64 * GRAPH_BYTES,
            num_graphs,
        };
        Ok((model, work))
    }

    /// The model; all the rest is dropped.
    fn into_model(self) -> Model {
        self.model
    }

    /// Has the kernels compiled that steps of all sizes take, all at a time: before the first of them
    /// is needed, and none of them while requests wait.
    fn rehearse(&mut self) -> Result<(), String> {
        // Where kernels, or the plans for them, change with the number of rows or tokens.
        const ROWS: [usize; 9] = [1, 2, 4, 8, 16, 24, 40, 72, 136];
        const TOKENS: [usize; 6] = [2, 12, 24, 100, 600, 2_100];
        let kernels = self.kernels.clone();
        kernels.rehearse(|| {
            let (most_rows, most) = (self.config.max_num_seqs, self.config.max_num_batched_tokens);
            let fewer = ROWS.into_iter().filter(|rows| *rows < most_rows);
            for rows in fewer.chain([most_rows]) {
                self.padding(rows)?;
                let output = self.decode(rows, &self.decode_batch(rows))?;
                let t = &self.tensors;
                let [slots, positions] =
                    [&t.row_slots, &t.row_ends].map(|all| all.narrow(0, 0, rows as i64));
                if let (Some(sampler), Some(logits)) = (&self.sampler, &output) {
                    let asked = sampler.rehearse(logits, &slots, &positions);
                    asked.map_err(|e| e.to_string())?;
                }
            }
            for tokens in TOKENS.into_iter().filter(|tokens| *tokens < most) {
                self.prompts(tokens)?;
            }
            self.prompts(most)?;
            self.copy_blocks(&[(0, 1)])
        })
    }

    /// Rows of padding, as [`CudaRunner::decode`] reads them.
    fn padding(&mut self, rows: usize) -> Result<(), String> {
        self.ints.clear();
        self.ints.pad(rows);
        self.send_rows()?;
        self.prepare(rows)
    }

    /// A step of so many prompt tokens, in as few sequences as can hold them, whose keys and values all
    /// go to one block.
    fn prompts(&mut self, mut left: usize) -> Result<(), String> {
        let slots = self.config.max_num_seqs;
        self.ints.clear();
        let _ = self.tables.fill_(1);
        self.ints.tokens.resize(left, 0);
        // One that decodes beside the prompts, if these find room in the other slots: a step of both
        // takes kernels that neither takes alone, and they are to be compiled before requests come.
        let beside = left > 1 && (slots - 1) * self.config.max_model_len >= left - 1;
        if beside {
            self.ints.push_row(0, 0, 1, 0);
            left -= 1;
        }
        for slot in usize::from(beside)..slots {
            let len = left.min(self.config.max_model_len);
            if len == 0 {
                break;
            }
            self.ints.push_row(slot as i32, 0, len, 0);
            left -= len;
        }
        let rows = self.ints.num_rows();
        self.send_rows()?;
        self.prepare(rows)?;
        let work = self.paged_work()?;
        let batch = self.attention_batch(self.ints.num_tokens, rows, work);
        let ids = self.tensors.ids.narrow(0, 0, self.ints.num_tokens as i64);
        let sampled = Tensor::zeros([slots as i64], (Kind::Int64, self.model.device()));
        // What stages exchange is as large as what they compute: nothing needs to come.
        let (is_first, is_last) = (self.model.stage().is_first(), self.model.stage().is_last());
        let input = (!is_first).then(|| self.model.activations(ids.size()[0]).zero_());
        let hidden = self.model.forward_stage(
            &ids,
            input,
            is_last.then_some(&sampled),
            &self.cache,
            &batch,
        );
        let output = hidden.and_then(|hidden| match is_last {
            true => self.model.raw_logits(&hidden),
            false => Ok(Some(hidden)),
        });
        drop(output.map_err(|e| e.to_string())?);
        Ok(())
    }

    /// Captures the decode step of `size` rows.
    pub(super) fn capture_graph(&mut self, size: usize) -> Result<(), ModelError> {
        // Once for real: compiles kernels and lets libtorch choose its own. Padding only.
        self.padding(size).map_err(options)?;
        let batch = self.decode_batch(size);
        drop(self.decode(size, &batch).map_err(options)?);
        let (graph, output) =
            Graph::capture(self.graphs.pool, || self.decode(size, &batch)).map_err(options)?;
        self.graphs.graphs.push(DecodeGraph {
            size,
            graph,
            output: output.map_err(options)?,
            _batch: batch,
        });
        Ok(())
    }
}
