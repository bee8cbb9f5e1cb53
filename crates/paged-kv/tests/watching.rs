//! What can be seen from outside: figures, the block map, events, salts; and an allocator of one's
//! own around this one.

use paged_kv::{
    Allocation, BlockCopy, BlockHash, BlockManager, BlockSize, BlockState, BlockTable,
    CacheObserver, Config, Grown, KvAllocator, Salt, Stored, SwapOut, Usage,
};

const NONE: Salt = Salt::NONE;

fn config(usable: usize, block_size: u32) -> Config {
    Config::new(usable + 1, BlockSize::new(block_size).unwrap())
}

/// A table of all of `tokens`, published.
fn publish<O: CacheObserver>(
    kv: &mut BlockManager<O>,
    tokens: &[u32],
    salt: Salt,
) -> (BlockTable, usize) {
    let Allocation {
        mut table,
        num_cached,
    } = kv.allocate(tokens, salt, true, tokens.len()).unwrap();
    kv.publish(&mut table, tokens, tokens.len());
    (table, num_cached)
}

#[test]
fn figures_and_map_tell_what_every_block_is() {
    let mut kv = BlockManager::new(config(6, 2).host_blocks(4)).unwrap();
    assert_eq!(kv.block_size().get(), 2);
    let (a, _) = publish(&mut kv, &[1, 2, 3, 4, 5], NONE);
    kv.free(a);
    let (mut b, cached) = publish(&mut kv, &[1, 2, 3], NONE);
    assert_eq!(cached, 2);
    let c = kv.fork(&mut b, 3);
    assert_eq!((b.num_published(), c.num_published()), (1, 1));
    let usage = kv.usage();
    assert_eq!(
        (usage.num_blocks, usage.free, usage.cached, usage.referenced),
        (6, 3, 1, 2)
    );
    assert_eq!((usage.tables, usage.swapped, usage.evictions), (2, 0, 0));
    assert_eq!((usage.host_blocks, usage.host_free), (4, 4));
    assert_eq!((usage.queried_tokens, usage.hit_tokens), (8, 2));
    assert_eq!(usage.occupancy(), 2.0 / 6.0);
    assert_eq!(usage.hit_rate(), 0.25);
    assert_eq!(Usage::default().hit_rate(), 0.0);

    let map: Vec<_> = kv.block_map().collect();
    assert_eq!(map.len(), 6);
    let state = |id| map.iter().find(|(block, _)| *block == id).unwrap().1;
    let shared = |published| BlockState::Referenced {
        readers: 2,
        published,
    };
    assert_eq!(state(b.blocks()[0]), shared(true));
    assert_eq!(state(b.blocks()[1]), shared(false));
    let count = |of| map.iter().filter(|(_, state)| *state == of).count();
    assert_eq!((count(BlockState::Free), count(BlockState::Cached)), (3, 1));

    let mut moves = Vec::new();
    let swapped = kv.swap_out(b, 3, &mut moves).unwrap();
    assert_eq!((kv.num_host_blocks(), swapped.num_host_blocks()), (4, 2));
    let usage = kv.usage();
    assert_eq!((usage.tables, usage.swapped, usage.host_free), (1, 1, 2));
    kv.discard(swapped);
    assert_eq!((kv.usage().swapped, kv.usage().host_free), (0, 4));

    // Three free blocks, and the cached one behind them.
    let d = kv.allocate(&[9], NONE, true, 8).unwrap().table;
    assert_eq!((kv.usage().evictions, kv.usage().cached), (1, 0));
    kv.free(d);
    kv.free(c);
    assert_eq!(kv.clear_cached(), 1);
    assert_eq!(kv.usage().free, 6);
    kv.audit([]).unwrap();
}

/// Hash, parent, depth, salt, tokens.
type Entry = (u128, Option<u128>, usize, Salt, Vec<u32>);

#[derive(Default)]
struct Log {
    stored: Vec<Entry>,
    removed: Vec<u128>,
}

impl CacheObserver for Log {
    fn stored(&mut self, event: Stored<'_>) {
        self.stored.push((
            event.hash.get(),
            event.parent.map(BlockHash::get),
            event.depth,
            event.salt,
            event.tokens.to_vec(),
        ));
    }

    fn removed(&mut self, hash: BlockHash) {
        assert_eq!(
            format!("{hash:?}"),
            format!("BlockHash({:032x})", hash.get())
        );
        self.removed.push(hash.get());
    }
}

#[test]
fn an_observer_sees_each_prefix_come_and_go_once() {
    let salt = Salt::from_bytes(b"tenant");
    let config = config(4, 2).hash_key(7);
    let mut kv = BlockManager::with_observer(config, Log::default()).unwrap();
    let (a, _) = publish(&mut kv, &[1, 2, 3, 4], salt);
    let (b, _) = publish(&mut kv, &[1, 2, 3, 4], salt);
    let log = kv.observer();
    let [first, second] = &log.stored[..] else {
        panic!("{} stored", log.stored.len());
    };
    assert_eq!(
        (first.1, first.2, first.3, &first.4[..]),
        (None, 0, salt, &[1, 2][..])
    );
    assert_eq!(
        (second.1, second.2, second.3, &second.4[..]),
        (Some(first.0), 1, salt, &[3, 4][..])
    );
    let (first, second) = (first.0, second.0);
    assert_ne!(first, second);
    assert!(first >> 64 != 0 && first as u64 != 0);
    kv.free(a);
    kv.free(b);
    assert_eq!(kv.observer().removed, []);
    assert_eq!(kv.clear_cached(), 2);
    let removed = std::mem::take(&mut kv.observer_mut().removed);
    assert_eq!(removed.len(), 2);
    assert!(removed.contains(&first) && removed.contains(&second));
}

#[test]
fn salts_keep_apart_what_is_equal() {
    assert_eq!(Salt::from_bytes(b""), Salt::NONE);
    assert_ne!(Salt::from_bytes(b"a"), Salt::from_bytes(b"b"));
    assert_ne!(Salt::from_bytes(b"a"), Salt::NONE);
    let mut kv = BlockManager::new(config(8, 2)).unwrap();
    // Salts that differ in one half of their bits.
    let salts = [1, 1 << 64, 1 << 64 | 1, u128::MAX].map(Salt::new);
    for (i, &salt) in salts.iter().enumerate() {
        assert_eq!(Salt::new(salt.get()), salt);
        let (table, cached) = publish(&mut kv, &[5, 6, 7], salt);
        assert_eq!((cached, table.salt()), (0, salt), "salt {i}");
        kv.free(table);
    }
    for salt in salts {
        assert_eq!(kv.match_prefix(&[5, 6, 7], salt), 2);
    }
}

#[test]
fn a_write_at_a_block_boundary_copies_nothing() {
    let mut kv = BlockManager::new(config(6, 2)).unwrap();
    let mut a = kv.allocate(&[1, 2, 3, 4], NONE, true, 4).unwrap().table;
    let mut b = kv.fork(&mut a, 4);
    let mut copies: Vec<BlockCopy> = Vec::new();
    // All of block 1 is written anew: what was in it need not come along.
    let grown = kv.extend(&mut b, 2, 4, &mut copies).unwrap();
    assert_eq!((grown.table_at, copies.len()), (1, 0));
    assert_ne!(a.blocks()[1], b.blocks()[1]);
    kv.audit([&a, &b]).unwrap();
    kv.free(a);
    kv.free(b);
}

/// The table keeps in mind what it may write. Whatever takes that right away must be noticed.
#[test]
fn what_was_writable_is_not_after_a_fork_or_a_publication() {
    let mut kv = BlockManager::new(config(8, 4)).unwrap();
    let mut a = kv.allocate(&[1, 2, 3], NONE, true, 8).unwrap().table;
    let mut copies = Vec::new();
    let extend = |kv: &mut BlockManager, table: &mut BlockTable, copies: &mut Vec<_>| {
        kv.extend(table, 3, 5, copies).unwrap().table_at
    };
    assert_eq!(extend(&mut kv, &mut a, &mut copies), 2);
    let b = kv.fork(&mut a, 3);
    assert_eq!(extend(&mut kv, &mut a, &mut copies), 0);
    assert_eq!(copies.len(), 1);
    kv.free(b);
    kv.publish(&mut a, &[1, 2, 3, 4, 5], 5);
    copies.clear();
    assert_eq!(extend(&mut kv, &mut a, &mut copies), 0);
    assert_eq!(copies.len(), 1);
    assert_eq!(kv.match_prefix(&[1, 2, 3, 4, 5], NONE), 4);
    kv.audit([&a]).unwrap();
    kv.free(a);
}

#[test]
fn a_short_fork_knows_how_short_it_is() {
    let mut kv = BlockManager::new(config(8, 2)).unwrap();
    let mut a = kv.allocate(&[1, 2, 3], NONE, true, 8).unwrap().table;
    kv.extend(&mut a, 0, 8, &mut Vec::new()).unwrap();
    let mut b = kv.fork(&mut a, 4);
    let grown = kv.extend(&mut b, 4, 6, &mut Vec::new()).unwrap();
    assert_eq!((grown.table_at, b.blocks().len()), (2, 3));
    kv.reclaim_before(&mut a, 4);
    let c = kv.fork(&mut a, 2);
    assert_eq!((c.num_reclaimed(), c.blocks().len()), (1, 1));
    kv.audit([&a, &b, &c]).unwrap();
    for table in [a, b, c] {
        kv.free(table);
    }
    kv.audit([]).unwrap();
}

#[test]
fn publishing_goes_on_behind_a_beginning_that_is_still_cached() {
    let mut kv = BlockManager::new(config(4, 2)).unwrap();
    let tokens = [1, 2, 3, 4, 5];
    let mut a = kv.allocate(&tokens, NONE, true, 5).unwrap().table;
    kv.publish(&mut a, &tokens, 2);
    kv.reclaim_before(&mut a, 2);
    kv.publish(&mut a, &tokens, 5);
    assert_eq!(a.num_published(), 2);
    assert_eq!(kv.match_prefix(&tokens, NONE), 4);
    kv.free(a);
}

#[test]
fn publishing_goes_on_in_forks_and_copies_behind_a_beginning_that_went_back() {
    let tokens = [1, 2, 3, 4, 5];
    // A fork of what is published, which writes behind it; or a copy of the block that follows.
    for shared in [2, 3] {
        let mut kv = BlockManager::new(config(6, 2)).unwrap();
        let mut a = kv.allocate(&tokens, NONE, true, 4).unwrap().table;
        kv.publish(&mut a, &tokens, 2);
        kv.reclaim_before(&mut a, 2);
        let mut b = kv.fork(&mut a, shared);
        kv.extend(&mut b, shared, 5, &mut Vec::new()).unwrap();
        kv.publish(&mut b, &tokens, 5);
        assert_eq!(kv.match_prefix(&tokens, NONE), 4, "{shared} shared");
        kv.free(a);
        kv.free(b);
    }
}

#[test]
fn only_what_was_looked_up_counts_as_a_query() {
    let mut kv = BlockManager::new(config(6, 2)).unwrap();
    let table = kv.allocate(&[1, 2, 3], NONE, false, 3).unwrap().table;
    assert_eq!(kv.usage().queried_tokens, 0);
    kv.free(table);
    let mut kv = BlockManager::new(config(6, 2).prefix_caching(false)).unwrap();
    let table = kv.allocate(&[1, 2, 3], NONE, true, 3).unwrap().table;
    assert_eq!(kv.usage().queried_tokens, 0);
    kv.free(table);
}

#[test]
fn a_cached_block_is_no_room_for_what_it_is_the_beginning_of() {
    let mut kv = BlockManager::new(config(3, 2).host_blocks(3)).unwrap();
    let tokens = [1, 2, 3, 4, 5];
    let mut table = kv.allocate(&tokens, NONE, true, 5).unwrap().table;
    kv.publish(&mut table, &tokens, 2);
    let swapped = kv.swap_out(table, 5, &mut Vec::new()).unwrap();
    let other = kv.allocate(&[9], NONE, true, 2).unwrap().table;
    let mut moves = Vec::new();
    // One block is free, and one is cached: the first of the three that are asked for.
    let table = kv.swap_in(swapped, &tokens, 5, &mut moves);
    let swapped = table.unwrap_err();
    assert_eq!((moves.len(), kv.usage().cached), (0, 1));
    kv.free(other);
    let table = kv.swap_in(swapped, &tokens, 5, &mut moves).unwrap();
    assert_eq!(moves.len(), 2);
    kv.free(table);
}

#[test]
fn a_swapped_sequence_takes_no_block_for_a_beginning_that_went_back() {
    let mut kv = BlockManager::new(config(4, 2).host_blocks(4)).unwrap();
    let tokens = [1, 2, 3, 4, 5];
    let mut table = kv.allocate(&tokens, NONE, true, 5).unwrap().table;
    kv.reclaim_before(&mut table, 2);
    let swapped = kv.swap_out(table, 5, &mut Vec::new()).unwrap();
    let table = kv.swap_in(swapped, &tokens, 7, &mut Vec::new()).unwrap();
    assert_eq!((table.blocks().len(), kv.num_available()), (4, 1));
    kv.free(table);
}

#[test]
fn numbers_of_blocks_are_what_they_say() {
    let mut kv = BlockManager::new(config(3, 2)).unwrap();
    let table = kv.allocate(&[1], NONE, true, 6).unwrap().table;
    for block in table.blocks() {
        let number = block.index() as u32;
        assert_eq!(
            (block.get(), block.to_string()),
            (number, number.to_string())
        );
    }
    assert_eq!(BlockSize::new(16).unwrap().to_string(), "16");
    kv.free(table);
}

#[test]
#[should_panic(expected = "this swapped table belongs to another block manager")]
fn a_swapped_table_of_another_manager_is_refused() {
    let host = || BlockManager::new(config(4, 2).host_blocks(4)).unwrap();
    let mut other = host();
    let table = other.allocate(&[1], NONE, true, 1).unwrap().table;
    let swapped = other.swap_out(table, 1, &mut Vec::new()).unwrap();
    host().discard(swapped);
}

/// Only what every allocator must have.
struct NoHost(BlockManager);

impl KvAllocator for NoHost {
    fn block_size(&self) -> BlockSize {
        self.0.block_size()
    }
    fn num_blocks(&self) -> usize {
        self.0.num_blocks()
    }
    fn num_available(&self) -> usize {
        self.0.num_available()
    }
    fn match_prefix(&mut self, tokens: &[u32], salt: Salt) -> usize {
        self.0.match_prefix(tokens, salt)
    }
    fn allocate(
        &mut self,
        tokens: &[u32],
        salt: Salt,
        use_cache: bool,
        reserve: usize,
    ) -> Option<Allocation> {
        self.0.allocate(tokens, salt, use_cache, reserve)
    }
    fn extend(
        &mut self,
        table: &mut BlockTable,
        write_from: usize,
        num_tokens: usize,
        copies: &mut Vec<BlockCopy>,
    ) -> Option<Grown> {
        self.0.extend(table, write_from, num_tokens, copies)
    }
    fn fork(&mut self, table: &mut BlockTable, num_tokens: usize) -> BlockTable {
        self.0.fork(table, num_tokens)
    }
    fn publish(&mut self, table: &mut BlockTable, tokens: &[u32], num_computed: usize) {
        self.0.publish(table, tokens, num_computed);
    }
    fn reclaim_before(&mut self, table: &mut BlockTable, first_needed: usize) {
        self.0.reclaim_before(table, first_needed);
    }
    fn free(&mut self, table: BlockTable) {
        self.0.free(table);
    }
}

#[test]
fn an_allocator_without_a_host_tier_gives_the_table_back() {
    let mut kv = NoHost(BlockManager::new(config(4, 2)).unwrap());
    assert_eq!(kv.num_host_blocks(), 0);
    let table = kv.allocate(&[1, 2, 3], NONE, true, 3).unwrap().table;
    let mut moves: Vec<SwapOut> = Vec::new();
    let table = kv.swap_out(table, 3, &mut moves).unwrap_err();
    assert_eq!((table.blocks().len(), moves.len()), (2, 0));
    kv.free(table);
    assert_eq!(kv.num_available(), 4);
}
