//! A manager, the simulated buffers and the model, driven by random operations.

use paged_kv::{
    BlockHash, BlockManager, BlockSize, BlockState, BlockTable, CacheObserver, Config, KvAllocator,
    Salt, Stored, SwappedTable, TokenId,
};
use rand::{Rng, RngCore};
use std::collections::{HashSet, VecDeque};

use super::kv_sim::KvSim;
use super::model::Model;

mod swap;

/// Checks that events pair up: nothing stored twice, nothing removed that is not there.
#[derive(Default)]
pub struct Follower(HashSet<BlockHash>);

impl CacheObserver for Follower {
    fn stored(&mut self, event: Stored<'_>) {
        assert!(self.0.insert(event.hash), "stored twice: {event:?}");
        assert_eq!(event.parent.is_none(), event.depth == 0);
    }

    fn removed(&mut self, hash: BlockHash) {
        assert!(self.0.remove(&hash), "removed but not stored: {hash:?}");
    }
}

struct Seq {
    table: BlockTable,
    salt: Salt,
    tokens: Vec<TokenId>,
    /// What the slots must hold: one value a computed token.
    values: Vec<u64>,
}

/// A sequence in the host tier.
struct Parked {
    table: SwappedTable,
    salt: Salt,
    tokens: Vec<TokenId>,
    values: Vec<u64>,
}

#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub block_size: u32,
    pub usable: usize,
    pub host_blocks: u32,
    pub window: Option<usize>,
    pub prefix_caching: bool,
    pub vocabulary: u32,
}

pub struct World {
    setup: Setup,
    kv: BlockManager<Follower>,
    sim: KvSim,
    /// Under a window a child can outlive its parent, which the model does not know.
    model: Option<Model>,
    seqs: Vec<Seq>,
    parked: Vec<Parked>,
    /// Tokens of the sequences that were freed last.
    past: VecDeque<Vec<TokenId>>,
    rng: Box<dyn RngCore>,
    pub refusals: usize,
    pub hits: usize,
    pub copies: usize,
    pub swaps: usize,
}

impl World {
    /// What happens is up to `rng`: a generator, or the bytes of a fuzzer.
    pub fn new(setup: Setup, rng: impl RngCore + 'static) -> Self {
        let size = BlockSize::new(setup.block_size).unwrap();
        let config = Config::new(setup.usable + 1, size)
            .prefix_caching(setup.prefix_caching)
            .host_blocks(setup.host_blocks);
        let kv = BlockManager::with_observer(config, Follower::default()).unwrap();
        let blocks = kv.block_map().map(|(block, _)| block);
        let exact = setup.window.is_none() && setup.prefix_caching;
        Self {
            sim: KvSim::new(
                setup.usable + 1,
                setup.host_blocks as usize,
                size.get(),
                setup.window,
            ),
            model: exact.then(|| Model::new(blocks, size.get())),
            kv,
            setup,
            seqs: Vec::new(),
            parked: Vec::new(),
            past: VecDeque::new(),
            rng: Box::new(rng),
            refusals: 0,
            hits: 0,
            copies: 0,
            swaps: 0,
        }
    }

    fn size(&self) -> usize {
        self.setup.block_size as usize
    }

    /// One random operation, then every check.
    pub fn step(&mut self) {
        let seq = match self.seqs.len() {
            0 => None,
            n => Some(self.rng.random_range(0..n)),
        };
        match (self.rng.random_range(0..100), seq) {
            (0..22, _) | (_, None) => self.allocate(),
            (22..62, Some(seq)) => self.compute(seq),
            (62..72, Some(seq)) => self.rewrite(seq),
            (72..80, Some(seq)) => self.fork(seq),
            (80..93, Some(seq)) => self.free(seq),
            (93..96, Some(seq)) => self.swap_out(seq),
            (96..99, Some(_)) => self.swap_in(),
            (_, Some(_)) => self.clear(),
        }
        self.check();
    }

    fn random_tokens(&mut self, len: usize) -> Vec<TokenId> {
        let vocabulary = self.setup.vocabulary;
        (0..len)
            .map(|_| self.rng.random_range(0..vocabulary))
            .collect()
    }

    /// Often the beginning of an earlier sequence, so that blocks of many tokens match too.
    fn random_prompt(&mut self) -> Vec<TokenId> {
        let len = self.rng.random_range(1..=self.size() * 6);
        let mut tokens = self.random_tokens(len);
        if !self.past.is_empty() && self.rng.random_bool(0.6) {
            let past = &self.past[self.rng.random_range(0..self.past.len())];
            let kept = self.rng.random_range(0..=len.min(past.len()));
            tokens[..kept].copy_from_slice(&past[..kept]);
        }
        tokens
    }

    fn allocate(&mut self) {
        let tokens = self.random_prompt();
        let len = tokens.len();
        let salt = Salt::new(self.rng.random_range(0..5) / 4);
        let use_cache = self.rng.random_bool(0.9);
        let reserve = match self.rng.random_range(0..3) {
            0 => self.rng.random_range(1..=len),
            _ => len,
        };
        let found = self.kv.match_prefix(&tokens, salt);
        let before = self.kv.usage();
        let allocation = self.kv.allocate(&tokens, salt, use_cache, reserve);
        if let Some(model) = &self.model {
            let found = found / self.setup.block_size as usize;
            assert_eq!(found, model.hits(&tokens[..len - 1], salt));
            let hits = if use_cache { found } else { 0 };
            let new = reserve
                .div_ceil(self.setup.block_size as usize)
                .saturating_sub(hits);
            let room = model.available() - model.unread(&tokens, salt, hits);
            assert_eq!(allocation.is_some(), new <= room);
        }
        let Some(allocation) = allocation else {
            assert_eq!(self.kv.usage(), before, "a refusal changed something");
            self.refusals += 1;
            return;
        };
        let (table, cached) = (allocation.table, allocation.num_cached);
        assert_eq!(cached, if use_cache { found } else { 0 });
        assert!(cached < len && table.blocks().len() * self.size() >= reserve);
        self.hits += cached;
        if let Some(model) = &mut self.model {
            let hits = cached / self.setup.block_size as usize;
            for (i, &block) in table.blocks().iter().enumerate() {
                if i < hits {
                    let prefix = model.prefix(&tokens, salt, i + 1);
                    model.hit(block, &prefix);
                } else {
                    model.take(block);
                }
            }
        }
        let mut values = Vec::new();
        for _ in 0..cached {
            values.push(self.sim.expected(&tokens, salt, &values));
        }
        self.seqs.push(Seq {
            table,
            salt,
            tokens,
            values,
        });
    }

    /// Computes some more tokens, of the prompt or new ones.
    fn compute(&mut self, seq: usize) {
        let from = self.seqs[seq].values.len();
        let more = match self.rng.random_range(0..3) {
            0 => self.rng.random_range(1..=self.size() * 2),
            _ => 1,
        };
        self.write(seq, from, more);
    }

    /// Goes back a little and computes other tokens, as after rejected drafts.
    fn rewrite(&mut self, seq: usize) {
        let Seq { values, table, .. } = &self.seqs[seq];
        let back = self.rng.random_range(0..=values.len().min(self.size() * 2));
        let from = values.len() - back;
        // What is read from there on must not have been reclaimed.
        if self.sim.first_read(from) / self.size() >= table.num_reclaimed() {
            let more = self.rng.random_range(1..=self.size() + 1);
            self.write(seq, from, more);
        }
    }

    fn write(&mut self, seq: usize, from: usize, more: usize) {
        let len = from + more;
        let fresh = self.random_tokens(len);
        let computed = self.seqs[seq].values.len();
        let Seq {
            table,
            salt,
            tokens,
            values,
        } = &mut self.seqs[seq];
        let before = self.kv.usage();
        let blocks_before = table.blocks().to_vec();
        let mut copies = Vec::new();
        let grown = self.kv.extend(table, from, len, &mut copies);
        if let Some(model) = &mut self.model {
            let size = self.setup.block_size as usize;
            let written = blocks_before.iter().take(len.div_ceil(size)).enumerate();
            let replaced: Vec<usize> = written
                .filter(|&(i, &b)| i >= from / size && !model.is_private(b))
                .map(|(i, _)| i)
                .collect();
            // What is shared behind the written part goes, and all that follows it.
            let need = len.div_ceil(size);
            let mut kept = blocks_before.len();
            if !replaced.is_empty() {
                let behind = need.min(kept)..kept;
                kept = behind
                    .clone()
                    .find(|&i| !model.is_private(blocks_before[i]))
                    .unwrap_or(kept);
            }
            let mut going: Vec<usize> = replaced.clone();
            going.extend(kept..blocks_before.len());
            let alone = |&&i: &&usize| model.readers(blocks_before[i]) == 1;
            let returned = going.iter().filter(alone).count();
            let fits = replaced.len() + need.saturating_sub(kept) <= model.available() + returned;
            assert_eq!(grown.is_some(), fits);
            if fits {
                going
                    .iter()
                    .rev()
                    .for_each(|&i| model.release(blocks_before[i]));
                let appended = kept..table.blocks().len();
                let taken = replaced.iter().copied().chain(appended);
                taken.for_each(|i| model.take(table.blocks()[i]));
            }
        }
        let Some(grown) = grown else {
            assert_eq!(self.kv.usage(), before, "a refusal changed something");
            assert_eq!(table.blocks(), blocks_before);
            assert!(copies.is_empty());
            self.refusals += 1;
            return;
        };
        let at = grown.table_at as usize;
        assert!(table.blocks()[..at] == blocks_before[..at]);
        assert!(copies.len() <= 1);
        self.copies += copies.len();
        self.sim.copy(&copies);
        if from < computed || len > tokens.len() {
            // New text from the first token on that is neither kept nor prompt.
            let keep = if from < computed { from } else { tokens.len() };
            tokens.truncate(keep);
            tokens.extend_from_slice(&fresh[keep..]);
        }
        values.truncate(from);
        for position in from..len {
            values.push(self.sim.expected(tokens, *salt, values));
            self.sim.compute(table.blocks(), tokens, *salt, position);
        }
        if self.rng.random_bool(0.8) {
            self.publish(seq);
        }
        if self.setup.window.is_some() {
            let Seq { table, values, .. } = &mut self.seqs[seq];
            let first = self.sim.first_read(values.len());
            self.kv.reclaim_before(table, first);
            assert_eq!(
                table.num_reclaimed(),
                first / self.setup.block_size as usize
            );
        }
    }

    fn publish(&mut self, seq: usize) {
        let Seq {
            table,
            salt,
            tokens,
            values,
        } = &mut self.seqs[seq];
        let published = table.num_published();
        self.kv.publish(table, tokens, values.len());
        if let Some(model) = &mut self.model {
            let full = values.len() / self.setup.block_size as usize;
            assert_eq!(table.num_published(), full);
            for i in published..full {
                let prefix = model.prefix(tokens, *salt, i + 1);
                model.publish(table.blocks()[i], prefix);
            }
        }
    }

    fn fork(&mut self, seq: usize) {
        let computed = self.seqs[seq].values.len();
        let shared = match self.rng.random_range(0..3) {
            0 => self.rng.random_range(0..=computed),
            _ => computed,
        };
        let more = self.rng.random_range(1..=self.size());
        let tail = self.random_tokens(more);
        let reclaimed = self.seqs[seq].table.num_reclaimed();
        if self.sim.first_read(shared) / self.size() < reclaimed {
            return;
        }
        let parent = &mut self.seqs[seq];
        let table = self.kv.fork(&mut parent.table, shared);
        if let Some(model) = &mut self.model {
            table.blocks().iter().for_each(|&block| model.share(block));
        }
        let mut tokens = parent.tokens[..shared].to_vec();
        tokens.extend(tail);
        let fork = Seq {
            table,
            salt: parent.salt,
            values: parent.values[..shared].to_vec(),
            tokens,
        };
        self.seqs.push(fork);
    }

    fn free(&mut self, seq: usize) {
        let Seq { table, tokens, .. } = self.seqs.swap_remove(seq);
        self.past.push_front(tokens);
        self.past.truncate(8);
        if let Some(model) = &mut self.model {
            table.blocks().iter().rev().for_each(|&b| model.release(b));
        }
        self.kv.free(table);
    }

    fn clear(&mut self) {
        let cleared = self.kv.clear_cached();
        if let Some(model) = &mut self.model {
            assert_eq!(cleared, model.clear_cached());
        }
    }

    fn check(&mut self) {
        let audit = self.kv.audit(self.seqs.iter().map(|seq| &seq.table));
        audit.unwrap_or_else(|error| panic!("{error} ({:?})", self.setup));
        let usage = self.kv.usage();
        if let Some(model) = &self.model {
            let counts = (model.free.len(), model.cached.len());
            assert_eq!((usage.free, usage.cached), counts);
        }
        for (block, state) in self.kv.block_map() {
            if state == BlockState::Free {
                self.sim.spoil(block);
            }
        }
        for Seq { table, values, .. } in &self.seqs {
            let reclaimed = table.num_reclaimed() * self.size();
            for (position, value) in values.iter().enumerate().skip(reclaimed) {
                let read = self.sim.read(table.blocks(), position);
                assert_eq!(read, *value, "foreign slot at {position}");
            }
        }
    }

    /// Frees everything: nothing may be missing afterwards.
    pub fn finish(mut self) {
        while !self.seqs.is_empty() {
            self.free(0);
            self.check();
        }
        for parked in self.parked.drain(..) {
            self.kv.discard(parked.table);
        }
        self.clear();
        self.check();
        let usage = self.kv.usage();
        assert_eq!((usage.swapped, usage.host_free), (0, usage.host_blocks));
        assert_eq!(self.kv.usage().free, self.setup.usable);
        assert!(self.kv.observer().0.is_empty());
    }
}
