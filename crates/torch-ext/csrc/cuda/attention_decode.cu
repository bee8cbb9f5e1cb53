// Attention of one query for each sequence over its paged keys and values (decode).
//
// The work is cut into items: one KV head of one sequence, and a range of its context (a split). The
// grid is as large as the GPU (or as the longest possible list of items): every thread block reads the
// context lengths, adds up the work, and takes its share of it, so a graph that was captured for long
// contexts costs nothing extra on short ones.
//
// How it is cut: attention_decode_work.cuh.
//
// The query heads that share a KV head are the rows of the tensor cores' 16-row operand. A warp
// takes tiles of 16 tokens, every WARPS-th of its item, through its own ring of STAGES buffers: it
// waits for its own copies alone, and the copies run on across items. The warps of a block meet once
// for each item to merge what they have. If a context has several splits, each leaves its part in
// the workspace, and the thread block that comes last adds them up.
//
// FUSED: the queries come from the QKV product, and the newest token's key and value, too. The block of
// an item normalizes and rotates them as it begins, while the tiles are on their way; the block of a
// context's last split also writes key and value to the cache, and puts them into its own copy of the
// tile. Nobody else reads them in this step.
//
// Defines: T_BF16 or T_HALF, HEAD_DIM (a multiple of 16), WARPS (of a thread block), STAGES, WIDE (1: up to 16 heads share a
// KV head; 0: up to 8), ANY_BLOCK (1: block sizes that are no power of two, or less than 16), SOFT_CAP (0 or 1), FUSED
// (0 or 1; 1: and those of rope.cuh). rope.cuh and attention_decode_work.cuh stand before this file when it is compiled.

#define INFINITY_F __int_as_float(0x7f800000)

static const int THREADS = WARPS * 32;
static const int MOST_SEQS = 256; // of a launch
static const int MOST_EACH = (MOST_SEQS + THREADS - 1) / THREADS;
static const int CHUNKS = HEAD_DIM / 8; // 16-byte chunks of a row
static const int TILE_BYTES = TILE * HEAD_DIM * 2;
static const int STAGE_BYTES = 2 * TILE_BYTES; // keys, then values
static const int TOGETHER = 8;                  // parts that are loaded at once
static const int PAD_DIM = HEAD_DIM + 8;       // elements in a row of the merge buffer, and of FUSED's

/// Where chunk `c` of row `r` is in a tile: rows of equal banks get different chunks.
DEVICE u32 chunk_offset(int r, int c) {
    int flip = CHUNKS % 8 == 0 ? r & 7 : CHUNKS % 4 == 0 ? (r >> 1) & 3 : (r >> 2) & 1;
    return (u32)(r * CHUNKS + (c ^ flip)) * 16;
}

/// Where the keys of the cursor's tile begin in the cache (for ANY_BLOCK: nothing).
DEVICE i64 find_tile(const Cursor &c, const int *table, const Params &p) {
#if ANY_BLOCK
    return 0;
#else
    int token0 = (c.first_tile + c.tile) * TILE;
    int block = min((u32)table[p.kv_block(token0)], (u32)p.blocks - 1);
    i64 row = ((i64)block * p.kv_heads + p.kv_head(c.head)) * p.block_size;
    return (row + p.place_in_block(token0)) * HEAD_DIM;
#endif
}

/// Starts the copies of the cursor's tile. Tokens that are not attended to arrive as zeros: what
/// the cache holds there may be anything, also NaN.
DEVICE void copy_tile(u32 stage, i64 at, const Cursor &c, const int *table, const Params &p, u64 policy) {
    int lane = threadIdx.x % 32;
    int token0 = (c.first_tile + c.tile) * TILE;
#pragma unroll
    for (int i = 0; i < TILE * CHUNKS / 32; ++i) {
        int index = lane + 32 * i;
        int r = index / CHUNKS, chunk = index % CHUNKS;
        int token = token0 + r;
        // FUSED: the newest comes from this kernel.
        bool valid = token >= c.start && token < c.context - FUSED;
#if ANY_BLOCK
        int block = valid ? min((u32)table[p.kv_block(token)], (u32)p.blocks - 1) : 0;
        i64 row = ((i64)block * p.kv_heads + p.kv_head(c.head)) * p.block_size + p.place_in_block(token);
        i64 from = row * HEAD_DIM + chunk * 8;
#else
        i64 from = at + index * 8;
#endif
        u32 to = stage + chunk_offset(r, chunk);
        cp_async16(to, p.k + from, valid, policy);
        cp_async16(to + TILE_BYTES, p.v + from, valid, policy);
    }
}

DEVICE float2 load_cg(const float2 *p) {
    float2 x;
    asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(p) : "memory");
    return x;
}
DEVICE float4 load_cg(const float4 *p) {
    float4 x;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "l"(p)
                 : "memory");
    return x;
}

DEVICE void store_out(elem *p, float4 x) {
    uint2 packed = make_uint2(pack2<elem>(x.x, x.y), pack2<elem>(x.z, x.w));
    *(uint2 *)p = packed;
}

DEVICE float exp2_diff(float x, float max) { return x == -INFINITY_F ? 0.f : exp2_fast(x - max); }

/// q: [tokens, heads, HEAD_DIM]; k, v: [blocks, kv_heads, block_size, HEAD_DIM];
/// out: [tokens, heads, HEAD_DIM]. For seqs[i] the query is row query_start[seqs[i]]; FUSED: for first_seq + i, and there is
/// no such list, which would be one trip to memory more before anything begins.
/// part: [items, rows, HEAD_DIM], or, cut evenly, [gridDim.x, 2, rows, HEAD_DIM]; part_ml: the same without HEAD_DIM;
/// counters: [n, kv_heads * groups], zero before and after.
/// even: 0, or work may be cut evenly, or not at all, depending on the batch: if there are more items than blocks, and some
/// contexts have several splits or there are at least so many tiles and leads for a block.
/// fresh: how many of a context's newest tokens the kernel before this one may write.
/// read_once: whether L2 is to give up keys and values before other lines.
/// FUSED: q is [tokens, heads + 2 kv_heads, HEAD_DIM]; k_write and v_write are k and v; the rest is as in rope_cache.
/// Indices that point outside of a tensor are not followed.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_decode(const elem *q, const elem *k, const elem *v, const int *block_tables,
                     const int *query_start, const int *context_len, const int *seqs, elem *out,
                     float *part, float2 *part_ml, u32 *counters, int n, int tokens, int num_seqs,
                     int heads, int kv_heads, int groups, int rows, int width, int blocks,
                     int block_size, int max_context, int window, int max_splits, int even,
                     float scale, float soft_cap, int fresh, int first_seq, int read_once
#if FUSED
                     ,
                     elem *k_write, elem *v_write, const elem *q_norm, const elem *k_norm, float eps,
                     const float *cos_table, const float *sin_table, const i64 *rope_index, i64 positions
#endif
    ) {
    extern __shared__ __align__(128) unsigned char shared[];
    unsigned char *ring = shared;
    float *merge = (float *)(ring + WARPS * STAGES * STAGE_BYTES); // [WARPS, rows, PAD_DIM]
    float2 *merge_ml = (float2 *)(merge + WARPS * rows * PAD_DIM); // [WARPS, 16]
    int *contexts = (int *)(merge_ml + WARPS * 16);                // [n]
    int *first_item = contexts + n;                                // [n], in splits and, its last nine bits, in sequences
    int *first_tile = first_item + n;                              // [n], in tiles and leads
    int *table_rows = first_tile + n, *q_rows = table_rows + n;    // [n] each
#if FUSED
    // [rows + 2, PAD_DIM]: an item's queries, the newest key, the newest value; from a multiple of 16 bytes on.
    elem *turned = (elem *)(contexts + (5 * n + 3) / 4 * 4);
#endif
    __shared__ int2 scan[WARPS];
    __shared__ int scan_longest[WARPS];
    __shared__ int is_last;

    int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    int all_heads = kv_heads * groups;
    Params p = {q,       k,    v,     block_tables, kv_heads,   groups, heads / kv_heads,
                rows,    width, blocks, block_size,   window, max_splits};

    // The list of items. Nothing of it comes from an earlier kernel of the step.
    max_context = min((i64)max_context, (i64)width * block_size);
    // A thread has sequences next to one another: their lengths are one trip to memory, and all are added up once.
    const int each = (n + THREADS - 1) / THREADS;
    int lens[MOST_EACH], rows_of[MOST_EACH];
#pragma unroll
    for (int k = 0; k < MOST_EACH; ++k) {
        int i = tid * each + k;
        lens[k] = 0, rows_of[k] = -1;
        if (k >= each || i >= n) continue;
        int seq = FUSED ? first_seq + i : seqs[i];
        bool known = seq >= 0 && seq < num_seqs;
        table_rows[i] = known ? seq : 0;
        if (known) lens[k] = context_len[seq], rows_of[k] = query_start[seq];
    }
    int2 own = make_int2(0, 0); // splits and, in the last nine bits, contexts that are not empty; tiles and leads
    int longest = 0;            // of them, with its lead
#pragma unroll
    for (int k = 0; k < MOST_EACH; ++k) {
        int i = tid * each + k;
        if (k >= each || i >= n) continue;
        // FUSED: a context that is cut off has no newest token here.
        bool whole = !FUSED || lens[k] <= max_context;
        q_rows[i] = rows_of[k] < tokens && whole ? rows_of[k] : -1;
        contexts[i] = max(0, min(lens[k], max_context));
        first_item[i] = own.x, first_tile[i] = own.y; // of this thread's
        Cut cut(contexts[i], p);
        if (cut.splits == 0) continue;
        own.x += cut.splits << 9 | 1, own.y += LEAD + cut.tiles;
        longest = max(longest, LEAD + cut.tiles);
    }
    longest = __reduce_max_sync(FULL_WARP, longest);
    int2 upto = own;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        int2 y = make_int2(__shfl_up_sync(FULL_WARP, upto.x, d), __shfl_up_sync(FULL_WARP, upto.y, d));
        if (lane >= d) upto.x += y.x, upto.y += y.y;
    }
    if (lane == 31) scan[warp] = upto, scan_longest[warp] = longest;
    __syncthreads();
    int2 sum = make_int2(0, 0), before = make_int2(upto.x - own.x, upto.y - own.y);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        if (w < warp) before.x += scan[w].x, before.y += scan[w].y;
        sum.x += scan[w].x, sum.y += scan[w].y;
        longest = max(longest, scan_longest[w]);
    }
    for (int i = tid * each; i < min(n, (tid + 1) * each); ++i) first_item[i] += before.x, first_tile[i] += before.y;
    __syncthreads();
    const int live = sum.x & 511, splits = sum.x >> 9;
    Share share;
    share.cut(even, splits, live, all_heads, sum.y, longest);
    if (share.whole) p.max_splits = 1;
    share.total = (i64)(share.even ? sum.y : share.whole ? live : splits) * all_heads;
    share.begin = share.begin_of(blockIdx.x), share.end = share.begin_of(blockIdx.x + 1);
    auto put_zeros = [&] {
        if (live == n) return;
        for (int i = blockIdx.x; i < n; i += gridDim.x) {
            if (contexts[i] > 0 || q_rows[i] < 0) continue;
            uint4 *to = (uint4 *)(out + (i64)q_rows[i] * heads * HEAD_DIM);
            for (int e = tid; e < heads * CHUNKS; e += THREADS) to[e] = make_uint4(0, 0, 0, 0);
        }
    };
    if (share.begin >= share.end) {
        pdl_wait();
        pdl_launch();
        put_zeros();
        return;
    }

    Cursor c;
    {
        auto first = [&](int i) { return share.even ? first_tile[i] : share.whole ? first_item[i] & 511 : first_item[i] >> 9; };
        int before = 0; // sequences that begin no later than this block
        for (int i = lane; i < n; i += 32) before += (i64)first(i) * all_heads <= share.begin;
        int low = __reduce_add_sync(FULL_WARP, before) - 1;
        c.at = share.begin, c.seq = low;
        c.enter(contexts, p);
        int rest = (int)(share.begin - (i64)first(low) * all_heads), each = c.span(share);
        c.head = rest / each, c.first = c.at - rest % each;
        c.aim(share, warp);
    }
    Cursor ahead = c; // the next tile to copy
    u32 my_ring = shared_address(ring) + warp * STAGES * STAGE_BYTES;
    int filled = 0; // where it goes
    bool waited = false;
    const u64 policy = read_once ? policy_read_once() : policy_usual();
    auto copy_next = [&]() {
        while (ahead.at < share.end && ahead.tile >= ahead.to) ahead.advance(share, contexts, p, warp);
        if (ahead.at < share.end) {
            const int *table = block_tables + (i64)table_rows[ahead.seq] * width;
            i64 at = find_tile(ahead, table, p);
            // The `fresh` newest tokens are written by the kernel before this one; all others were earlier.
            if (!FUSED && !waited && (ahead.first_tile + ahead.tile + 1) * TILE > ahead.context - fresh) {
                pdl_wait();
                waited = true;
            }
            copy_tile(my_ring + filled * STAGE_BYTES, at, ahead, table, p, policy);
            ahead.tile += WARPS;
        }
        cp_async_commit();
        filled = filled + 1 == STAGES ? 0 : filled + 1;
    };
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) copy_next();
#if FUSED
    u32 q_weight[WORDS] = {}, k_weight[WORDS] = {};
#if QK_NORM
    load_head(q_norm, lane, q_weight);
    load_head(k_norm, lane, k_weight);
#endif
    // Heads that this warp turns for an item. Where they stand, and what is needed beside them, comes from no kernel of the
    // step: for the first item all of it, two trips to memory, is there by the time the kernel before is done.
    const int UNITS = ((WIDE ? 16 : 8) + 2 + WARPS - 1) / WARPS;
    const elem *unit[UNITS]; // query heads, then the newest key, then its value; null: no more
    Angles angles;
    int newest_block = -1;
    auto has_newest = [&](const Cursor &c) { return c.has_end() && q_rows[c.seq] >= 0; };
    auto find_heads = [&](const Cursor &c) {
        int row = q_rows[c.seq], kv_head = p.kv_head(c.head), first_row = (c.head - kv_head * groups) * rows;
        bool newest = has_newest(c);
        int live = min(rows, p.ratio - first_row), units = row < 0 ? 0 : live + (newest ? 2 : 0);
#pragma unroll
        for (int i = 0; i < UNITS; ++i) {
            int u = warp + i * WARPS;
            int head = u < live ? kv_head * p.ratio + first_row + u : heads + kv_head + (u - live) * kv_heads;
            unit[i] = u < units ? q + ((i64)row * (heads + 2 * kv_heads) + head) * HEAD_DIM : nullptr;
        }
        if (row < 0) return;
        angles.load(cos_table, sin_table, rope_index[row], positions, lane);
        if (newest) newest_block = block_tables[(i64)table_rows[c.seq] * width + p.kv_block(c.context - 1)];
    };
    find_heads(c);
#endif
    pdl_wait();
    pdl_launch();
    waited = true;
    put_zeros();

    const int g = lane / 4, t = lane % 4;
    const float log2e = 1.4426950408889634f;
    const float factor = SOFT_CAP ? scale / soft_cap : scale * log2e;
    u32 qa[HEAD_DIM / 16][WIDE ? 4 : 2];
    int loaded_seq = -1, loaded_head = -1;
#if FUSED
    // On their way while the item before is worked on.
    u32 raw[UNITS][WORDS];
    auto load_heads = [&] {
#pragma unroll
        for (int i = 0; i < UNITS; ++i)
            if (unit[i]) load_head(unit[i], lane, raw[i]);
    };
    load_heads();
#endif
    int stage = 0;
    for (; c.at < share.end; c.advance(share, contexts, p, warp)) {
        int row = q_rows[c.seq]; // of q and of out
        int kv_head = p.kv_head(c.head);
        int first_row = (c.head - kv_head * groups) * rows; // among the heads of the KV head
        int first_head = kv_head * p.ratio + first_row;
        int live_rows = row >= 0 ? min(rows, p.ratio - first_row) : 0;
#if FUSED
        const bool newest = has_newest(c);
        if (c.seq != loaded_seq || c.head != loaded_head || newest) {
            // The warps are through with the item before: they met after it. One warp a head.
#pragma unroll
            for (int i = 0; i < UNITS; ++i) {
                int u = warp + i * WARPS;
                if (!unit[i]) break;
                bool is_q = u < live_rows, is_k = u == live_rows;
                u32 weight[WORDS];
#pragma unroll
                for (int w = 0; w < WORDS; ++w) weight[w] = is_q ? q_weight[w] : k_weight[w];
                if (is_q || is_k) turn_head(raw[i], weight, eps, angles);
                store_head(turned + (is_q ? u : rows + (is_k ? 0 : 1)) * PAD_DIM, lane, raw[i]);
                if (is_q || first_row > 0) continue; // the first of a KV head's groups writes
                if ((u32)newest_block >= (u32)blocks) continue;
                i64 slot = ((i64)newest_block * kv_heads + kv_head) * block_size + p.place_in_block(c.context - 1);
                store_head((is_k ? k_write : v_write) + slot * HEAD_DIM, lane, raw[i]);
            }
            __syncthreads();
        }
        {
            Cursor next = c;
            next.advance(share, contexts, p, warp);
            if (next.at < share.end) find_heads(next), load_heads();
        }
#endif
        if (c.seq != loaded_seq || c.head != loaded_head) {
            loaded_seq = c.seq, loaded_head = c.head;
#if FUSED
            const elem *from = turned;
            const int row_len = PAD_DIM;
#else
            const elem *from = q + ((i64)row * heads + first_head) * HEAD_DIM;
            const int row_len = HEAD_DIM;
#endif
#pragma unroll
            for (int s = 0; s < HEAD_DIM / 16; ++s) {
                const elem *at = from + g * row_len + s * 16 + 2 * t;
                qa[s][0] = g < live_rows ? *(const u32 *)at : 0;
                qa[s][1] = g < live_rows ? *(const u32 *)(at + 8) : 0;
#if WIDE
                at += 8 * row_len;
                qa[s][2] = g + 8 < live_rows ? *(const u32 *)at : 0;
                qa[s][3] = g + 8 < live_rows ? *(const u32 *)(at + 8) : 0;
#endif
            }
        }

        float o[HEAD_DIM / 8][4];
#pragma unroll
        for (int j = 0; j < HEAD_DIM / 8; ++j) o[j][0] = o[j][1] = o[j][2] = o[j][3] = 0.f;
        float m[2] = {-INFINITY_F, -INFINITY_F}, l[2] = {0.f, 0.f};

        for (; c.tile < c.to; c.tile += WARPS) {
            copy_next();
            cp_async_wait<STAGES - 1>();
            __syncwarp();
            u32 keys = my_ring + stage * STAGE_BYTES, values = keys + TILE_BYTES;
#if FUSED
            int last = c.context - 1 - (c.first_tile + c.tile) * TILE; // the newest token's row
            if (newest && last < TILE) {
                unsigned char *tile = ring + (warp * STAGES + stage) * STAGE_BYTES;
                for (int i = lane; i < 2 * CHUNKS; i += 32) {
                    int which = i / CHUNKS, chunk = i % CHUNKS;
                    *(uint4 *)(tile + which * TILE_BYTES + chunk_offset(last, chunk)) =
                        *(const uint4 *)(turned + (rows + which) * PAD_DIM + chunk * 8);
                }
                __syncwarp();
            }
#endif
            stage = stage + 1 == STAGES ? 0 : stage + 1;

            // Even and odd steps apart: shorter chains of products that wait for one another.
            float s[2][4] = {}, s_odd[2][4] = {};
#pragma unroll
            for (int d = 0; d < HEAD_DIM / 16; ++d) {
                float(&to)[2][4] = d % 2 && HEAD_DIM <= 128 ? s_odd : s;
                u32 b[4];
                ldmatrix_x4(b, keys + chunk_offset(lane / 16 * 8 + lane % 8, 2 * d + (lane / 8) % 2));
                u32 a1 = WIDE ? qa[d][WIDE ? 2 : 0] : 0, a3 = WIDE ? qa[d][WIDE ? 3 : 0] : 0;
                mma16816<elem>(to[0], qa[d][0], a1, qa[d][1], a3, b[0], b[1]);
                mma16816<elem>(to[1], qa[d][0], a1, qa[d][1], a3, b[2], b[3]);
            }
            int token0 = (c.first_tile + c.tile) * TILE;
            bool edge = token0 < c.start || token0 + TILE > c.context;
#pragma unroll
            for (int h = 0; h < (WIDE ? 2 : 1); ++h) {
                float most = m[h];
#pragma unroll
                for (int j = 0; j < 2; ++j)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        float &x = s[j][2 * h + e];
                        x = (x + s_odd[j][2 * h + e]) * factor;
                        if (SOFT_CAP) x = soft_cap * log2e * tanhf(x);
                        int token = token0 + 8 * j + 2 * t + e;
                        if (edge && (token < c.start || token >= c.context)) x = -INFINITY_F;
                        most = fmaxf(most, x);
                    }
                most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 1));
                most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 2));
                float fade = exp2_diff(m[h], most);
                m[h] = most;
                l[h] *= fade;
#pragma unroll
                for (int j = 0; j < 2; ++j)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        float &x = s[j][2 * h + e];
                        x = exp2_fast(x - most);
                        l[h] += x;
                    }
                if (__any_sync(FULL_WARP, fade != 1.f)) {
#pragma unroll
                    for (int j = 0; j < HEAD_DIM / 8; ++j) {
                        o[j][2 * h] *= fade;
                        o[j][2 * h + 1] *= fade;
                    }
                }
            }
            u32 a0 = pack2<elem>(s[0][0], s[0][1]), a2 = pack2<elem>(s[1][0], s[1][1]);
            u32 a1 = WIDE ? pack2<elem>(s[0][2], s[0][3]) : 0, a3 = WIDE ? pack2<elem>(s[1][2], s[1][3]) : 0;
#pragma unroll
            for (int d = 0; d < HEAD_DIM / 16; ++d) {
                u32 b[4];
                ldmatrix_x4_trans(b, values + chunk_offset(lane % 16, 2 * d + lane / 16));
                mma16816<elem>(o[2 * d], a0, a1, a2, a3, b[0], b[1]);
                mma16816<elem>(o[2 * d + 1], a0, a1, a2, a3, b[2], b[3]);
            }
            __syncwarp(); // all lanes have read the buffer that the next copy fills
        }

        // The warps' parts, side by side.
        __syncthreads(); // the item before was read
#pragma unroll
        for (int h = 0; h < (WIDE ? 2 : 1); ++h) {
            l[h] += __shfl_xor_sync(FULL_WARP, l[h], 1);
            l[h] += __shfl_xor_sync(FULL_WARP, l[h], 2);
            int r = g + 8 * h;
            if (r < rows) {
                float *to = merge + (warp * rows + r) * PAD_DIM + 2 * t;
#pragma unroll
                for (int j = 0; j < HEAD_DIM / 8; ++j)
                    *(float2 *)(to + 8 * j) = make_float2(o[j][2 * h], o[j][2 * h + 1]);
                if (t == 0) merge_ml[warp * 16 + r] = make_float2(m[h], l[h]);
            }
        }
        __syncthreads();
        // Cut evenly, a block leaves parts of two contexts at most: of that which it begins with, and of its last.
        i64 slot = (share.even ? 2 * (i64)blockIdx.x + (c.at != share.begin) : c.at) * rows;
        elem *to = out + ((i64)row * heads + first_head) * HEAD_DIM;
        for (int e = tid * 4; e < live_rows * HEAD_DIM; e += THREADS * 4) {
            int r = e / HEAD_DIM, d = e % HEAD_DIM;
            float most = -INFINITY_F, total = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) most = fmaxf(most, merge_ml[w * 16 + r].x);
            float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                float2 ml = merge_ml[w * 16 + r];
                float weight = exp2_diff(ml.x, most);
                float4 y = *(const float4 *)(merge + (w * rows + r) * PAD_DIM + d);
                total += weight * ml.y;
                x.x += weight * y.x, x.y += weight * y.y, x.z += weight * y.z, x.w += weight * y.w;
            }
            if (c.is_whole()) {
                float inv = 1.f / total;
                store_out(to + e, make_float4(x.x * inv, x.y * inv, x.z * inv, x.w * inv));
            } else {
                *(float4 *)(part + slot * HEAD_DIM + e) = x;
                if (d == 0) part_ml[slot + r] = make_float2(most, total);
            }
        }
        if (c.is_whole()) continue;

        // Who else has a part of this context.
        int parts = c.splits, first_block = 0;
        i64 first_slot = c.first;
        if (share.even) {
            i64 begin = c.first + LEAD;
            first_block = share.block_of(begin);
            parts = share.block_of(begin + c.tiles - 1) - first_block + 1;
            first_slot = 2 * first_block + (share.begin_of(first_block) < c.first);
        }
        auto slot_of = [&](int part) {
            if (share.even && part > 0) return 2 * ((i64)first_block + part);
            return first_slot + part;
        };
        __syncthreads();
        if (tid == 0) {
            u32 *counter = counters + (i64)c.seq * all_heads + c.head;
            is_last = add_acq_rel(counter, 1u) == (u32)parts - 1; // with the whole block's parts
            if (is_last) *counter = 0;
        }
        __syncthreads();
        if (!is_last) continue;
        for (int e = tid * 4; e < live_rows * HEAD_DIM; e += THREADS * 4) {
            float most = -INFINITY_F, total = 0.f;
            float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
            for (int begin = 0; begin < parts; begin += TOGETHER) {
                float2 ml[TOGETHER];
                float4 y[TOGETHER];
#pragma unroll
                for (int i = 0; i < TOGETHER; ++i) {
                    i64 from = slot_of(min(begin + i, parts - 1)) * rows;
                    ml[i] = load_cg(part_ml + from + e / HEAD_DIM);
                    y[i] = load_cg((const float4 *)(part + from * HEAD_DIM + e));
                }
                float now = most;
#pragma unroll
                for (int i = 0; i < TOGETHER; ++i) {
                    if (begin + i >= parts) ml[i] = make_float2(-INFINITY_F, 0.f);
                    now = fmaxf(now, ml[i].x);
                }
                float fade = exp2_diff(most, now);
                most = now, total *= fade;
                x.x *= fade, x.y *= fade, x.z *= fade, x.w *= fade;
#pragma unroll
                for (int i = 0; i < TOGETHER; ++i) {
                    float weight = exp2_diff(ml[i].x, most);
                    total += weight * ml[i].y;
                    x.x += weight * y[i].x, x.y += weight * y[i].y;
                    x.z += weight * y[i].z, x.w += weight * y[i].w;
                }
            }
            float inv = 1.f / total;
            store_out(to + e, make_float4(x.x * inv, x.y * inv, x.z * inv, x.w * inv));
        }
    }
}
