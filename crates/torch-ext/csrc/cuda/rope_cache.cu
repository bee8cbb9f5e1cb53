// Between the QKV product and attention, in one pass over it: the norm of each head of Q and K (if
// the layer has one), the rotation of Q and K, and the write of K and V to the paged cache.
//
// One warp takes HEADS heads of one token, all in registers: one where there are few tokens, four
// where there are many, so that the angles are read once for them and more loads are in flight.
//
// Defines: T_BF16 or T_HALF, HEAD_DIM, ROTARY_DIM (a multiple of 4, at most HEAD_DIM), QK_NORM (0
// or 1), HEADS.
#include "common.cuh"

static const int WARPS = 8;
static const int HALF_ROT = ROTARY_DIM / 2;
// Two neighbours of the first half and their two partners of the second are one unit of work.
static const int TURNS = (HALF_ROT / 2 + 31) / 32;
static const int REST = (HEAD_DIM - ROTARY_DIM) / 2;
static const int COPIES = (REST + 31) / 32;
// Registers of a head: first half, second half, rest.
static const int WORDS = 2 * TURNS + COPIES;

/// Where a lane's `i`-th pair of elements is in a head; negative: nowhere.
DEVICE int place(int i, int lane) {
    if (i < 2 * TURNS) {
        int pair = lane + 32 * (i / 2);
        return 2 * pair < HALF_ROT ? 2 * pair + (i % 2 ? HALF_ROT : 0) : -1;
    }
    int pair = lane + 32 * (i - 2 * TURNS);
    return pair < REST ? ROTARY_DIM + 2 * pair : -1;
}

/// x, normalized: rounded before and after the multiplication by the weight, as in the models'
/// own code.
DEVICE float2 scaled(float2 x, float inv, u32 weight) {
    float2 w = unpack2<elem>(weight);
    float2 y = unpack2<elem>(pack2<elem>(x.x * inv, x.y * inv));
    return unpack2<elem>(pack2<elem>(y.x * w.x, y.y * w.y));
}

/// a cos + b sin. Which of the products is fused with the sum is said here, not left to the compiler:
/// a row's bits must not depend on HEADS.
DEVICE float turn(float a, float b, float cos, float sin) { return __fmaf_rn(a, cos, __fmul_rn(b, sin)); }

/// qkv: [tokens, heads + 2 kv_heads, HEAD_DIM]. Writes q [tokens, heads, HEAD_DIM] and the rows of
/// k_cache and v_cache ([blocks, kv_heads, block_size, HEAD_DIM]) that `slots` names. Indices that
/// point outside are not followed: a bad slot writes nothing, a bad rope_index takes the nearest
/// row.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    rope_cache(const elem *qkv, const elem *q_norm, const elem *k_norm, float eps, const float *cos_table,
               const float *sin_table, const i64 *rope_index, const i64 *slots, elem *q_out, elem *k_cache,
               elem *v_cache, int tokens, int heads, int kv_heads, i64 positions, int blocks,
               int block_size) {
    int lane = threadIdx.x % 32;
    int all_heads = heads + 2 * kv_heads, groups = (all_heads + HEADS - 1) / HEADS;
    i64 unit = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
    bool active = unit < (i64)tokens * groups;
    int token = active ? (int)(unit / groups) : 0;
    int first = active ? (int)(unit % groups) * HEADS : 0;

    // None of this comes from an earlier kernel of the step.
    float2 cos_row[TURNS], sin_row[TURNS];
    i64 slot = active && first + HEADS > heads ? slots[token] : -1;
    if (active && first < heads + kv_heads) {
        i64 row = rope_index[token];
        row = row < 0 ? 0 : (row >= positions ? positions - 1 : row);
#pragma unroll
        for (int i = 0; i < TURNS; ++i) {
            int at = place(2 * i, lane);
            if (at < 0) continue;
            cos_row[i] = *(const float2 *)(cos_table + row * HALF_ROT + at);
            sin_row[i] = *(const float2 *)(sin_table + row * HALF_ROT + at);
        }
    }
#if QK_NORM
    u32 q_weight[WORDS], k_weight[WORDS];
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
        int at = place(i, lane);
        if (at < 0) continue;
        q_weight[i] = *(const u32 *)(q_norm + at);
        k_weight[i] = *(const u32 *)(k_norm + at);
    }
#endif
    pdl_wait();
    pdl_launch();
    if (!active) return;

    u32 words[HEADS][WORDS];
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        const elem *src = qkv + ((i64)token * all_heads + first + h) * HEAD_DIM;
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            int at = place(i, lane);
            words[h][i] = at >= 0 && first + h < all_heads ? *(const u32 *)(src + at) : 0;
        }
    }
    i64 block = slot / block_size;
    bool write = slot >= 0 && block < blocks;
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        int head = first + h;
        bool is_q = head < heads, is_v = head >= heads + kv_heads;
        elem *dst;
        if (is_q) {
            dst = q_out + ((i64)token * heads + head) * HEAD_DIM;
        } else {
            if (!write || head >= all_heads) continue;
            int kv_head = is_v ? head - heads - kv_heads : head - heads;
            i64 at = ((block * kv_heads + kv_head) * block_size + slot % block_size) * HEAD_DIM;
            dst = (is_v ? v_cache : k_cache) + at;
        }
        if (!is_v) {
            float2 x[WORDS];
#pragma unroll
            for (int i = 0; i < WORDS; ++i) x[i] = unpack2<elem>(words[h][i]);
#if QK_NORM
            float squares = 0.f;
#pragma unroll
            for (int i = 0; i < WORDS; ++i) squares = __fmaf_rn(x[i].x, x[i].x, __fmaf_rn(x[i].y, x[i].y, squares));
            float inv = rsqrtf(warp_sum(squares) / HEAD_DIM + eps);
#pragma unroll
            for (int i = 0; i < WORDS; ++i) x[i] = scaled(x[i], inv, is_q ? q_weight[i] : k_weight[i]);
#endif
#pragma unroll
            for (int i = 0; i < TURNS; ++i) {
                float2 a = x[2 * i], b = x[2 * i + 1], c = cos_row[i], s = sin_row[i];
                x[2 * i] = make_float2(turn(a.x, b.x, c.x, -s.x), turn(a.y, b.y, c.y, -s.y));
                x[2 * i + 1] = make_float2(turn(b.x, a.x, c.x, s.x), turn(b.y, a.y, c.y, s.y));
            }
#pragma unroll
            for (int i = 0; i < WORDS; ++i) words[h][i] = pack2<elem>(x[i].x, x[i].y);
        }
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            int at = place(i, lane);
            if (at >= 0) *(u32 *)(dst + at) = words[h][i];
        }
    }
}
