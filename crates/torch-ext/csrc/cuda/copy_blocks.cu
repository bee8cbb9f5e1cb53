// Moving rows about: KV blocks for copy-on-write, and rows of an embedding.
#include "common.cuh"

/// Copies block pairs[i][0] to block pairs[i][1] in every cache. `caches` are device addresses of
/// contiguous tensors, all of `blocks` blocks of `vectors` x 16 bytes. A pair that names a block
/// out of range is skipped: (-1, -1) is padding.
/// Grid: (parts of a block, pairs, caches).
extern "C" __global__ void copy_blocks(const u64 *caches, const i64 *pairs, i64 blocks,
                                       i64 vectors) {
    // Lets no kernel start early: attention reads what this writes before it waits for the kernels before it.
    uint4 *cache = (uint4 *)caches[blockIdx.z];
    pdl_wait();
    const volatile i64 *pair = pairs + 2 * (i64)blockIdx.y;
    i64 from = pair[0], to = pair[1];
    if (from < 0 || from >= blocks || to < 0 || to >= blocks || from == to) return;
    i64 stride = (i64)gridDim.x * blockDim.x;
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    for (; i < vectors; i += stride)
        store16(cache + to * vectors + i, load16(cache + from * vectors + i));
}

/// out[t] = table[ids[t]], rows of `vectors` x 16 bytes; an id out of range reads the nearest row.
/// -DIDS=4 or 8: bytes of an id.
extern "C" __global__ void gather_rows(uint4 *out, const uint4 *table, const void *ids, i64 tokens,
                                       i64 rows, int vectors) {
    pdl_launch();
    pdl_wait();
    i64 index = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= tokens * vectors) return;
    i64 token = index / vectors;
#if defined(IDS) && IDS == 4
    i64 id = ((const volatile int *)ids)[token];
#else
    i64 id = ((const volatile i64 *)ids)[token];
#endif
    id = id < 0 ? 0 : id >= rows ? rows - 1 : id;
    store16(out + index, load16_stream(table + id * vectors + (index - token * vectors)));
}
