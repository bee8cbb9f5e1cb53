// Between the QKV product and attention, in one pass over it: the norm of each head of Q and K (if
// the layer has one), the rotation of Q and K, and the write of K and V to the paged cache.
//
// One warp takes HEADS heads of one token, all in registers: one where there are few tokens, four
// where there are many, so that the angles are read once for them and more loads are in flight.
//
// Defines: T_BF16 or T_HALF, HEAD_DIM, ROTARY_DIM (a multiple of 4, at most HEAD_DIM), QK_NORM (0
// or 1), HEADS.
// rope.cuh stands before this file when it is compiled.

static const int WARPS = 8;

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
    Angles angles;
    i64 slot = active && first + HEADS > heads ? slots[token] : -1;
    if (active && first < heads + kv_heads)
        angles.load(cos_table, sin_table, rope_index[token], positions, lane);
    u32 q_weight[WORDS] = {}, k_weight[WORDS] = {};
#if QK_NORM
    load_head(q_norm, lane, q_weight);
    load_head(k_norm, lane, k_weight);
#endif
    pdl_wait();
    pdl_launch();
    if (!active) return;

    u32 words[HEADS][WORDS];
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        if (first + h < all_heads)
            load_head(qkv + ((i64)token * all_heads + first + h) * HEAD_DIM, lane, words[h]);
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
            u32 weight[WORDS];
#pragma unroll
            for (int i = 0; i < WORDS; ++i) weight[i] = is_q ? q_weight[i] : k_weight[i];
            turn_head(words[h], weight, eps, angles);
        }
        store_head(dst, lane, words[h]);
    }
}
