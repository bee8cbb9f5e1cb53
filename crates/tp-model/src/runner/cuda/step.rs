//! The two kinds of steps, from what the host gathered to logits.

use batch_scheduler::SampleRow;
use tch::{Kind, Tensor};
use torch_ext::cuda::{Readback, Upload};

use super::{CudaRunner, CudaTicket};
use crate::attention::{AttentionBatch, HostBatch, PagedWork};
use crate::layers::RopeRows;
use crate::runner::prompt_logprobs::PromptRows;

impl CudaRunner {
    /// What attention must know of `rows` rows of one token each. All of it are views of tensors
    /// that later steps fill anew.
    pub(super) fn decode_batch(&self, rows: usize) -> AttentionBatch {
        let all = Tensor::arange(rows as i64, (Kind::Int, self.model.device()));
        self.attention_batch(
            rows,
            rows,
            PagedWork {
                decode: Some(all),
                prefill: None,
                max_context: self.config.max_model_len,
                fresh: 1,
                workspace: Some(self.workspace.shallow_clone()),
            },
        )
    }

    pub(super) fn attention_batch(
        &self,
        tokens: usize,
        rows: usize,
        work: PagedWork,
    ) -> AttentionBatch {
        let t = &self.tensors;
        let (tokens, rows) = (tokens as i64, rows as i64);
        AttentionBatch {
            host: HostBatch::default(),
            query_start: t.query_start.narrow(0, 0, rows + 1),
            context_len: t.context_len.narrow(0, 0, rows),
            block_tables: t.block_tables.narrow(0, 0, rows),
            slots: t.cache_slots.narrow(0, 0, tokens),
            rope: RopeRows {
                cos: self.rope.0.shallow_clone(),
                sin: self.rope.1.shallow_clone(),
                index: t.positions.narrow(0, 0, tokens),
            },
            work: Some(work),
        }
    }

    /// A step of `rows` rows of one token each, from what [`CudaRunner::prepare`] made, and what the stage before gave,
    /// to logits, where this rank gets them, or to what the next stage gets.
    pub(super) fn decode(
        &self,
        rows: usize,
        batch: &AttentionBatch,
    ) -> Result<Option<Tensor>, String> {
        let ids = self.tensors.ids.narrow(0, 0, rows as i64);
        let input = self.input.as_ref().map(|all| all.narrow(0, 0, rows as i64));
        let hidden = self
            .model
            .forward_stage(&ids, input, None, &self.cache, batch);
        let output = hidden.and_then(|hidden| match self.model.stage().is_last() {
            true => self.model.raw_logits(&hidden),
            false => Ok(Some(hidden)),
        });
        output.map_err(|e| e.to_string())
    }

    /// Who computes what in the step that was gathered. The lists go through pinned memory: a
    /// plain copy would wait for the step before.
    pub(super) fn paged_work(&mut self) -> Result<PagedWork, String> {
        let rows = self.ints.lens.iter().zip(&self.ints.contexts).enumerate();
        let (mut decode, mut chunks) = (Vec::new(), Vec::new());
        for (row, (&len, &context)) in rows {
            match len {
                1 => decode.push(row as i32),
                _ => chunks.push((row, len, context)),
            }
        }
        let tiles = self
            .kernels
            .prefill_tiles(self.heads, self.config.block_size, &chunks);
        let send = |upload: &mut Upload, values: &[i32]| {
            upload.send(values).map_err(|e| e.to_string())?;
            let sent = upload.device.narrow(0, 0, values.len() as i64);
            Ok::<_, String>((!values.is_empty()).then_some(sent))
        };
        Ok(PagedWork {
            decode: send(&mut self.uploads.decode, &decode)?,
            prefill: send(&mut self.uploads.tiles, &tiles)?.map(|tiles| tiles.view([-1, 3])),
            max_context: self.config.max_model_len,
            // A prompt's tokens may be rows of their own, which attend to one another.
            fresh: match self.model.deterministic() {
                true => usize::MAX,
                false => 1,
            },
            workspace: Some(self.workspace.shallow_clone()),
        })
    }

    /// Outside of captured steps, whose arguments are fixed: the rows are elsewhere each time.
    ///
    /// `draws`: whether the captured draw is to take place. `told`: where the step's tokens go.
    pub(super) fn prepare(
        &mut self,
        rows: usize,
        draws: bool,
        told: Option<(&mut Readback, usize)>,
    ) -> Result<(), String> {
        self.kernels
            .prepare_rows(
                rows,
                &mut self.uploads.rows,
                &self.uploads.tokens.device,
                &self.last_token,
                &self.tables,
                &self.limits,
                draws,
                told,
                &mut self.tensors,
            )
            .map_err(|e| e.to_string())
    }

    pub(super) fn send_rows(&mut self) -> Result<(), String> {
        self.ints.check(&self.limits)?;
        let sent = self.uploads.rows.put(&self.ints.rows);
        sent.and_then(|()| self.uploads.tokens.send(&self.ints.tokens))
            .map_err(|e| e.to_string())
    }

    /// Every sequence gets one token, and samples the next.
    pub(super) fn decode_step(
        &mut self,
        rows: usize,
        ticket: &mut CudaTicket,
    ) -> Result<(), String> {
        let graph = self.graphs.fitting(rows);
        let size = graph.as_ref().map_or(rows, |graph| graph.size);
        let may_draw = graph.is_some_and(|graph| graph.tokens.is_some());
        let draws = may_draw && self.needs_no_more(ticket)?;
        ticket.tokens = self.readback()?;
        self.ints.pad(size);
        self.send_rows()?;
        self.prepare(size, draws, told(ticket))?;
        let count = size as i64;
        if let (Some(place), Some(input)) = (&self.input, self.receive(count)?) {
            place.narrow(0, 0, count).copy_(&input);
        }
        let mut drawn = None;
        let output = match self.graphs.fitting(rows) {
            Some(graph) => {
                let met = self.model.groups().tp.meet();
                met.map_err(|e| e.to_string())?;
                graph.graph.replay().map_err(|e| e.to_string())?;
                drawn = graph.tokens.as_ref().map(Tensor::shallow_clone);
                graph.output.as_ref().map(Tensor::shallow_clone)
            }
            None => self.decode(rows, &self.decode_batch(rows))?,
        };
        if !self.model.stage().is_last() {
            return self.hand_on(output.as_ref());
        }
        let slots = self.tensors.row_slots.narrow(0, 0, count);
        let positions = self.tensors.row_ends.narrow(0, 0, count);
        match drawn {
            Some(tokens) if draws => self.drawn(tokens, ticket),
            _ => self.sample(output.as_ref(), &slots, &positions, ticket),
        }
    }

    /// Prompts, or prompts beside decoding.
    pub(super) fn mixed_step(
        &mut self,
        wanted: &[PromptRows],
        ticket: &mut CudaTicket,
    ) -> Result<(), String> {
        self.send_rows()?;
        let (rows, tokens) = (self.ints.num_rows(), self.ints.num_tokens);
        if !ticket.samples.is_empty() {
            ticket.tokens = self.readback()?;
        }
        self.prepare(rows, false, told(ticket))?;
        let work = self.paged_work()?;
        let batch = self.attention_batch(tokens, rows, work);
        let ids = self.tensors.ids.narrow(0, 0, tokens as i64);
        let input = self.receive(tokens as i64)?;
        if !self.model.stage().is_last() {
            let output = self
                .model
                .forward_stage(&ids, input, None, &self.cache, &batch);
            return self.hand_on(Some(&output.map_err(|e| e.to_string())?));
        }
        let count = ticket.samples.len();
        let row_of = |sample: &SampleRow| sample.row as usize;
        let ints = &self.ints;
        let last = ticket.samples.iter().map(|s| ints.last[row_of(s)]);
        let slots = ticket.samples.iter().map(|s| s.slot.0 as i32);
        let ends = ticket.samples.iter().map(|s| ints.ends[row_of(s)]);
        let picked: Vec<i32> = last.chain(slots).chain(ends).collect();
        self.uploads
            .samples
            .send(&picked)
            .map_err(|e| e.to_string())?;
        let part = |at: usize| {
            self.uploads
                .samples
                .device
                .narrow(0, (at * count) as i64, count as i64)
        };
        let sampled = part(0).to_kind(Kind::Int64);
        let prompt: Vec<i64> = wanted
            .iter()
            .flat_map(|w| w.rows.clone())
            .map(|r| r as i64)
            .collect();
        let flat = match prompt.is_empty() {
            true => sampled,
            false => {
                let prompt = Tensor::from_slice(&prompt).to_device(self.model.device());
                Tensor::cat(&[sampled, prompt], 0)
            }
        };
        let hidden = self
            .model
            .forward_stage(&ids, input, Some(&flat), &self.cache, &batch)
            .map_err(|e| e.to_string())?;
        if count > 0 {
            let logits = self.model.raw_logits(&hidden.narrow(0, 0, count as i64));
            let logits = logits.map_err(|e| e.to_string())?;
            let (slots, positions) = (part(1), part(2));
            self.sample(logits.as_ref(), &slots, &positions, ticket)?;
        }
        let mut scratch = Vec::new();
        let mut first = count as i64;
        for want in wanted {
            let entries = want.logprobs(
                &self.model,
                &hidden,
                first,
                self.followers.as_ref(),
                &mut scratch,
            );
            let entries = entries.map_err(|e| e.what)?;
            first += want.rows.len() as i64;
            ticket.prompt_extras.push(entries);
        }
        Ok(())
    }
}

/// Where a step's tokens go on the host, and how many.
fn told(ticket: &mut CudaTicket) -> Option<(&mut Readback, usize)> {
    let count = ticket.samples.len();
    Some((ticket.tokens.as_mut()?, count))
}
