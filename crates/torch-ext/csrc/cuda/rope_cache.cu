// Between the QKV product and attention, in one pass over it: the norm of each head of Q and K (if
// the layer has one), the rotation of Q and K, and the write of K and V to the paged cache.
//
// One warp takes one head of one token: all that a head needs stays in registers.
//
// Defines: T_BF16 or T_HALF, HEAD_DIM, ROTARY_DIM (a multiple of 4, at most HEAD_DIM), QK_NORM (0
// or 1).
#include "common.cuh"

static const int WARPS = 8;
static const int HALF_ROT = ROTARY_DIM / 2;
// Two neighbours of the first half and their two partners of the second are one unit of work.
static const int TURNS = (HALF_ROT / 2 + 31) / 32;
static const int REST = (HEAD_DIM - ROTARY_DIM) / 2;
static const int COPIES = (REST + 31) / 32;

/// x, normalized: rounded before and after the multiplication by the weight, as in the models'
/// own code.
DEVICE float2 scaled(float2 x, float inv, u32 weight) {
    float2 w = unpack2<elem>(weight);
    float2 y = unpack2<elem>(pack2<elem>(x.x * inv, x.y * inv));
    return unpack2<elem>(pack2<elem>(y.x * w.x, y.y * w.y));
}

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
    int all_heads = heads + 2 * kv_heads;
    i64 unit = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
    bool active = unit < (i64)tokens * all_heads;
    int token = active ? (int)(unit / all_heads) : 0;
    int head = active ? (int)(unit % all_heads) : 0;
    bool is_q = head < heads, is_v = head >= heads + kv_heads;

    // None of this comes from an earlier kernel of the step.
    float2 cos_row[TURNS], sin_row[TURNS];
#if QK_NORM
    u32 weight[2 * TURNS + COPIES + 1];
#endif
    i64 slot = -1;
    if (active && !is_v) {
        i64 row = rope_index[token];
        row = row < 0 ? 0 : (row >= positions ? positions - 1 : row);
#pragma unroll
        for (int i = 0; i < TURNS; ++i) {
            int pair = lane + 32 * i;
            if (2 * pair < HALF_ROT) {
                cos_row[i] = *(const float2 *)(cos_table + row * HALF_ROT + 2 * pair);
                sin_row[i] = *(const float2 *)(sin_table + row * HALF_ROT + 2 * pair);
            }
        }
#if QK_NORM
        const elem *norm = is_q ? q_norm : k_norm;
#pragma unroll
        for (int i = 0; i < TURNS; ++i) {
            int pair = lane + 32 * i;
            if (2 * pair < HALF_ROT) {
                weight[2 * i] = *(const u32 *)(norm + 2 * pair);
                weight[2 * i + 1] = *(const u32 *)(norm + HALF_ROT + 2 * pair);
            }
        }
#pragma unroll
        for (int i = 0; i < COPIES; ++i) {
            int pair = lane + 32 * i;
            if (pair < REST) weight[2 * TURNS + i] = *(const u32 *)(norm + ROTARY_DIM + 2 * pair);
        }
#endif
    }
    if (active && !is_q) slot = slots[token];
    pdl_wait();
    pdl_launch();
    if (!active) return;

    const elem *src = qkv + unit * HEAD_DIM;
    elem *dst;
    if (is_q) {
        dst = q_out + ((i64)token * heads + head) * HEAD_DIM;
    } else {
        i64 block = slot / block_size;
        if (slot < 0 || block >= blocks) return;
        int kv_head = is_v ? head - heads - kv_heads : head - heads;
        i64 at = ((block * kv_heads + kv_head) * block_size + slot % block_size) * HEAD_DIM;
        dst = (is_v ? v_cache : k_cache) + at;
    }
    if (is_v) {
#pragma unroll
        for (int i = 0; i < (HEAD_DIM / 2 + 31) / 32; ++i) {
            int pair = lane + 32 * i;
            if (pair < HEAD_DIM / 2) *(u32 *)(dst + 2 * pair) = *(const u32 *)(src + 2 * pair);
        }
        return;
    }

    float2 a[TURNS], b[TURNS], rest[COPIES + 1];
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < TURNS; ++i) {
        int pair = lane + 32 * i;
        a[i] = b[i] = make_float2(0.f, 0.f);
        if (2 * pair < HALF_ROT) {
            a[i] = unpack2<elem>(*(const u32 *)(src + 2 * pair));
            b[i] = unpack2<elem>(*(const u32 *)(src + HALF_ROT + 2 * pair));
        }
        squares += a[i].x * a[i].x + a[i].y * a[i].y + b[i].x * b[i].x + b[i].y * b[i].y;
    }
#pragma unroll
    for (int i = 0; i < COPIES; ++i) {
        int pair = lane + 32 * i;
        rest[i] = make_float2(0.f, 0.f);
        if (pair < REST) rest[i] = unpack2<elem>(*(const u32 *)(src + ROTARY_DIM + 2 * pair));
        squares += rest[i].x * rest[i].x + rest[i].y * rest[i].y;
    }
#if QK_NORM
    float inv = rsqrtf(warp_sum(squares) / HEAD_DIM + eps);
#endif
#pragma unroll
    for (int i = 0; i < TURNS; ++i) {
        int pair = lane + 32 * i;
        if (2 * pair >= HALF_ROT) continue;
#if QK_NORM
        a[i] = scaled(a[i], inv, weight[2 * i]);
        b[i] = scaled(b[i], inv, weight[2 * i + 1]);
#endif
        float2 c = cos_row[i], s = sin_row[i];
        *(u32 *)(dst + 2 * pair) = pack2<elem>(a[i].x * c.x - b[i].x * s.x, a[i].y * c.y - b[i].y * s.y);
        *(u32 *)(dst + HALF_ROT + 2 * pair) =
            pack2<elem>(b[i].x * c.x + a[i].x * s.x, b[i].y * c.y + a[i].y * s.y);
    }
#pragma unroll
    for (int i = 0; i < COPIES; ++i) {
        int pair = lane + 32 * i;
        if (pair >= REST) continue;
#if QK_NORM
        rest[i] = scaled(rest[i], inv, weight[2 * TURNS + i]);
#endif
        *(u32 *)(dst + ROTARY_DIM + 2 * pair) = pack2<elem>(rest[i].x, rest[i].y);
    }
}
