// What rope_cache.cu does, to the bit, for many tokens and heads that are rotated whole: a lane has 16 bytes of each half of
// a head, so a warp takes several heads at a time, which costs a quarter of the instructions.
//
// Defines: T_BF16 or T_HALF, HEAD_DIM = ROTARY_DIM, 64 or 128, QK_NORM (0 or 1), HEADS: how often a warp does so, for one
// token, whose angles it reads once.
// rope.cuh stands before this file when it is compiled.

static const int WARPS = 8;
/// Of a head; heads at a time.
static const int LANES = HALF_ROT / 8, AT_ONCE = 32 / LANES;
static_assert(HEAD_DIM == ROTARY_DIM && (LANES == 4 || LANES == 8), "whole heads of 64 or 128");

/// Eight neighbours of the first half, and their partners.
struct Part {
    Vec16 first, second;

    DEVICE void load(const elem *head, int part) {
        first = load16(head + part * 8), second = load16(head + HALF_ROT + part * 8);
    }
    DEVICE void store(elem *head, int part) const {
        store16(head + part * 8, first), store16(head + HALF_ROT + part * 8, second);
    }
};

/// The sum over a head of `v`, of which a lane has four terms: in the order in which `warp_sum` adds them up if each of 32
/// lanes has one.
DEVICE float head_sum(float (&v)[4]) {
#pragma unroll
    for (int d = LANES / 2; d > 0; d /= 2)
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] += __shfl_xor_sync(FULL_WARP, v[i], d);
    return (v[0] + v[2]) + (v[1] + v[3]);
}

/// As `turn_head`. `cos` and `sin` are those of this lane's part.
DEVICE void turn_part(Part &part, const Part &weight, float eps, const float (&cos)[8], const float (&sin)[8]) {
    float a[8], b[8];
    unpack8<elem>(part.first, a), unpack8<elem>(part.second, b);
#if QK_NORM
    float squares[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float sum = __fmaf_rn(a[2 * i], a[2 * i], __fmaf_rn(a[2 * i + 1], a[2 * i + 1], 0.f));
        squares[i] = __fmaf_rn(b[2 * i], b[2 * i], __fmaf_rn(b[2 * i + 1], b[2 * i + 1], sum));
    }
    float inv = rsqrtf(head_sum(squares) / HEAD_DIM + eps);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float2 x = scaled(make_float2(a[2 * i], a[2 * i + 1]), inv, weight.first.word[i]);
        float2 y = scaled(make_float2(b[2 * i], b[2 * i + 1]), inv, weight.second.word[i]);
        a[2 * i] = x.x, a[2 * i + 1] = x.y, b[2 * i] = y.x, b[2 * i + 1] = y.y;
    }
#endif
    float c[8], d[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) c[i] = turn(a[i], b[i], cos[i], -sin[i]), d[i] = turn(b[i], a[i], cos[i], sin[i]);
    part.first = pack8<elem>(c), part.second = pack8<elem>(d);
}

/// The arguments of rope_cache.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    rope_cache_many(const elem *qkv, const elem *q_norm, const elem *k_norm, float eps, const float *cos_table,
                    const float *sin_table, const i64 *rope_index, const i64 *slots, elem *q_out, elem *k_cache,
                    elem *v_cache, int tokens, int heads, int kv_heads, i64 positions, int blocks, int block_size) {
    const int lane = threadIdx.x % 32, part = lane % LANES;
    const int all_heads = heads + 2 * kv_heads, groups = (all_heads + AT_ONCE * HEADS - 1) / (AT_ONCE * HEADS);
    const i64 unit = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
    const bool active = unit < (i64)tokens * groups;
    const int token = active ? (int)(unit / groups) : 0;
    const int first = active ? (int)(unit % groups) * (AT_ONCE * HEADS) + lane / LANES : 0;

    // None of this comes from an earlier kernel of the step.
    const i64 slot = slots[token], row = max((i64)0, min(rope_index[token], positions - 1));
    float cos[8], sin[8];
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        *(float4 *)(cos + i) = *(const float4 *)(cos_table + row * HALF_ROT + part * 8 + i);
        *(float4 *)(sin + i) = *(const float4 *)(sin_table + row * HALF_ROT + part * 8 + i);
    }
    Part q_weight = {}, k_weight = {};
#if QK_NORM
    q_weight.load(q_norm, part), k_weight.load(k_norm, part);
#endif
    pdl_wait();
    pdl_launch();
    if (!active) return;

    Part parts[HEADS] = {};
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        int head = first + h * AT_ONCE;
        if (head < all_heads) parts[h].load(qkv + ((i64)token * all_heads + head) * HEAD_DIM, part);
    }
    const i64 block = slot / block_size;
    const bool write = slot >= 0 && block < blocks;
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        const int head = first + h * AT_ONCE;
        const bool is_q = head < heads, is_v = head >= heads + kv_heads;
        // All lanes, also those of values: they add up together.
        Part turned = parts[h], weight;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            weight.first.word[i] = is_q ? q_weight.first.word[i] : k_weight.first.word[i];
            weight.second.word[i] = is_q ? q_weight.second.word[i] : k_weight.second.word[i];
        }
        turn_part(turned, weight, eps, cos, sin);
        if (is_q) {
            turned.store(q_out + ((i64)token * heads + head) * HEAD_DIM, part);
        } else if (write && head < all_heads) {
            int kv_head = is_v ? head - heads - kv_heads : head - heads;
            i64 at = ((block * kv_heads + kv_head) * block_size + slot % block_size) * HEAD_DIM;
            if (is_v)
                parts[h].store(v_cache + at, part);
            else
                turned.store(k_cache + at, part);
        }
    }
}
