// Sixteen row-major rows into one panel: how weights are packed, and how a tile of keys becomes the
// right-hand side of a product.
#pragma once

#include "panel.h"

namespace {

#if defined(__AVX2__)
typedef float v8f __attribute__((vector_size(32)));

inline __m256 load8(F32, const void* row, size_t k) {
    return _mm256_loadu_ps((const float*)((const char*)row + 4 * k));
}
inline __m256 load8(Bf16, const void* row, size_t k) {
    __m128i h = _mm_loadu_si128((const __m128i*)((const char*)row + 2 * k));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
inline __m256 load8(F16, const void* row, size_t k) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)((const char*)row + 2 * k)));
}

inline void transpose8(__m256 (&r)[8]) {
    __m256 t[8], u[8];
    TE_UNROLL for (int i = 0; i < 4; ++i) {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    TE_UNROLL for (int i = 0; i < 2; ++i) {
        u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
        u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
        u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
        u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
    TE_UNROLL for (int i = 0; i < 4; ++i) {
        r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
}

// Streaming stores keep a packed checkpoint from being read into the cache first.
template <bool STREAM>
inline void put_line(void* p, __m256i v) {
    if (STREAM)
        _mm256_stream_si256((__m256i*)p, v);
    else
        _mm256_store_si256((__m256i*)p, v);
}

// The upper halves of 8 words, rounded to bf16.
inline __m256i bf16_words(__m256 x) {
    __m256i u = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    return _mm256_and_si256(_mm256_blendv_epi8(up, quiet, nan), _mm256_set1_epi32((int)0xffff0000));
}

// Eight lines (k .. k + 8, r[i] is line k + i) of columns [col, col + 8).
template <bool STREAM>
inline void put8(F32, char* panel, size_t k, size_t col, const __m256 (&r)[8]) {
    TE_UNROLL for (int i = 0; i < 8; ++i)
        put_line<STREAM>(panel + ((k + i) * PANEL + col) * 4, _mm256_castps_si256(r[i]));
}
template <bool STREAM>
inline void put8(Bf16, char* panel, size_t k, size_t col, const __m256 (&r)[8]) {
    TE_UNROLL for (int i = 0; i < 8; i += 2) {
        __m256i lo = _mm256_srli_epi32(bf16_words(r[i]), 16);
        put_line<STREAM>(panel + ((k + i) * PANEL + 2 * col) * 2,
                         _mm256_or_si256(lo, bf16_words(r[i + 1])));
    }
}
template <bool STREAM>
inline void put8(F16, char* panel, size_t k, size_t col, const __m256 (&r)[8]) {
    TE_UNROLL for (int i = 0; i < 8; ++i) {
        __m128i h = _mm256_cvtps_ph(r[i], _MM_FROUND_TO_NEAREST_INT);
        __m128i* p = (__m128i*)(panel + ((k + i) * PANEL + col) * 2);
        STREAM ? _mm_stream_si128(p, h) : _mm_store_si128(p, h);
    }
}
#endif

// Fills all 16 columns for k in [0, k). `rows[j]` is row j of the source, null for zeros.
// The panel must be 32-byte aligned.
template <class Src, class Dst, bool STREAM>
inline void fill_panel(const void* const (&rows)[PANEL], size_t k, char* panel) {
    size_t i = 0;
#if defined(__AVX2__)
    for (; i + 8 <= k; i += 8) {
        TE_UNROLL for (int half = 0; half < PANEL; half += 8) {
            __m256 r[8];
            TE_UNROLL for (int j = 0; j < 8; ++j) {
                const void* row = rows[half + j];
                r[j] = row ? load8(Src{}, row, i) : _mm256_setzero_ps();
            }
            transpose8(r);
            put8<STREAM>(Dst{}, panel, i, half, r);
        }
    }
#endif
    for (; i < k; ++i)
        for (size_t j = 0; j < PANEL; ++j)
            panel_put<Dst>(panel, i, j, rows[j] ? Src::get(rows[j], i) : 0.0f);
    if (k % 2 != 0)
        for (size_t j = 0; j < PANEL; ++j) panel_put<Dst>(panel, k, j, 0.0f);
}

}  // namespace
