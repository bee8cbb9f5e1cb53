//! Sequences that leave for the host tier and come back.

use rand::Rng;

use paged_kv::KvAllocator;

use super::{Parked, Seq, World};

impl World {
    pub(super) fn swap_out(&mut self, seq: usize) {
        let seq = self.seqs.swap_remove(seq);
        let (computed, blocks) = (seq.values.len(), seq.table.blocks().to_vec());
        let used = computed
            .div_ceil(self.size())
            .saturating_sub(seq.table.num_reclaimed());
        let before = self.kv.usage();
        let mut moves = Vec::new();
        match self.kv.swap_out(seq.table, computed, &mut moves) {
            Ok(table) => {
                if let Some(model) = &mut self.model {
                    blocks.iter().rev().for_each(|&block| model.release(block));
                }
                assert_eq!(
                    (table.num_computed(), table.num_host_blocks()),
                    (computed, used)
                );
                self.sim.swap_out(&moves);
                self.parked.push(Parked {
                    table,
                    salt: seq.salt,
                    tokens: seq.tokens,
                    values: seq.values,
                });
            }
            Err(table) => {
                assert!(used > before.host_free && moves.is_empty());
                assert_eq!(self.kv.usage(), before, "a refusal changed something");
                self.seqs.push(Seq { table, ..seq });
            }
        }
    }

    pub(super) fn swap_in(&mut self) {
        if self.parked.is_empty() {
            return;
        }
        let parked = self.rng.random_range(0..self.parked.len());
        let parked = self.parked.swap_remove(parked);
        if self.rng.random_bool(0.2) {
            self.kv.discard(parked.table);
            return;
        }
        let Parked {
            salt,
            tokens,
            values,
            ..
        } = parked;
        let reserve = values.len() + self.rng.random_range(0..=self.size());
        let hits = self
            .model
            .as_ref()
            .map(|m| m.hits(&tokens[..values.len()], salt));
        let before = self.kv.usage();
        let mut moves = Vec::new();
        let result = self.kv.swap_in(parked.table, &tokens, reserve, &mut moves);
        if let (Some(model), Some(hits)) = (&mut self.model, hits) {
            let size = self.setup.block_size as usize;
            let room = model.available() - model.unread(&tokens, salt, hits);
            assert_eq!(result.is_ok(), reserve.div_ceil(size) - hits <= room);
            for (i, &block) in result.iter().flat_map(|t| t.blocks().iter().enumerate()) {
                if i < hits {
                    let prefix = model.prefix(&tokens, salt, i + 1);
                    model.hit(block, &prefix);
                } else {
                    model.take(block);
                }
            }
            if result.is_ok() {
                assert_eq!(moves.len(), values.len().div_ceil(size) - hits);
            }
        }
        match result {
            Ok(table) => {
                self.sim.swap_in(&moves);
                self.swaps += 1;
                self.seqs.push(Seq {
                    table,
                    salt,
                    tokens,
                    values,
                });
            }
            Err(table) => {
                assert_eq!(self.kv.usage(), before, "a refusal changed something");
                self.parked.push(Parked {
                    table,
                    salt,
                    tokens,
                    values,
                });
            }
        }
    }
}
