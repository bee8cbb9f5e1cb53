//! One behaviour a test, on pools small enough to follow by hand.

use paged_kv::{BlockCopy, BlockManager, BlockSize, BlockTable, Config, KvAllocator, Salt};

const NONE: Salt = Salt::NONE;

fn manager(usable: usize, block_size: u32) -> BlockManager {
    BlockManager::new(Config::new(usable + 1, BlockSize::new(block_size).unwrap())).unwrap()
}

fn ids(table: &BlockTable) -> Vec<u32> {
    table.blocks().iter().map(|b| b.get()).collect()
}

#[test]
fn a_prefix_is_found_after_it_is_published_and_keeps_a_token_to_compute() {
    let mut kv = manager(8, 4);
    let tokens: Vec<u32> = (0..9).collect();
    let mut a = kv.allocate(&tokens, NONE, true, 9).unwrap();
    assert_eq!((a.num_cached, kv.match_prefix(&tokens, NONE)), (0, 0));
    kv.publish(&mut a.table, &tokens, 7);
    assert_eq!(kv.match_prefix(&tokens, NONE), 4);
    kv.publish(&mut a.table, &tokens, 9);
    assert_eq!(kv.match_prefix(&tokens, NONE), 8);
    assert_eq!(kv.match_prefix(&tokens[..8], NONE), 4);
    assert_eq!(kv.match_prefix(&tokens[..4], NONE), 0);
    assert_eq!(kv.match_prefix(&[], NONE), 0);
    assert_eq!(kv.match_prefix(&tokens, Salt::new(1)), 0);

    let b = kv.allocate(&tokens, NONE, true, 9).unwrap();
    assert_eq!(b.num_cached, 8);
    assert_eq!(ids(&b.table)[..2], ids(&a.table)[..2]);
    let c = kv.allocate(&tokens, NONE, false, 9).unwrap();
    assert_eq!(c.num_cached, 0);
    kv.audit([&a.table, &b.table, &c.table]).unwrap();
    for allocation in [a, b, c] {
        kv.free(allocation.table);
    }
    kv.audit([]).unwrap();
    assert_eq!(kv.usage().cached, 2);
    assert_eq!(kv.num_available(), 8);
    assert_eq!(kv.clear_cached(), 2);
    assert_eq!(kv.match_prefix(&tokens, NONE), 0);
    kv.audit([]).unwrap();
}

#[test]
fn what_does_not_fit_changes_nothing() {
    let mut kv = manager(4, 2);
    let mut a = kv.allocate(&[1, 2, 3, 4], NONE, true, 4).unwrap().table;
    kv.publish(&mut a, &[1, 2, 3, 4], 4);
    kv.free(a);
    let before = kv.usage();
    // Two hits that are themselves the room, and three more blocks.
    assert!(kv.allocate(&[1, 2, 3, 4, 5], NONE, true, 9).is_none());
    assert_eq!(kv.usage(), before);
    let mut b = kv.allocate(&[1, 2, 3, 4, 5], NONE, true, 8).unwrap().table;
    assert!(kv.extend(&mut b, 8, 9, &mut Vec::new()).is_none());
    assert_eq!(b.blocks().len(), 4);
    kv.audit([&b]).unwrap();
    kv.free(b);
}

#[test]
fn a_fork_copies_the_partial_block_once() {
    let mut kv = manager(8, 4);
    let tokens: Vec<u32> = (0..6).collect();
    let mut a = kv.allocate(&tokens, NONE, true, 6).unwrap().table;
    kv.publish(&mut a, &tokens, 6);
    let mut b = kv.fork(&mut a, 6);
    assert_eq!(ids(&a), ids(&b));
    let mut copies = Vec::new();
    let grown = kv.extend(&mut b, 6, 7, &mut copies).unwrap();
    assert_eq!(grown.table_at, 1);
    let copy = BlockCopy {
        src: a.blocks()[1],
        dst: b.blocks()[1],
    };
    assert_eq!(copies, [copy]);
    // The first table is alone with its block now.
    let grown = kv.extend(&mut a, 6, 9, &mut copies).unwrap();
    assert_eq!((grown.table_at, copies.len()), (2, 1));
    kv.audit([&a, &b]).unwrap();
    kv.free(a);
    kv.free(b);
    kv.audit([]).unwrap();
}

#[test]
fn tails_are_evicted_before_heads() {
    let mut kv = manager(4, 1);
    let tokens = [1, 2, 3, 4];
    let mut a = kv.allocate(&tokens, NONE, true, 4).unwrap().table;
    kv.publish(&mut a, &tokens, 4);
    kv.free(a);
    let mut taken = Vec::new();
    for left in (0..4).rev() {
        taken.push(kv.allocate(&[9], NONE, true, 1).unwrap().table);
        assert_eq!(kv.match_prefix(&[1, 2, 3, 4, 5], NONE), left);
        kv.audit(&taken).unwrap();
    }
    for table in taken {
        kv.free(table);
    }
}

#[test]
fn writing_into_a_published_block_leaves_the_cached_content_alone() {
    let mut kv = manager(3, 2);
    let mut a = kv.allocate(&[1, 2, 3], NONE, true, 3).unwrap().table;
    kv.publish(&mut a, &[1, 2, 3], 3);
    let old = a.blocks()[0];
    let mut copies = Vec::new();
    let grown = kv.extend(&mut a, 1, 3, &mut copies).unwrap();
    assert_eq!(grown.table_at, 0);
    let dst = a.blocks()[0];
    assert_eq!(copies, [BlockCopy { src: old, dst }]);
    assert_eq!(kv.match_prefix(&[1, 2, 3], NONE), 2);
    assert_eq!(a.num_published(), 0);
    // With no other block to be had it is given up for itself, without a copy.
    kv.publish(&mut a, &[1, 7, 3], 3);
    assert!(kv.extend(&mut a, 4, 5, &mut copies).is_some());
    copies.clear();
    kv.extend(&mut a, 1, 5, &mut copies).unwrap();
    assert_eq!((copies.len(), a.blocks()[0]), (0, dst));
    assert_eq!(kv.match_prefix(&[1, 7, 3], NONE), 0);
    kv.audit([&a]).unwrap();
    kv.free(a);
}

#[test]
fn the_content_of_two_equal_blocks_is_kept_once() {
    let mut kv = manager(6, 2);
    let tokens = [1, 2, 3, 4, 5];
    let mut a = kv.allocate(&tokens, NONE, true, 5).unwrap().table;
    let mut b = kv.allocate(&tokens, NONE, true, 5).unwrap().table;
    kv.publish(&mut a, &tokens, 5);
    kv.publish(&mut b, &tokens, 5);
    kv.audit([&a, &b]).unwrap();
    let of_b = ids(&b)[..2].to_vec();
    kv.free(a);
    kv.audit([&b]).unwrap();
    assert_eq!((kv.usage().free, kv.usage().cached), (3, 0));
    let c = kv.allocate(&tokens, NONE, true, 5).unwrap().table;
    assert_eq!(ids(&c)[..2], of_b);
    kv.free(b);
    kv.free(c);
    assert_eq!(kv.usage().cached, 2);
    kv.audit([]).unwrap();
}

#[test]
fn a_window_gives_blocks_back() {
    let mut kv = manager(6, 2);
    let tokens: Vec<u32> = (0..10).collect();
    let mut a = kv.allocate(&tokens, NONE, true, 10).unwrap().table;
    kv.publish(&mut a, &tokens, 6);
    kv.reclaim_before(&mut a, 5);
    assert_eq!(a.num_reclaimed(), 2);
    assert!(a.blocks()[..2].iter().all(|b| b.is_null()));
    assert_eq!(kv.num_available(), 3);
    assert_eq!(kv.match_prefix(&tokens, NONE), 6);
    kv.publish(&mut a, &tokens, 10);
    assert_eq!(a.num_published(), 5);
    let b = kv.fork(&mut a, 10);
    kv.audit([&a, &b]).unwrap();
    kv.reclaim_before(&mut a, 100);
    kv.free(a);
    kv.free(b);
    kv.audit([]).unwrap();
}

#[test]
fn without_prefix_caching_nothing_is_found() {
    let config = Config::new(5, BlockSize::new(2).unwrap()).prefix_caching(false);
    let mut kv = BlockManager::new(config).unwrap();
    let tokens = [1, 2, 3, 4, 5];
    let mut a = kv.allocate(&tokens, NONE, true, 5).unwrap().table;
    kv.publish(&mut a, &tokens, 5);
    let b = kv.fork(&mut a, 5);
    assert_eq!(kv.match_prefix(&tokens, NONE), 0);
    kv.extend(&mut a, 5, 6, &mut Vec::new()).unwrap();
    kv.audit([&a, &b]).unwrap();
    kv.free(a);
    kv.free(b);
    assert_eq!(kv.usage().free, 4);
}

#[test]
#[should_panic(expected = "belongs to another block manager")]
fn a_table_of_another_manager_is_refused() {
    let mut other = manager(4, 2);
    let table = other.allocate(&[1], NONE, true, 1).unwrap().table;
    manager(4, 2).free(table);
}

#[test]
fn impossible_sizes_are_errors() {
    assert!(BlockSize::new(0).is_err());
    let size = BlockSize::new(16).unwrap();
    for num_blocks in [0, 1, 1 << 28, usize::MAX] {
        let error = BlockManager::new(Config::new(num_blocks, size)).err();
        assert!(error.unwrap().to_string().contains(&num_blocks.to_string()));
    }
}

#[test]
fn what_a_window_gives_back_at_once_is_evicted_end_first() {
    let mut kv = manager(5, 2);
    let tokens: Vec<u32> = (0..8).collect();
    let mut a = kv.allocate(&tokens, NONE, true, 8).unwrap().table;
    kv.publish(&mut a, &tokens, 8);
    kv.reclaim_before(&mut a, 4);
    let b = kv.allocate(&[9], NONE, true, 4).unwrap().table;
    assert_eq!(kv.match_prefix(&tokens, NONE), 2);
    kv.free(a);
    kv.free(b);
}

#[test]
fn nothing_is_published_behind_a_beginning_that_is_gone() {
    let mut kv = manager(3, 2);
    let tokens: Vec<u32> = (0..6).collect();
    let mut a = kv.allocate(&tokens, NONE, true, 6).unwrap().table;
    kv.publish(&mut a, &tokens, 2);
    kv.reclaim_before(&mut a, 2);
    let b = kv.allocate(&[9], NONE, true, 1).unwrap().table;
    assert_eq!(kv.match_prefix(&tokens, NONE), 0);
    kv.publish(&mut a, &tokens, 6);
    assert_eq!(a.num_published(), 1);
    kv.audit([&a, &b]).unwrap();
    kv.free(a);
    kv.free(b);
    assert_eq!(kv.usage().cached, 0);
}

#[test]
#[should_panic(expected = "position 3 is in a block that was reclaimed")]
fn a_reclaimed_block_cannot_be_written() {
    let mut kv = manager(4, 2);
    let mut a = kv.allocate(&[1, 2, 3, 4, 5], NONE, true, 5).unwrap().table;
    kv.reclaim_before(&mut a, 4);
    kv.extend(&mut a, 3, 5, &mut Vec::new());
}

#[test]
#[should_panic(expected = "5 tokens computed of 4")]
fn more_cannot_be_published_than_there_is() {
    let mut kv = manager(4, 2);
    let mut a = kv.allocate(&[1, 2, 3, 4], NONE, true, 8).unwrap().table;
    kv.publish(&mut a, &[1, 2, 3, 4], 5);
}
