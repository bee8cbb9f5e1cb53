// Causal attention of many queries of a sequence over its paged keys and values, for Hopper (sm_90a): what
// attention_prefill.cu computes, with the same arguments, on warpgroup products.
//
// One block an SM takes tile after tile, in the order of the list. A tile is 128 rows: the `ratio` query heads of one KV
// head for 128 / ratio consecutive tokens. Of one warpgroup, one warp starts the copies to shared memory (a tile's Q and
// its description, then steps of KEYS keys and values, block by block, to a ring); the other two compute 64 rows each. A
// step's scores and the output of the step before are on the tensor cores together, and while one warpgroup's softmax runs
// the other's products do.
//
// Shared memory is in panels of 64 dimensions: rows of 128 bytes, whose 16-byte chunks are permuted by the row (the
// 128-byte swizzle of the product's descriptors). Of Q a panel has all rows. Of keys and values it has eight, and the panels
// of eight tokens follow one another, so that all dimensions of a block's tokens are one copy: many small ones are slower.
//
// Defines: T_BF16 or T_HALF, HEAD_DIM (64, 128 or 256), SOFT_CAP (0 or 1), BOX: how many consecutive rows of the cache one
// TMA copy takes, 8 to KEYS, a divisor of KEYS and of the block size.
// hopper.cuh and attention_tiles.cuh stand before this file when it is compiled.

/// The arguments of attention_prefill, with a zero behind the tiles, which counts those taken; how many tiles there are; for
/// TMA, the cache as [64, 8, HEAD_DIM / 64, groups of eight rows] in boxes of BOX rows, and q as [HEAD_DIM, heads, tokens] in boxes of
/// 64 x ratio x (ROWS / ratio). Grid: as many blocks as are to be busy.
extern "C" __global__ void __launch_bounds__(384, 1)
    attention_prefill_sm90(const elem *q, const elem *k, const elem *v, const int *block_tables, const int *query_start,
                           const int *context_len, int *tiles, elem *out, int tokens, int num_seqs, int heads,
                           int kv_heads, int width, int blocks, int block_size, int window, float scale, float soft_cap,
                           int num_tiles, const __grid_constant__ TensorMap q_map,
                           const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map) {
#if HOPPER
    extern __shared__ __align__(1024) unsigned char shared[];
    __shared__ __align__(8) u64 barriers[2 + 4 * STAGES];
    __shared__ Tile next_tile; // goes with Q
    u32 q_tile = (shared_address(shared) + 1023) & ~1023u;
    u32 k_ring = q_tile + Q_BYTES, v_ring = k_ring + STAGES * KEY_BYTES;
    u32 q_full = shared_address(barriers), q_empty = q_full + 8;
    u32 k_full = q_full + 16, k_empty = k_full + 8 * STAGES, v_full = k_empty + 8 * STAGES, v_empty = v_full + 8 * STAGES;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    // 0 copies, 1 and 2 compute. By a shuffle, so that it is known to be the same in a whole warp: what the products'
    // descriptors are made of then stays in uniform registers.
    int group = __shfl_sync(FULL_WARP, threadIdx.x / 128, 0);
    int ratio = heads / kv_heads;
    i64 room = (i64)width * block_size;
    Args a = {query_start, context_len, tiles, tokens, num_seqs, ratio, kv_heads, (int)min(room, (i64)0x7fffffff), window};
    if (threadIdx.x == 0) {
        barrier_init(q_full, 1);
        barrier_init(q_empty, 256); // every computing thread: each has read the tile's description
        for (int s = 0; s < STAGES; ++s) {
            // A warp's own copies, and the arrival that says how many bytes TMA brings.
            barrier_init(k_full + 8 * s, 33);
            barrier_init(v_full + 8 * s, 33);
            barrier_init(k_empty + 8 * s, 8);
            barrier_init(v_empty + 8 * s, 8);
        }
        proxy_fence();
    }
    __syncthreads();
    pdl_wait();
    pdl_launch();

    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        if (warp > 0) return;
        Ring kr = {0, 1}, vr = {0, 1}; // the first round finds every buffer empty
        u32 q_parity = 1;
        // Each lane knows where the step's BOX keys from `lane * BOX` on are, and whether all, none or some (those in
        // [from, end)) are attended to: none are zeros, which lie behind the end of the cache.
        const int boxes = KEYS / BOX, beyond = blocks * kv_heads * block_size;
        struct Rows {
            int row, from, end;
        };
        auto rows_of = [&](const Tile &t, int step) {
            int token = t.begin + step * KEYS + lane * BOX;
            Rows r = {beyond, max(t.from - token, 0), min(t.end - token, (int)BOX)};
            if (lane < boxes && r.from < r.end) {
                int block = min((u32)block_tables[(i64)t.seq * width + token / block_size], (u32)blocks - 1);
                r.row = (block * kv_heads + t.kv_head) * block_size + token % block_size;
            }
            return r;
        };
        const u64 usual = policy_usual();
        auto copy = [&](const elem *cache, const TensorMap *map, u32 to, u32 barrier, Rows rows) {
            bool some = lane < boxes && rows.row != beyond && (rows.from > 0 || rows.end < BOX);
            u32 parts = __ballot_sync(FULL_WARP, some);
            if (lane == 0) barrier_arrive_expect(barrier, (boxes - __popc(parts)) * BOX * HEAD_DIM * 2);
            __syncwarp();
            if (lane < boxes && !some) copy_box4(to + lane * (BOX / 8 * GROUP_BYTES), map, 0, rows.row / 8, barrier, usual);
            // What is in the cache behind a sequence's end may be anything, even NaN, which no weight of zero undoes.
            for (; parts; parts &= parts - 1) {
                int box = __ffs(parts) - 1, row = __shfl_sync(FULL_WARP, rows.row, box);
                int from = __shfl_sync(FULL_WARP, rows.from, box), end = __shfl_sync(FULL_WARP, rows.end, box);
                for (int i = lane; i < BOX * CHUNKS; i += 32) {
                    int local = i / CHUNKS, c = i % CHUNKS, r = box * BOX + local;
                    u32 at = to + r / 8 * GROUP_BYTES + c / 8 * 1024 + r % 8 * 128 + (((c ^ r) & 7) << 4);
                    bool valid = local >= from && local < end;
                    cp_async16(at, cache + (i64)(row + (valid ? local : from)) * HEAD_DIM + c * 8, valid);
                }
            }
            barrier_arrive_copies(barrier);
        };
        u32 *taken = (u32 *)tiles + 3 * num_tiles;
        Tile t;
        t.take(a, taken, num_tiles, lane);
        Rows rows = {};
        if (t.steps > 0) rows = rows_of(t, 0);
        while (t.steps > 0) {
            barrier_wait(q_empty, q_parity);
            q_parity ^= 1;
            if (lane == 0) {
                next_tile = t;
                barrier_arrive_expect(q_full, ROWS / ratio * ratio * HEAD_DIM * 2);
#pragma unroll
                for (int d = 0; d < HEAD_DIM / 64; ++d)
                    copy_box3(q_tile + d * (ROWS * 128), &q_map, d * 64, t.kv_head * ratio, t.row, q_full, usual);
            }
            __syncwarp();
            Tile after;
            Rows last_rows = rows;
            for (int step = 0; step <= t.steps; ++step) {
                Rows these_rows = rows;
                if (step < t.steps) {
                    barrier_wait(k_empty + 8 * kr.at, kr.parity);
                    copy(k, &k_map, k_ring + kr.at * KEY_BYTES, k_full + 8 * kr.at, rows);
                    kr.next();
                    if (step + 1 < t.steps) rows = rows_of(t, step + 1);
                }
                if (step > 0) {
                    barrier_wait(v_empty + 8 * vr.at, vr.parity);
                    copy(v, &v_map, v_ring + vr.at * KEY_BYTES, v_full + 8 * vr.at, last_rows);
                    vr.next();
                }
                // The tile after this one is looked up while there is no room for more copies.
                if (step == min(1, t.steps - 1)) after.take(a, taken, num_tiles, lane);
                if (step + 1 == t.steps && after.steps > 0) rows = rows_of(after, 0);
                last_rows = these_rows;
            }
            t = after;
        }
        barrier_wait(q_empty, q_parity);
        if (lane == 0) {
            next_tile.steps = 0;
            barrier_arrive(q_full);
        }
        cp_async_wait<0>();
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    Ring kr = {0, 0}, vr = {0, 0};
    u32 q_parity = 0;
    const int row0 = (group - 1) * 64 + warp * 16 + lane / 4, col0 = 2 * (lane % 4);
    const float factor = SOFT_CAP ? scale / soft_cap : scale * LOG2E;
    const u64 q_rows = descriptor(q_tile + (group - 1) * 64 * 128, 16);
    const u64 keys = descriptor(k_ring, 16, GROUP_BYTES), values = descriptor(v_ring, 1024, GROUP_BYTES);
    auto release = [&](u32 barrier) {
        __syncwarp();
        if (lane == 0) barrier_arrive(barrier);
    };
    float s[KEYS / 2], o[HEAD_DIM / 2];
    u32 p[KEYS / 16][4];
    while (true) {
        barrier_wait(q_full, q_parity);
        q_parity ^= 1;
        Tile t = next_tile;
        if (t.steps == 0) break;
        int token[2], position[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            token[h] = (row0 + 8 * h) / ratio;
            position[h] = t.position + min(token[h], t.tokens - 1);
        }
        float m[2] = {-INFINITY_F, -INFINITY_F}, l[2] = {0.f, 0.f}, fade[2];
#pragma unroll
        for (int j = 0; j < HEAD_DIM / 2; ++j) o[j] = 0.f;

        // Where the copying warp may have written itself, beside TMA.
        auto fence_parts = [&](int step) {
            if (step == t.steps - 1 || window > 0) proxy_fence();
        };
        auto start_keys = [&](int step) {
            const u64 stage = descriptor_on(keys, kr.at * KEY_BYTES);
            barrier_wait(k_full + 8 * kr.at, kr.parity);
            fence_parts(step);
            wgmma_fence();
#pragma unroll
            for (int d = 0; d < HEAD_DIM / 16; ++d)
                multiply_keys(s, descriptor_on(q_rows, d / 4 * (ROWS * 128) + d % 4 * 32),
                              descriptor_on(stage, d / 4 * 1024 + d % 4 * 32), d > 0);
            wgmma_commit();
        };
        auto start_values = [&](int step) {
            const u64 stage = descriptor_on(values, vr.at * KEY_BYTES);
            barrier_wait(v_full + 8 * vr.at, vr.parity);
            fence_parts(step);
            wgmma_fence();
#pragma unroll
            for (int j = 0; j < KEYS / 16; ++j) multiply_values(o, p[j], descriptor_on(stage, j * 2 * GROUP_BYTES));
            wgmma_commit();
        };
        // Scores to weights, in place; how much what was there before counts, to `fade`.
        auto softmax = [&](int step) {
            int token0 = t.begin + step * KEYS;
            bool edge = token0 + KEYS > t.position + 1 ||
                        (window > 0 && token0 <= t.position + t.tokens - 1 - window);
            if (SOFT_CAP) {
#pragma unroll
                for (int j = 0; j < KEYS / 2; ++j) s[j] = soft_cap * LOG2E * tanhf(s[j] * factor);
            }
            if (edge) {
#pragma unroll
                for (int j = 0; j < KEYS / 2; ++j) {
                    int key = token0 + j / 4 * 8 + col0 + j % 2, at = position[j / 2 % 2];
                    if (key > at || (window > 0 && key <= at - window)) s[j] = -INFINITY_F;
                }
            }
            const float by = SOFT_CAP ? 1.f : factor;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float most = m[h];
#pragma unroll
                for (int j = 0; j < KEYS / 8; ++j) most = fmaxf(most, fmaxf(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]));
                most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 1));
                most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 2));
                // Rounded products, not a fused difference: a step that changes nothing must fade by exactly 1, or the
                // result of a row would depend on how far the other rows of its tile see.
                float base = most == -INFINITY_F ? 0.f : __fmul_rn(most, by);
                fade[h] = exp2_fast(__fmul_rn(m[h], by) - base);
                m[h] = most;
                float sum[4] = {}; // short chains
#pragma unroll
                for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        float &x = s[4 * j + 2 * h + e];
                        x = exp2_fast(x * by - base);
                        sum[j % 2 * 2 + e] += x;
                    }
                l[h] = l[h] * fade[h] + ((sum[0] + sum[1]) + (sum[2] + sum[3]));
            }
        };
        auto pack = [&]() {
#pragma unroll
            for (int j = 0; j < KEYS / 16; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) p[j][i] = pack2<elem>(s[8 * j + 2 * i], s[8 * j + 2 * i + 1]);
        };

        auto keys_done = [&](int step) {
            settled(s);
            release(k_empty + 8 * kr.at);
            kr.next();
            if (step == t.steps - 1) barrier_arrive(q_empty);
        };
        auto values_done = [&]() {
            settled(o);
            release(v_empty + 8 * vr.at);
            vr.next();
        };

        start_keys(0);
        wgmma_wait<0>();
        keys_done(0);
        softmax(0);
        pack();
        for (int step = 1; step < t.steps; ++step) {
            start_keys(step);
            start_values(step - 1);
            wgmma_wait<1>();
            keys_done(step);
            softmax(step);
            wgmma_wait<0>(); // which the assembler puts before the softmax; forced to stay here, it is no faster
            values_done();
#pragma unroll
            for (int j = 0; j < HEAD_DIM / 2; ++j) o[j] *= fade[j / 2 % 2];
            pack();
        }
        start_values(t.steps - 1);
        wgmma_wait<0>();
        values_done();
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            l[h] += __shfl_xor_sync(FULL_WARP, l[h], 1);
            l[h] += __shfl_xor_sync(FULL_WARP, l[h], 2);
            if (token[h] >= t.tokens) continue;
            int head = t.kv_head * ratio + row0 + 8 * h - token[h] * ratio;
            float inv = 1.f / l[h];
            elem *to = out + ((i64)(t.row + token[h]) * heads + head) * HEAD_DIM + col0;
#pragma unroll
            for (int j = 0; j < HEAD_DIM / 8; ++j)
                *(u32 *)(to + 8 * j) = pack2<elem>(o[4 * j + 2 * h] * inv, o[4 * j + 2 * h + 1] * inv);
        }
    }
#endif
}
