//! Capturing decode steps, and what memory the largest steps take.

use std::sync::Arc;

use tch::{Kind, Tensor};
use torch_ext::cuda::{Graph, Kernels};

use super::graphs::{DecodeGraph, capture_sizes};
use super::{CudaRunner, options};
use crate::error::{ModelError, RunnerError};
use crate::model::Model;
use crate::runner::{RunnerConfig, WorkingMemory, guarded};

/// Tokens of a prompt that is short.
const FEW: usize = 16;
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
        let rehearsed = guarded(0, || {
            let failed = |what| RunnerError::Device { step: 0, what };
            runner.rehearse(device).map_err(failed)
        });
        match rehearsed {
            // What went wrong does so again where it matters; if not, kernels are compiled later.
            Err(e) if runner.is_alone() => {
                tracing::warn!("kernels are compiled when they are first needed: {e}");
            }
            rehearsed => rehearsed.map_err(options)?,
        }
        runner.capture_graph(config.max_num_seqs)?;
        runner
            .prompts(config.max_num_batched_tokens, 1)
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
    fn rehearse(&mut self, device: usize) -> Result<(), String> {
        // Where kernels, or the plans for them, change with the number of rows, of tokens, and of rows
        // that decode beside a prompt.
        const ROWS: [usize; 12] = [1, 2, 4, 8, 16, 24, 40, 72, 136, 168, 200, 232];
        const TOKENS: [usize; 21] = [
            2, 3, 4, 5, 7, 8, 9, 10, 12, 13, 16, 17, 24, 40, 72, 136, 168, 200, 232, 600, 2_100,
        ];
        const BESIDE: [usize; 8] = [8, 16, 24, 40, 64, 72, 128, 192];
        let kernels = self.kernels.clone();
        let (most_rows, most) = (self.config.max_num_seqs, self.config.max_num_batched_tokens);
        kernels.rehearse(|| {
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
                self.settle(device)?;
            }
            let fewer = TOKENS.into_iter().filter(|tokens| *tokens < most);
            let prompts = fewer.chain([most]).map(|tokens| (tokens, 1));
            let mixed = BESIDE.into_iter().chain([most_rows - 1]);
            let mixed = mixed.map(|beside| (beside + 2, beside));
            let fitting = |&(tokens, beside): &(usize, usize)| tokens <= most && beside < most_rows;
            for (tokens, beside) in prompts.chain(mixed.filter(fitting)) {
                self.prompts(tokens, beside)?;
                self.settle(device)?;
            }
            self.copy_blocks(&[(0, 1)])?;
            self.settle(device)
        })?;
        // Pieces of memory for steps of all sizes would count as what the largest one takes.
        torch_ext::cuda::release_memory().map_err(|e| e.to_string())
    }

    /// Waits for the other ranks' part of a step, no longer than the group's timeout.
    fn settle(&self, device: usize) -> Result<(), String> {
        let _waits = self.model.groups().enter();
        torch_ext::cuda::synchronize(device).map_err(|e| e.to_string())
    }

    /// Rows of padding, as [`CudaRunner::decode`] reads them.
    fn padding(&mut self, rows: usize) -> Result<(), String> {
        self.ints.clear();
        self.ints.pad(rows);
        self.send_rows()?;
        self.prepare(rows, false, None)
    }

    /// A step of so many tokens, in as few sequences as can hold them, whose keys and values all go to
    /// one block. `beside` of them are sequences that decode, if the others find room in what slots are
    /// left: a step of both takes kernels that neither takes alone.
    fn prompts(&mut self, tokens: usize, beside: usize) -> Result<(), String> {
        let slots = self.config.max_num_seqs;
        self.ints.clear();
        let _ = self.tables.fill_(1);
        self.ints.tokens.resize(tokens, 0);
        let mut beside = beside.min(slots - 1).min(tokens - 1);
        if (slots - beside) * self.config.max_model_len < tokens - beside {
            beside = 0;
        }
        for slot in 0..beside {
            self.ints.push_row(slot as i32, 0, 1, 0);
        }
        let mut left = tokens - beside;
        for slot in beside..slots {
            let len = left.min(self.config.max_model_len);
            if len == 0 {
                break;
            }
            match self.model.deterministic() && len <= FEW {
                // As `StepInts::gather` does with all; of many it would be the same kernel, for long.
                true => (0..len).for_each(|i| self.ints.push_row(slot as i32, i, 1, i as i32)),
                false => self.ints.push_row(slot as i32, 0, len, 0),
            }
            left -= len;
        }
        let rows = self.ints.num_rows();
        self.send_rows()?;
        self.prepare(rows, false, None)?;
        let work = self.paged_work()?;
        let batch = self.attention_batch(self.ints.num_tokens, rows, work);
        let ids = self.tensors.ids.narrow(0, 0, self.ints.num_tokens as i64);
        let sampled = slots.min(tokens) as i64;
        let sampled = Tensor::zeros([sampled], (Kind::Int64, self.model.device()));
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
        let step = || {
            let output = self.decode(size, &batch)?;
            let tokens = self.draw(size, output.as_ref())?;
            Ok::<_, String>((output, tokens))
        };
        drop(step().map_err(options)?);
        let (graph, made) = Graph::capture(self.graphs.pool, step).map_err(options)?;
        let (output, tokens) = made.map_err(options)?;
        self.graphs.graphs.push(DecodeGraph {
            size,
            graph,
            output,
            tokens,
            _batch: batch,
        });
        Ok(())
    }
}
