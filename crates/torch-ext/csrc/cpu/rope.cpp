// Query/key normalisation, rotary embedding, and the write into the paged cache.
#include "convert.h"
#include "kernels.h"
#include "reduce.h"

namespace {

// NeoX style: element i pairs with element i + rotary / 2; elements from `rotary` on pass through.
inline void rotate(float* x, const float* cos, const float* sin, size_t half) {
    for (size_t i = 0; i < half; ++i) {
        float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

template <class Kv>
void rope(const TeRope& p) {
    size_t half = p.rotary / 2;
#pragma omp parallel for schedule(static) num_threads(p.threads) if (p.t > 1)
    for (size_t t = 0; t < p.t; ++t) {
        const float* in = p.qkv + t * (p.hq + 2 * p.hkv) * p.d;
        const float* cos = p.cos + (size_t)p.positions[t] * half;
        const float* sin = p.sin + (size_t)p.positions[t] * half;
        for (size_t h = 0; h < p.hq; ++h, in += p.d) {
            float* q = p.q + (t * p.hq + h) * p.d;
            if (p.q_norm)
                rms_norm_row(in, p.q_norm, p.d, p.eps, q);
            else
                memcpy(q, in, p.d * sizeof(float));
            rotate(q, cos, sin, half);
        }
        if (p.slots[t] < 0) continue;
        size_t page = (size_t)p.slots[t] / p.block_size, offset = (size_t)p.slots[t] % p.block_size;
        for (size_t h = 0; h < 2 * p.hkv; ++h, in += p.d) {
            bool key = h < p.hkv;
            size_t head = key ? h : h - p.hkv;
            size_t at = ((page * p.hkv + head) * p.block_size + offset) * p.d;
            char* dst = (char*)(key ? p.k_cache : p.v_cache) + at * Kv::SIZE;
            if (!key) {
                put_row<Kv>(dst, in, p.d);
                continue;
            }
            // Heads go through a small buffer: the cache may hold a narrower type.
            float k[MAX_HEAD_DIM];
            if (p.k_norm)
                rms_norm_row(in, p.k_norm, p.d, p.eps, k);
            else
                memcpy(k, in, p.d * sizeof(float));
            rotate(k, cos, sin, half);
            put_row<Kv>(dst, k, p.d);
        }
    }
}

}  // namespace

void TE(rope)(const TeRope* p) {
    with_dtype(p->kv_dtype, [&](auto t) { rope<decltype(t)>(*p); });
}
