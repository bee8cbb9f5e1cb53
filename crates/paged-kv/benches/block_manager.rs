//! Time and heap allocations of every operation of the hot path, and how they grow.
//!
//! `cargo bench -p paged-kv`

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput};
use paged_kv::{BlockManager, BlockSize, BlockTable, Config, KvAllocator, Salt};

const NONE: Salt = Salt::NONE;

fn manager(usable: usize, block_size: u32) -> BlockManager {
    BlockManager::new(Config::new(usable + 1, BlockSize::new(block_size).unwrap())).unwrap()
}

/// Prints heap allocations an operation, counted over 64 warm runs.
fn allocations(name: &str, operations: usize, mut run: impl FnMut()) {
    run();
    let counted = allocation_counter::measure(|| (0..64).for_each(|_| run()));
    let each = counted.count_total as f64 / (64 * operations) as f64;
    println!("{name}: {each} heap allocations an operation");
}

/// A sequence that grows by one block and gives it back with the whole table; 1,024 blocks a run,
/// so that the table's own `Vec` weighs nothing.
fn allocate_free_block(c: &mut Criterion) {
    let mut kv = manager(2048, 16);
    let mut run = || {
        let table = kv.allocate(&[], NONE, false, 1024 * 16).unwrap().table;
        kv.free(black_box(table));
    };
    allocations("allocate and free a block", 1024, &mut run);
    let mut group = c.benchmark_group("allocate_free");
    group.throughput(Throughput::Elements(1024));
    group.bench_function("1024_blocks", |b| b.iter(&mut run));
    group.finish();
}

/// As above where every block that is taken must first be evicted from the prefix cache.
fn evict_block(c: &mut Criterion) {
    let blocks = 1024;
    let mut kv = manager(blocks, 16);
    let mut first = 0;
    let mut run = || {
        first += 1;
        let tokens: Vec<u32> = (first..).take(blocks * 16).collect();
        let mut table = kv
            .allocate(&tokens, NONE, false, tokens.len())
            .unwrap()
            .table;
        kv.publish(&mut table, &tokens, tokens.len());
        kv.free(table);
    };
    let mut group = c.benchmark_group("evict_publish_free");
    group.throughput(Throughput::Elements(blocks as u64));
    group.bench_function("1024_blocks", |b| b.iter(&mut run));
    group.finish();
}

fn match_prefix(c: &mut Criterion) {
    let mut group = c.benchmark_group("match_prefix_all_hit");
    for len in [512u32, 4096, 32768] {
        let tokens: Vec<u32> = (0..len + 1).collect();
        let mut kv = manager(1 << 15, 16);
        let mut table = kv
            .allocate(&tokens, NONE, true, tokens.len())
            .unwrap()
            .table;
        kv.publish(&mut table, &tokens, tokens.len());
        kv.free(table);
        allocations(&format!("match {len} tokens"), 1, || {
            black_box(kv.match_prefix(&tokens, NONE));
        });
        group.throughput(Throughput::Elements(len.into()));
        group.bench_function(BenchmarkId::from_parameter(len), |b| {
            b.iter(|| {
                let hit = kv.match_prefix(black_box(&tokens), NONE);
                assert_eq!(hit, len as usize);
            })
        });
    }
    group.finish();
}

/// One decode step of the cache: every sequence gets room for a token and publishes.
fn extend(c: &mut Criterion) {
    let mut group = c.benchmark_group("extend_by_a_token");
    for (sequences, blocks) in [
        (64, 1 << 17),
        (256, 1 << 17),
        (1024, 1 << 17),
        (4096, 1 << 17),
        (1024, 1 << 13),
        (1024, 1 << 20),
    ] {
        let prompt: Vec<u32> = (0..64).collect();
        let mut kv = manager(blocks, 16);
        let start = |kv: &mut BlockManager| -> Vec<BlockTable> {
            (0..sequences)
                .map(|_| kv.allocate(&prompt, NONE, false, 60).unwrap().table)
                .collect()
        };
        let mut tables = start(&mut kv);
        let mut copies = Vec::with_capacity(16);
        let mut len = 60;
        // The sequences go from 60 to 124 tokens, so that one step in 16 takes blocks.
        let mut run = |measured: bool| {
            len += 1;
            if len > 124 {
                tables.drain(..).for_each(|table| kv.free(table));
                tables = start(&mut kv);
                len = 61;
                if measured {
                    return;
                }
            }
            for table in &mut tables {
                black_box(kv.extend(table, len - 1, len, &mut copies));
            }
        };
        let name = format!("extend {sequences} sequences");
        allocations(&name, sequences, || run(false));
        group.throughput(Throughput::Elements(sequences as u64));
        let id = BenchmarkId::new(format!("{sequences}_sequences"), format!("{blocks}_blocks"));
        group.bench_function(id, |b| {
            b.iter_custom(|steps| {
                let mut spent = std::time::Duration::ZERO;
                for _ in 0..steps {
                    let before = std::time::Instant::now();
                    run(true);
                    spent += before.elapsed();
                }
                spent
            })
        });
    }
    group.finish();
}

/// A prompt of 512 tokens: taken, published and given back, with nothing and with all cached.
fn admit(c: &mut Criterion) {
    let mut group = c.benchmark_group("admit_512_tokens");
    let mut kv = manager(1 << 15, 16);
    let tokens: Vec<u32> = (0..513).collect();
    group.bench_function("hit", |b| {
        b.iter(|| {
            let mut table = kv.allocate(&tokens, NONE, true, 513).unwrap().table;
            kv.publish(&mut table, &tokens, 513);
            kv.free(table);
        })
    });
    group.finish();
}

fn main() {
    let mut c = Criterion::default().configure_from_args();
    allocate_free_block(&mut c);
    evict_block(&mut c);
    match_prefix(&mut c);
    extend(&mut c);
    admit(&mut c);
    c.final_summary();
}
