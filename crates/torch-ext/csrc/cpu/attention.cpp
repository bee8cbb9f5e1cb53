// Paged attention: varlen, causal, grouped queries; prefill chunks and decode steps are one kernel.
//
// Keys are visited in tiles of 64 aligned at position 0, in order, with an online softmax. A tile is
// brought into panels through the block table, so a score is one chain of fused multiply-adds over
// the head dimension and an output element one chain over the tile's keys. Nothing depends on how
// queries are grouped, chunked or batched, nor on the block size: masked keys contribute exact zeros
// and tiles that a query cannot see change none of its bits.
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "kernels.h"
#include "transpose.h"

namespace {

constexpr size_t TILE = 64;

inline size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// Scratch of one thread, in floats.
struct Scratch {
    float* q;       // [rows][d]
    float* keys;    // [TILE / 16] panels of padded_k(d) lines
    float* values;  // [dp / 16] panels of TILE lines
    float* scores;  // [rows][TILE]
    float* out;     // [rows][dp]
    float* peak;    // [rows] running maximum
    float* total;   // [rows] running sum
    size_t size;

    Scratch(float* base, size_t rows, size_t d) {
        size_t dp = round_up(d, PANEL), at = 0;
        auto take = [&](size_t n) {
            float* p = base + at;
            at += round_up(n, PANEL);
            return p;
        };
        q = take(rows * d);
        keys = take(TILE * padded_k(d));
        values = take(TILE * dp);
        scores = take(rows * TILE);
        out = take(rows * dp);
        peak = take(rows);
        total = take(rows);
        size = at;
    }
};

// Rows of keys or values of one kv head, found through a block table.
template <class Kv>
struct Pages {
    const char* base;
    const int32_t* table;
    size_t hkv, head, block_size, d;

    const void* row(size_t position) const {
        size_t page = (size_t)table[position / block_size], offset = position % block_size;
        return base + ((page * hkv + head) * block_size + offset) * d * Kv::SIZE;
    }
};

template <class Kv>
inline void load_keys(const Pages<Kv>& pages, size_t from, size_t count, float* panels) {
    for (size_t p = 0; p * PANEL < count; ++p) {
        const void* rows[PANEL];
        for (size_t j = 0; j < PANEL; ++j) {
            size_t key = p * PANEL + j;
            rows[j] = key < count ? pages.row(from + key) : nullptr;
        }
        fill_panel<Kv, F32, false>(rows, pages.d, (char*)(panels + p * padded_k(pages.d) * PANEL));
    }
}

template <class Kv>
inline void load_values(const Pages<Kv>& pages, size_t from, size_t count, float* panels) {
    size_t dp = round_up(pages.d, PANEL);
    for (size_t key = 0; key < count; ++key) {
        const char* row = (const char*)pages.row(from + key);
        for (size_t c = 0; c < dp; c += PANEL) {
            float* line = panels + (c / PANEL * TILE + key) * PANEL;
            if (c + PANEL <= pages.d) {
                TE_UNROLL for (int v = 0; v < NV; ++v) store(line + v * W, Kv::load(row, c + v * W));
            } else {
                for (size_t j = 0; j < PANEL; ++j)
                    line[j] = c + j < pages.d ? Kv::get(row, c + j) : 0.0f;
            }
        }
    }
}

// While one tile is multiplied, the rows [from, from + count) of the next one are fetched in about
// `steps` steps, as if they were contiguous (they are if the block size is a multiple of 16), a pair
// of cache lines at a time. Only a hint: nothing depends on what it fetches.
template <class Kv>
inline Prefetch next_tile(const Pages<Kv>& pages, size_t from, size_t end, size_t count,
                          size_t steps) {
    if (from >= end) return Prefetch{(const char*)pages.table, 0};
    return Prefetch{(const char*)pages.row(from), count * pages.d * Kv::SIZE / (steps + 1)};
}

// cap * tanh(x / cap)
inline vf soft_cap(vf x, float cap) {
    vf e = exp(x * splat(2.0f / cap));
    return splat(cap) - splat(2.0f * cap) / (e + 1.0f);
}

// One row of scores into weights for the keys [from, from + TILE) of which it sees [low, high);
// returns the factor for what was accumulated before.
inline float softmax_tile(float* scores, size_t from, size_t low, size_t high, float cap,
                          float& peak, float& total) {
    const float inf = __builtin_inff();
    constexpr int VECS = TILE / W;
    vf s[VECS];
    vf top = splat(-inf);
    TE_UNROLL for (int v = 0; v < VECS; ++v) {
        s[v] = load(scores + v * W);
        if (cap > 0.0f) s[v] = soft_cap(s[v], cap);
    }
    if (low > from || high < from + TILE) {
        for (size_t j = 0; j < TILE; ++j) {
            if (from + j < low || from + j >= high) s[j / W][j % W] = -inf;
        }
    }
    TE_UNROLL for (int v = 0; v < VECS; ++v) top = max(s[v], top);
    float now = max_lane(top);
    now = now > peak ? now : peak;
    if (now == -inf) {
        memset(scores, 0, TILE * sizeof(float));
        return 1.0f;
    }
    vf added = {};
    TE_UNROLL for (int v = 0; v < VECS; ++v) {
        vf weight = exp(s[v] - splat(now));
        added += weight;
        store(scores + v * W, weight);
    }
    float scale = exp(splat(peak - now))[0];
    total = total * scale + sum(added);
    peak = now;
    return scale;
}

template <class Kv>
void attend(const TeAttention& p, const TeAttentionTask& task, size_t head, const Scratch& s) {
    size_t group = p.hq / p.hkv, rows = task.count * group, dp = round_up(p.d, PANEL);
    size_t kp = padded_k(p.d);
    const int32_t* table = p.block_tables + task.seq * p.max_blocks;
    Pages<Kv> keys{(const char*)p.k_cache, table, p.hkv, head, p.block_size, p.d};
    Pages<Kv> values{(const char*)p.v_cache, table, p.hkv, head, p.block_size, p.d};

    for (size_t r = 0; r < rows; ++r) {
        size_t token = task.token + r / group, q_head = head * group + r % group;
        const float* q = p.q + (token * p.hq + q_head) * p.d;
        for (size_t i = 0; i < p.d; ++i) s.q[r * p.d + i] = q[i] * p.scale;
        s.peak[r] = -__builtin_inff();
        s.total[r] = 0.0f;
    }
    memset(s.out, 0, rows * dp * sizeof(float));

    auto first_key = [&](size_t position) {
        return p.window && position + 1 > p.window ? position + 1 - p.window : 0;
    };
    size_t end = (size_t)task.position + task.count;
    for (size_t from = first_key(task.position) / TILE * TILE; from < end; from += TILE) {
        size_t count = end - from < TILE ? end - from : TILE;
        load_keys(keys, from, count, s.keys);
        load_values(values, from, count, s.values);
        for (size_t c = 0; c < count; c += PANEL)
            block_groups<F32>(rows, s.q, p.d, (const char*)(s.keys + c * kp), p.d, s.scores + c,
                              TILE, true, next_tile(keys, from + TILE + c, end, PANEL, p.d / 2));
        for (size_t r = 0; r < rows; ++r) {
            size_t position = task.position + r / group;
            float scale = softmax_tile(s.scores + r * TILE, from, first_key(position), position + 1,
                                       p.soft_cap, s.peak[r], s.total[r]);
            if (scale != 1.0f)
                for (size_t i = 0; i < dp; ++i) s.out[r * dp + i] *= scale;
        }
        for (size_t c = 0; c < dp; c += PANEL)
            block_groups<F32>(rows, s.scores, TILE, (const char*)(s.values + c * TILE), count,
                              s.out + c, dp, false,
                              next_tile(values, from + TILE + c * TILE / dp, end,
                                        TILE * PANEL / dp + 1, TILE / 2));
    }

    for (size_t r = 0; r < rows; ++r) {
        size_t token = task.token + r / group, q_head = head * group + r % group;
        float* out = p.out + (token * p.hq + q_head) * p.d;
        for (size_t i = 0; i < p.d; ++i) out[i] = s.out[r * dp + i] / s.total[r];
    }
}

}  // namespace

size_t TE(attention_scratch)(size_t rows, size_t d) { return Scratch(nullptr, rows, d).size; }

void TE(attention)(const TeAttention* p) {
    with_dtype(p->kv_dtype, [&](auto t) {
        size_t rows = p->max_count * (p->hq / p->hkv);
#pragma omp parallel num_threads(p->threads)
        {
#if defined(_OPENMP)
            size_t thread = (size_t)omp_get_thread_num();
#else
            size_t thread = 0;
#endif
            Scratch scratch(p->scratch + thread * p->scratch_stride, rows, p->d);
#pragma omp for schedule(dynamic, 1)
            for (size_t i = 0; i < p->num_tasks * p->hkv; ++i)
                attend<decltype(t)>(*p, p->tasks[i / p->hkv], i % p->hkv, scratch);
        }
    });
}
