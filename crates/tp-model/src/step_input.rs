//! The flat inputs of one forward pass, built into buffers that are reused from step to step.

use tch::{Device, Kind, Tensor};

use crate::attention::{AttentionBatch, HostBatch};
use crate::config::ModelConfig;
use crate::layers::{RopeRows, RopeSpan, Rotary};

/// Collects the sequences of a step, then yields the tensors that the model takes.
#[derive(Debug)]
pub(crate) struct StepInput {
    block_size: usize,
    device: Device,
    rotary: Rotary,
    ids: Vec<i64>,
    positions: Vec<i64>,
    slots: Vec<i64>,
    spans: Vec<RopeSpan>,
    /// Tables of different lengths, one after the other.
    tables: Vec<i32>,
    table_ends: Vec<usize>,
    batch: AttentionBatch,
}

/// New tokens at the end of one sequence.
pub(crate) struct SequenceInput<'a> {
    /// The tokens to compute.
    pub tokens: &'a [u32],
    /// Position of the first of them.
    pub start: usize,
    /// Length of the sequence's prompt.
    pub num_prompt: usize,
    /// Blocks that hold (at least) the sequence up to and including `tokens`.
    pub blocks: &'a [i32],
}

impl StepInput {
    pub(crate) fn new(config: &ModelConfig, block_size: usize, device: Device) -> Self {
        let none = || Tensor::zeros([0], (Kind::Int64, device));
        Self {
            block_size,
            device,
            rotary: Rotary::new(&config.rope, device),
            ids: Vec::new(),
            positions: Vec::new(),
            slots: Vec::new(),
            spans: Vec::new(),
            tables: Vec::new(),
            table_ends: Vec::new(),
            batch: AttentionBatch {
                host: HostBatch::default(),
                query_start: none(),
                context_len: none(),
                block_tables: none(),
                slots: none(),
                rope: RopeRows {
                    cos: none(),
                    sin: none(),
                    index: none(),
                },
                #[cfg(feature = "cuda")]
                work: None,
            },
        }
    }

    /// Begins a step.
    pub(crate) fn clear(&mut self) {
        self.ids.clear();
        self.positions.clear();
        self.slots.clear();
        self.spans.clear();
        self.tables.clear();
        self.table_ends.clear();
        self.batch.host.query_start.clear();
        self.batch.host.query_start.push(0);
        self.batch.host.context_len.clear();
    }

    /// Adds a sequence. Its blocks must reach its last token.
    pub(crate) fn push(&mut self, sequence: &SequenceInput<'_>) {
        let end = sequence.start + sequence.tokens.len();
        let used = end.div_ceil(self.block_size);
        self.ids
            .extend(sequence.tokens.iter().map(|id| i64::from(*id)));
        for position in sequence.start..end {
            let block = sequence.blocks[position / self.block_size] as usize;
            let slot = block * self.block_size + position % self.block_size;
            self.positions.push(position as i64);
            self.slots.push(slot as i64);
        }
        self.spans.push(RopeSpan {
            start: sequence.start,
            len: sequence.tokens.len(),
            num_prompt: sequence.num_prompt,
        });
        self.tables.extend_from_slice(&sequence.blocks[..used]);
        self.table_ends.push(self.tables.len());
        self.batch.host.query_start.push(self.ids.len() as i32);
        self.batch.host.context_len.push(end as i32);
    }

    /// Where each sequence's tokens end in the flat list.
    pub(crate) fn row_ends(&self) -> &[i32] {
        &self.batch.host.query_start[1..]
    }

    /// How many tokens were added.
    pub(crate) fn num_tokens(&self) -> usize {
        self.ids.len()
    }

    /// Token ids (int64) and all that attention needs.
    pub(crate) fn finish(&mut self) -> (Tensor, &AttentionBatch) {
        let starts = || std::iter::once(0).chain(self.table_ends.iter().copied());
        let lengths = || {
            starts()
                .zip(&self.table_ends)
                .map(|(start, end)| end - start)
        };
        let width = lengths().max().unwrap_or(0);
        let batch = &mut self.batch;
        let host = &mut batch.host;
        host.table_width = width;
        host.block_tables.clear();
        for (start, end) in starts().zip(&self.table_ends) {
            host.block_tables.extend(&self.tables[start..*end]);
            let row_end = host.block_tables.len().next_multiple_of(width.max(1));
            host.block_tables.resize(row_end, 0);
        }
        let upload = |values: &[i32]| Tensor::from_slice(values).to_device(self.device);
        batch.query_start = upload(&host.query_start);
        batch.context_len = upload(&host.context_len);
        batch.block_tables = upload(&host.block_tables).view([-1, width as i64]);
        batch.slots = Tensor::from_slice(&self.slots).to_device(self.device);
        batch.rope = self.rotary.rows(&self.spans, &self.positions);
        let ids = Tensor::from_slice(&self.ids).to_device(self.device);
        (ids, &self.batch)
    }
}
