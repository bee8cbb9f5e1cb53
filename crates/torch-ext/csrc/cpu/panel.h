// The packed layout and the register block that multiplies with it.
//
// A matrix of N rows (output columns) by K is stored as panels of 16 rows: [ceil(N/16)][K'][16],
// K' = K rounded up to even, zero padded. One step of k is one *line*: 16 values side by side, so a
// matrix-vector product streams memory front to back. In a bf16 panel the lines 2j and 2j + 1 share
// 16 words of 32 bits (2j in the low half), which unpacks with one shift or one mask.
//
// Every output element is one chain of fused multiply-adds over k = 0 .. K-1, whatever the number
// of rows: blocks of k continue the chain from the stored accumulator.
#pragma once

#include "convert.h"

namespace {

inline size_t padded_k(size_t k) { return (k + 1) & ~(size_t)1; }
template <class T>
inline size_t panel_bytes(size_t k) {
    return padded_k(k) * PANEL * T::SIZE;
}

// Rows of a register block. Unpacking a pair takes a register more than loading a line.
template <class T>
constexpr int ROWS = T::PAIRED ? MR - 1 : MR;

// Line k of a panel; ODD says which half of its pair it is (only bf16 panels tell them apart).
template <class T, bool ODD>
inline void load_line(const char* panel, size_t k, vf (&line)[NV]) {
    const char* p = panel + k * PANEL * T::SIZE;
    TE_UNROLL for (int v = 0; v < NV; ++v) {
        if constexpr (T::PAIRED) {
            vu both = load_as<vu>(p - (ODD ? PANEL * T::SIZE : 0) + v * sizeof(vu));
            line[v] = (vf)(ODD ? both & 0xffff0000u : both << 16);
        } else {
            line[v] = T::load(p, v * W);
        }
    }
}

// One element: row `col` of the panel at k.
template <class T>
inline float panel_get(const char* panel, size_t k, size_t col) {
    return T::get(panel, k * PANEL + col);
}
template <>
inline float panel_get<Bf16>(const char* panel, size_t k, size_t col) {
    return Bf16::get(panel, (k & ~(size_t)1) * PANEL + 2 * col + (k & 1));
}
template <class T>
inline void panel_put(char* panel, size_t k, size_t col, float x) {
    T::put(panel, k * PANEL + col, x);
}
template <>
inline void panel_put<Bf16>(char* panel, size_t k, size_t col, float x) {
    Bf16::put(panel, (k & ~(size_t)1) * PANEL + 2 * col + (k & 1), x);
}

// Where a block asks for memory that it will need soon: one cache line every two steps of k.
struct Prefetch {
    const char* at;
    size_t step;
};

// acc[R][16] += a[R] * line k: one step of every chain.
template <int R, class T, bool ODD>
inline void step(const float* a, size_t lda, const char* panel, size_t k, vf (&acc)[R][NV]) {
    vf line[NV];
    load_line<T, ODD>(panel, k, line);
    TE_UNROLL for (int r = 0; r < R; ++r) {
        vf x = splat(a[r * lda]);
        TE_UNROLL for (int v = 0; v < NV; ++v) acc[r][v] = fma(x, line[v], acc[r][v]);
    }
}

// c[R][16] (+)= a[R][k] * panel[k][16]. Starts from zero when `fresh`, else from c.
template <int R, class T>
inline void block(const float* a, size_t lda, const char* panel, size_t k, float* c, size_t ldc,
                  bool fresh, Prefetch ahead) {
    vf acc[R][NV];
    TE_UNROLL for (int r = 0; r < R; ++r)
        TE_UNROLL for (int v = 0; v < NV; ++v)
            acc[r][v] = fresh ? vf{} : load(c + r * ldc + v * W);
    size_t i = 0;
    for (; i + 2 <= k; i += 2) {
        prefetch(ahead.at);
        ahead.at += ahead.step;
        step<R, T, false>(a + i, lda, panel, i, acc);
        // Without this the compiler loads both lines at once, and two accumulators lose their
        // registers to the second.
        asm volatile("" ::: "memory");
        step<R, T, true>(a + i + 1, lda, panel, i + 1, acc);
    }
    if (i < k) step<R, T, false>(a + i, lda, panel, i, acc);
    TE_UNROLL for (int r = 0; r < R; ++r)
        TE_UNROLL for (int v = 0; v < NV; ++v) store(c + r * ldc + v * W, acc[r][v]);
}

// `block` for a number of rows known at run time, 1..=ROWS<T>.
template <class T, int R = ROWS<T>>
inline void block_rows(size_t rows, const float* a, size_t lda, const char* panel, size_t k,
                       float* c, size_t ldc, bool fresh, Prefetch ahead) {
    if constexpr (R > 0) {
        if (rows == R)
            block<R, T>(a, lda, panel, k, c, ldc, fresh, ahead);
        else
            block_rows<T, R - 1>(rows, a, lda, panel, k, c, ldc, fresh, ahead);
    }
}

// Any number of rows, in groups whose sizes differ by at most one.
template <class T>
inline void block_groups(size_t rows, const float* a, size_t lda, const char* panel, size_t k,
                         float* c, size_t ldc, bool fresh, Prefetch ahead) {
    size_t groups = (rows + ROWS<T> - 1) / ROWS<T>;
    size_t done = 0;
    for (size_t g = 0; g < groups; ++g) {
        size_t r = (rows - done + (groups - g) - 1) / (groups - g);
        block_rows<T>(r, a + done * lda, lda, panel, k, c + done * ldc, ldc, fresh, ahead);
        ahead.at += ahead.step * (k / 2);
        done += r;
    }
}

}  // namespace
