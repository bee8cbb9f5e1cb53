// Causal attention of many queries of a sequence over its paged keys and values, for Hopper (sm_90a): what
// attention_prefill.cu computes, with the same arguments, on warpgroup products.
//
// One block an SM takes tile after tile, in the order of the list. A tile is 128 rows: the `ratio` query heads of one KV
// head for 128 / ratio consecutive tokens. Of one warpgroup, one warp starts the copies to shared memory (a tile's Q and
// its description, then steps of KEYS keys and values, block by block, to a ring); the other two compute 64 rows each. A
// step's scores and the output of the step before are on the tensor cores together, and the two warpgroups take turns:
// one's softmax runs while the other's products do.
//
// Shared memory is in panels of 64 dimensions: rows of 128 bytes, whose 16-byte chunks are permuted by the row (the
// 128-byte swizzle of the product's descriptors). Of Q a panel has all rows. Of keys and values it has eight, and the panels
// of eight tokens follow one another, so that all dimensions of a block's tokens are one copy: many small ones are slower.
//
// Defines: T_BF16 or T_HALF, HEAD_DIM (64, 128 or 256), SOFT_CAP (0 or 1), BOX: how many consecutive rows of the cache one
// TMA copy takes, 8 to KEYS, a divisor of KEYS and of the block size.
// hopper.cuh stands before this file when it is compiled.

#define INFINITY_F __int_as_float(0x7f800000)
#if HEAD_DIM == 256
#define KEYS_N 64
#else
#define KEYS_N 128
#endif
#if defined(T_BF16)
#define TYPES "bf16.bf16"
#else
#define TYPES "f16.f16"
#endif

static const int ROWS = 128;
static const int KEYS = KEYS_N;
static const int STAGES = 2;
static const int CHUNKS = HEAD_DIM / 8;
static const int Q_BYTES = ROWS * HEAD_DIM * 2;
static const int KEY_BYTES = KEYS * HEAD_DIM * 2;
static const int GROUP_BYTES = 8 * HEAD_DIM * 2; // of eight tokens
static const float LOG2E = 1.4426950408889634f;

#if HOPPER
#define OUT8(i)                                                                                                        \
    "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]),        \
        "+f"(c[i + 7])
// multiply_keys: c (64 x KEYS) = a b^T, plus c if `add`; both in shared memory, rows along the panels' dimensions.
// multiply_values: c (64 x HEAD_DIM) += a b; a in registers, b's rows are tokens.
#if KEYS_N == 64
DEVICE void multiply_keys(float (&c)[32], u64 a, u64 b, bool add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPES " {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
                 "}, %32, %33, p, 1, 1, 0, 0;\n}\n"
                 : OUT8(0), OUT8(8), OUT8(16), OUT8(24)
                 : "l"(a), "l"(b), "r"((int)add));
}
#endif
#if KEYS_N == 128
DEVICE void multiply_keys(float (&c)[64], u64 a, u64 b, bool add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPES " {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
                 "}, %64, %65, p, 1, 1, 0, 0;\n}\n"
                 : OUT8(0), OUT8(8), OUT8(16), OUT8(24), OUT8(32), OUT8(40), OUT8(48), OUT8(56)
                 : "l"(a), "l"(b), "r"((int)add));
}
#endif
#if HEAD_DIM == 64
DEVICE void multiply_values(float (&c)[32], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPES " {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
                 : OUT8(0), OUT8(8), OUT8(16), OUT8(24)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#endif
#if HEAD_DIM == 128
DEVICE void multiply_values(float (&c)[64], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPES " {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
                 : OUT8(0), OUT8(8), OUT8(16), OUT8(24), OUT8(32), OUT8(40), OUT8(48), OUT8(56)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#endif
#if HEAD_DIM == 256
DEVICE void multiply_values(float (&c)[128], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPES " {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
                 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
                 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
                 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
                 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
                 "}, {%128, %129, %130, %131}, %132, 1, 1, 1, 1;\n"
                 : OUT8(0), OUT8(8), OUT8(16), OUT8(24), OUT8(32), OUT8(40), OUT8(48), OUT8(56), OUT8(64), OUT8(72), OUT8(80), OUT8(88), OUT8(96), OUT8(104), OUT8(112), OUT8(120)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#endif

/// As `copy_box`, of three dimensions.
DEVICE void copy_box3(u32 to, const TensorMap *map, int column, int middle, int row, u32 barrier, u64 policy) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
                 "l"(map), "r"(column), "r"(middle), "r"(row), "r"(barrier), "l"(policy)
                 : "memory");
}
/// What L2 does without a policy.
DEVICE u64 policy_usual() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

/// The two computing warpgroups' turns: `turn_end` of one lets the other's `turn_begin` through.
DEVICE void turn_begin(int group) { asm volatile("bar.sync %0, 256;" ::"r"(group) : "memory"); }
DEVICE void turn_end(int group) { asm volatile("bar.arrive %0, 256;" ::"r"(3 - group) : "memory"); }

/// A place in a ring of buffers and how often it went round.
struct Ring {
    int at;
    u32 parity;
    DEVICE void next() {
        if (++at == STAGES) at = 0, parity ^= 1;
    }
};

#endif

struct Args {
    const int *query_start, *context_len, *tiles;
    int tokens, num_seqs, ratio, kv_heads, context_room, window;
};

/// One tile, and which keys it sees.
struct Tile {
    int seq, kv_head;
    int row, tokens; // in the flat batch
    int position;    // of the first token
    int from, end;   // keys that some row sees
    int begin, steps;

    /// The list's tile `index`. No steps if its entry names nothing.
    DEVICE void load(const Args &a, int index) {
        steps = 0;
        seq = a.tiles[3 * index], kv_head = a.tiles[3 * index + 2];
        int first = a.tiles[3 * index + 1];
        if (seq < 0 || seq >= a.num_seqs || first < 0 || kv_head < 0 || kv_head >= a.kv_heads) return;
        int start = a.query_start[seq], chunk = a.query_start[seq + 1] - start;
        int context = min(a.context_len[seq], a.context_room);
        if (start < 0 || chunk <= first || start > a.tokens - chunk) return;
        row = start + first;
        tokens = min(ROWS / a.ratio, chunk - first);
        position = context - chunk + first;
        from = a.window > 0 ? max(0, position - a.window + 1) : 0;
        end = max(0, position + tokens);
        begin = from / KEYS * KEYS;
        steps = end > begin ? (end - begin + KEYS - 1) / KEYS : 0;
    }

    /// The next tile of the list that is there; no steps if none is left.
    DEVICE void take(const Args &a, int *taken, int total, int lane) {
        do {
            int index = 0;
            if (lane == 0) index = atomicAdd(taken, 1);
            index = __shfl_sync(FULL_WARP, index, 0);
            steps = 0;
            if (index >= total) return;
            load(a, index);
        } while (steps == 0);
    }
};

/// The arguments of attention_prefill; how many tiles there are, and a zero that counts those taken; for TMA, the cache as
/// [64, 8, HEAD_DIM / 64, groups of eight rows] in boxes of BOX rows, and q as [HEAD_DIM, heads, tokens] in boxes of 64 x ratio x (ROWS / ratio). Grid:
/// as many blocks as are to be busy.
extern "C" __global__ void __launch_bounds__(384, 1)
    attention_prefill_sm90(const elem *q, const elem *k, const elem *v, const int *block_tables, const int *query_start,
                           const int *context_len, const int *tiles, elem *out, int tokens, int num_seqs, int heads,
                           int kv_heads, int width, int blocks, int block_size, int window, float scale, float soft_cap,
                           int num_tiles, int *taken, const __grid_constant__ TensorMap q_map,
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
    if (group == 2) turn_end(group); // the first turn is the other's
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

        turn_begin(group);
        start_keys(0);
        turn_end(group);
        wgmma_wait<0>();
        keys_done(0);
        softmax(0);
        pack();
        for (int step = 1; step < t.steps; ++step) {
            turn_begin(group);
            start_keys(step);
            start_values(step - 1);
            turn_end(group);
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
