// Causal attention of many queries of a sequence over its paged keys and values (prefill, whole or in chunks). The
// chunk's own keys and values were written to the cache before.
//
// A thread block computes one tile: ROWS rows, which are the `ratio` query heads of one KV head for ROWS / ratio
// consecutive tokens; so a chunk of a few tokens fills the tensor cores' rows as well. It walks over the keys in steps
// of KEYS tokens, copied from their blocks straight to shared memory, double-buffered; each warp keeps 16 rows, their
// softmax and their output in registers. This is the version for every architecture (mma.sync);
// attention_prefill_sm90.cu is the one for Hopper.
//
// Defines: T_BF16 or T_HALF, HEAD_DIM (a multiple of 16), SOFT_CAP (0 or 1).
#include "common.cuh"

#define INFINITY_F __int_as_float(0x7f800000)

static const int WARPS = HEAD_DIM > 128 ? 4 : 8;
static const int THREADS = WARPS * 32;
static const int ROWS = WARPS * 16;
static const int KEYS = HEAD_DIM > 128 ? 32 : 64;
static const int CHUNKS = HEAD_DIM / 8; // 16-byte chunks of a row
static const bool Q_IN_REGISTERS = HEAD_DIM <= 128;
static const int KEY_BYTES = KEYS * HEAD_DIM * 2;
static const float LOG2E = 1.4426950408889634f;

/// Where chunk `c` of row `r` is in a tile: rows of equal banks get different chunks.
DEVICE u32 chunk_offset(int r, int c) {
    int flip = CHUNKS % 8 == 0 ? r & 7 : CHUNKS % 4 == 0 ? (r >> 1) & 3 : (r >> 2) & 1;
    return (u32)(r * CHUNKS + (c ^ flip)) * 16;
}

/// q: [tokens, heads, HEAD_DIM]; k, v: [blocks, kv_heads, block_size, HEAD_DIM]; out: as q. tiles: [.., 3], a sequence,
/// the first token of the tile in its chunk, and a KV head. Grid: tiles. Shared memory: Q's tile and two times K's and V's. Indices that point outside of a tensor are not followed.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_prefill(const elem *q, const elem *k, const elem *v, const int *block_tables, const int *query_start,
                      const int *context_len, const int *tiles, elem *out, int tokens, int num_seqs, int heads,
                      int kv_heads, int width, int blocks, int block_size, int window, float scale, float soft_cap) {
    extern __shared__ __align__(128) unsigned char shared[];
    u32 q_tile = shared_address(shared), ring = q_tile + ROWS * HEAD_DIM * 2;
    int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, g = lane / 4, t = lane % 4;
    const int *tile = tiles + 3 * (i64)blockIdx.x;
    int seq = tile[0], first = tile[1], kv_head = tile[2], ratio = heads / kv_heads;
    pdl_wait();
    pdl_launch();
    if (seq < 0 || seq >= num_seqs || first < 0 || kv_head < 0 || kv_head >= kv_heads) return;
    int start = query_start[seq];
    int chunk = query_start[seq + 1] - start;
    int context = min((i64)context_len[seq], (i64)width * block_size);
    if (start < 0 || chunk <= first || start > tokens - chunk) return;
    int before = context - chunk; // tokens of the sequence before the chunk
    int tile_tokens = min(ROWS / ratio, chunk - first), live = tile_tokens * ratio;
    const int *table = block_tables + (i64)seq * width;

    int from = window > 0 ? max(0, before + first - window + 1) : 0;
    int end = max(0, before + first + tile_tokens); // after the last key of any row
    int begin = from / KEYS * KEYS;
    int steps = end > begin ? (end - begin + KEYS - 1) / KEYS : 0;

    const elem *q_from = q + ((i64)(start + first) * heads + kv_head * ratio) * HEAD_DIM;
    elem *out_to = out + ((i64)(start + first) * heads + kv_head * ratio) * HEAD_DIM;
#pragma unroll
    for (int i = 0; i < ROWS * CHUNKS / THREADS; ++i) {
        int index = tid + THREADS * i, r = index / CHUNKS, c = index % CHUNKS;
        int token = r / ratio;
        bool valid = r < live;
        const elem *at = q_from + ((i64)(valid ? token : 0) * heads + (valid ? r % ratio : 0)) * HEAD_DIM + c * 8;
        cp_async16(q_tile + chunk_offset(r, c), at, valid);
    }
    auto copy_keys = [&](int step) {
        u32 to = ring + (step & 1) * 2 * KEY_BYTES;
#pragma unroll
        for (int i = 0; i < (KEYS * CHUNKS + THREADS - 1) / THREADS; ++i) {
            int index = tid + THREADS * i, r = index / CHUNKS, c = index % CHUNKS;
            if (KEYS * CHUNKS % THREADS != 0 && r >= KEYS) break;
            int token = begin + step * KEYS + r;
            // What is not attended to arrives as zeros: the cache may hold anything there, also NaN.
            bool valid = token >= from && token < end;
            int block = valid ? (int)min((u32)table[token / block_size], (u32)blocks - 1) : 0;
            i64 at = (((i64)block * kv_heads + kv_head) * block_size + token % block_size) * HEAD_DIM + c * 8;
            cp_async16(to + chunk_offset(r, c), k + at, valid);
            cp_async16(to + KEY_BYTES + chunk_offset(r, c), v + at, valid);
        }
    };
    if (steps > 0) copy_keys(0);
    cp_async_commit();

    // This lane's two rows.
    int position[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) position[h] = before + first + min((warp * 16 + g + 8 * h) / ratio, tile_tokens - 1);
    float factor = SOFT_CAP ? scale / soft_cap : scale * LOG2E;
    float m[2] = {-INFINITY_F, -INFINITY_F}, l[2] = {0.f, 0.f};
    float o[HEAD_DIM / 8][4];
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 8; ++j) o[j][0] = o[j][1] = o[j][2] = o[j][3] = 0.f;
    u32 qa[Q_IN_REGISTERS ? HEAD_DIM / 16 : 1][4];

    for (int step = 0; step < steps; ++step) {
        if (step + 1 < steps) copy_keys(step + 1);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        u32 keys = ring + (step & 1) * 2 * KEY_BYTES, values = keys + KEY_BYTES;
        if (Q_IN_REGISTERS && step == 0) {
#pragma unroll
            for (int d = 0; d < HEAD_DIM / 16; ++d)
                ldmatrix_x4(qa[Q_IN_REGISTERS ? d : 0],
                            q_tile + chunk_offset(warp * 16 + lane % 16, 2 * d + lane / 16));
        }
        float s[KEYS / 8][4];
#pragma unroll
        for (int j = 0; j < KEYS / 8; ++j) s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.f;
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 16; ++d) {
            u32(&a)[4] = qa[Q_IN_REGISTERS ? d : 0];
            if (!Q_IN_REGISTERS)
                ldmatrix_x4(a, q_tile + chunk_offset(warp * 16 + lane % 16, 2 * d + lane / 16));
#pragma unroll
            for (int j = 0; j < KEYS / 16; ++j) {
                u32 b[4];
                ldmatrix_x4(b, keys + chunk_offset(16 * j + lane / 16 * 8 + lane % 8, 2 * d + (lane / 8) % 2));
                mma16816<elem>(s[2 * j], a[0], a[1], a[2], a[3], b[0], b[1]);
                mma16816<elem>(s[2 * j + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
            }
        }
        int token0 = begin + step * KEYS;
        // Rows of the tile see different ends (and, with a window, different beginnings).
        bool edge = token0 + KEYS > before + first + 1 ||
                    (window > 0 && token0 <= before + first + tile_tokens - 1 - window);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float most = m[h];
#pragma unroll
            for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float &x = s[j][2 * h + e];
                    x *= factor;
                    if (SOFT_CAP) x = soft_cap * LOG2E * tanhf(x);
                    if (edge) {
                        int token = token0 + 8 * j + 2 * t + e;
                        if (token > position[h] || (window > 0 && token <= position[h] - window)) x = -INFINITY_F;
                    }
                    most = fmaxf(most, x);
                }
            most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 1));
            most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 2));
            float base = most == -INFINITY_F ? 0.f : most; // nothing to see yet in this row
            float fade = exp2f(m[h] - base);
            m[h] = most;
            l[h] *= fade;
#pragma unroll
            for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float &x = s[j][2 * h + e];
                    x = exp2f(x - base);
                    l[h] += x;
                }
#pragma unroll
            for (int j = 0; j < HEAD_DIM / 8; ++j) {
                o[j][2 * h] *= fade;
                o[j][2 * h + 1] *= fade;
            }
        }
#pragma unroll
        for (int j = 0; j < KEYS / 16; ++j) {
            u32 a0 = pack2<elem>(s[2 * j][0], s[2 * j][1]), a1 = pack2<elem>(s[2 * j][2], s[2 * j][3]);
            u32 a2 = pack2<elem>(s[2 * j + 1][0], s[2 * j + 1][1]), a3 = pack2<elem>(s[2 * j + 1][2], s[2 * j + 1][3]);
#pragma unroll
            for (int d = 0; d < HEAD_DIM / 16; ++d) {
                u32 b[4];
                ldmatrix_x4_trans(b, values + chunk_offset(16 * j + lane % 16, 2 * d + lane / 16));
                mma16816<elem>(o[2 * d], a0, a1, a2, a3, b[0], b[1]);
                mma16816<elem>(o[2 * d + 1], a0, a1, a2, a3, b[2], b[3]);
            }
        }
        __syncthreads(); // the buffer may be filled again
    }

#pragma unroll
    for (int h = 0; h < 2; ++h) {
        l[h] += __shfl_xor_sync(FULL_WARP, l[h], 1);
        l[h] += __shfl_xor_sync(FULL_WARP, l[h], 2);
        int r = warp * 16 + g + 8 * h;
        if (r >= live) continue;
        float inv = steps == 0 ? 0.f : 1.f / l[h];
        elem *to = out_to + ((i64)(r / ratio) * heads + r % ratio) * HEAD_DIM + 2 * t;
#pragma unroll
        for (int j = 0; j < HEAD_DIM / 8; ++j) *(u32 *)(to + 8 * j) = pack2<elem>(o[j][2 * h] * inv, o[j][2 * h + 1] * inv);
    }
}
