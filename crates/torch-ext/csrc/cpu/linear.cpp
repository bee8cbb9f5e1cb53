// Matrix products and row gathers on packed weights.
#include "api.h"
#include "kernels.h"
#include "panel.h"

namespace {

// Steps of k between write-backs of the accumulators when rows do not fit one register block:
// a block of weights (16 KiB of float32) stays in the first-level cache for all row groups.
constexpr size_t BLOCK_K = 256;
// Rows whose accumulators are kept beside it.
constexpr size_t BLOCK_M = 96;
// Up to here, widening narrow weights once per row group costs less than a copy.
template <class T>
constexpr size_t STREAM_M = 2 * ROWS<T>;
// Distance of the prefetch in a streaming product.
constexpr size_t AHEAD = 1024;

// y[16 columns from `col`] of rows [0, m): adds bias and residual, drops padding columns.
inline void finish(const TeLinear& p, size_t row, size_t m, size_t col, const float* c) {
    size_t width = p.n - col < (size_t)PANEL ? p.n - col : PANEL;
    for (size_t r = 0; r < m; ++r) {
        float* y = p.y + (row + r) * p.n + col;
        const float* from = c + r * PANEL;
        float line[PANEL];
        for (size_t j = 0; j < width; ++j) line[j] = from[j];
        if (p.bias)
            for (size_t j = 0; j < width; ++j) line[j] += p.bias[col + j];
        if (p.accumulate)
            for (size_t j = 0; j < width; ++j) line[j] = y[j] + line[j];
        memcpy(y, line, width * sizeof(float));
    }
}

// Few rows: weights go from memory to registers without a widened copy in between.
template <class T>
void stream_panel(const TeLinear& p, const char* panel, size_t col) {
    alignas(64) float c[STREAM_M<T> * PANEL];
    if (p.m <= (size_t)ROWS<T>) {
        constexpr size_t step = 2 * PANEL * T::SIZE;
        block_rows<T>(p.m, p.x, p.k, panel, p.k, c, PANEL, true, Prefetch{panel + AHEAD, step});
    } else {
        size_t groups = (p.m + ROWS<T> - 1) / ROWS<T>;
        for (size_t k0 = 0; k0 < p.k; k0 += BLOCK_K) {
            size_t k = p.k - k0 < BLOCK_K ? p.k - k0 : BLOCK_K;
            const char* lines = panel + k0 * PANEL * T::SIZE;
            // The row groups share the work of fetching the block that follows.
            Prefetch ahead{lines + k * PANEL * T::SIZE, 2 * PANEL * T::SIZE / groups};
            block_groups<T>(p.m, p.x + k0, p.k, lines, k, c, PANEL, k0 == 0, ahead);
        }
    }
    finish(p, 0, p.m, col, c);
}

template <class T>
void block_panel(const TeLinear& p, const char* panel, size_t col) {
    alignas(64) float c[BLOCK_M * PANEL];
    alignas(64) float wide[BLOCK_K * PANEL];
    for (size_t row = 0; row < p.m; row += BLOCK_M) {
        size_t m = p.m - row < BLOCK_M ? p.m - row : BLOCK_M;
        size_t groups = (m + MR - 1) / MR;
        for (size_t k0 = 0; k0 < p.k; k0 += BLOCK_K) {
            size_t k = p.k - k0 < BLOCK_K ? p.k - k0 : BLOCK_K;
            const char* lines = panel + k0 * PANEL * T::SIZE;
            Prefetch ahead{lines + k * PANEL * T::SIZE, 2 * PANEL * T::SIZE / groups};
            if (T::SIZE != 4) {
                for (size_t i = 0; i < padded_k(k); i += 2) {
                    vf even[NV], odd[NV];
                    load_line<T, false>(lines, i, even);
                    load_line<T, true>(lines, i + 1, odd);
                    TE_UNROLL for (int v = 0; v < NV; ++v) {
                        store(wide + i * PANEL + v * W, even[v]);
                        store(wide + (i + 1) * PANEL + v * W, odd[v]);
                    }
                }
                lines = (const char*)wide;
            }
            block_groups<F32>(m, p.x + row * p.k + k0, p.k, lines, k, c, PANEL, k0 == 0, ahead);
        }
        finish(p, row, m, col, c);
    }
}

template <class T>
void linear(const TeLinear& p) {
    size_t panels = (p.n + PANEL - 1) / PANEL;
    size_t bytes = panel_bytes<T>(p.k);
    // Dynamic chunks of about 128 KiB: long enough to stream, short enough to finish together.
    size_t chunk = (128 << 10) / bytes;
    size_t most = panels / (8 * (size_t)p.threads);
    if (chunk > most) chunk = most;
    if (chunk < 1) chunk = 1;
#pragma omp parallel for schedule(dynamic, chunk) num_threads(p.threads)
    for (size_t i = 0; i < panels; ++i) {
        const char* panel = (const char*)p.panels + i * bytes;
        if (p.m <= STREAM_M<T>)
            stream_panel<T>(p, panel, i * PANEL);
        else
            block_panel<T>(p, panel, i * PANEL);
    }
}

}  // namespace

void TE(linear)(const TeLinear* p) {
    with_dtype(p->dtype, [&](auto t) { linear<decltype(t)>(*p); });
}

void TE(embedding)(const TeEmbedding* p) {
    with_dtype(p->dtype, [&](auto t) {
        using T = decltype(t);
#pragma omp parallel for schedule(static) num_threads(p->threads) if (p->t > 1)
        for (size_t i = 0; i < p->t; ++i) {
            size_t id = (size_t)p->ids[i];
            const char* panel = (const char*)p->panels + (id / PANEL) * panel_bytes<T>(p->k);
            float* y = p->y + i * p->k;
            for (size_t k = 0; k < p->k; ++k) y[k] = panel_get<T>(panel, k, id % PANEL);
        }
    });
}
