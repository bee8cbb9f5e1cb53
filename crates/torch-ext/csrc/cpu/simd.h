// Vectors of the widest width that the instruction set of this compilation has.
//
// Each .cpp here is compiled once per instruction set (see build.rs), so everything but the tables
// in table.cpp has internal linkage: two instruction sets must never share an inline function.
// Floating-point contraction is off; the only fused operations are the explicit `fma` calls.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define TE_UNROLL _Pragma("GCC unroll 16")

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));

// Output columns of a packed panel: one cache line of float32.
constexpr int PANEL = 16;
constexpr int NV = PANEL / W;
// Largest head dimension (src/cpu/rope.rs refuses larger ones).
constexpr size_t MAX_HEAD_DIM = 512;

// Rows of a register block: accumulators (MR * NV) + one line of weights (NV) + a broadcast.
#if defined(__AVX512F__)
constexpr int MR = 12;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int MR = 6;
#else
constexpr int MR = 3;
#endif

template <class V, class T>
inline V load_as(const T* p) {
    V v;
    memcpy(&v, p, sizeof(V));
    return v;
}
inline vf load(const float* p) { return load_as<vf>(p); }
inline void store(float* p, vf v) { memcpy(p, &v, sizeof(v)); }
// Subtracting +0 keeps -0, which adding would not.
inline vf splat(float x) { return x - vf{}; }
inline vi bits(vf v) { return (vi)v; }
inline vf floats(vi v) { return (vf)v; }

inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

inline vf max(vf a, vf b) { return a > b ? a : b; }

// Lane order is fixed, so a sum depends on the values and the instruction set alone.
inline float sum(vf v) {
    float lanes[W];
    store(lanes, v);
    for (int width = W / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

inline float max_lane(vf v) {
    float lanes[W];
    store(lanes, v);
    float m = lanes[0];
    for (int i = 1; i < W; ++i) m = lanes[i] > m ? lanes[i] : m;
    return m;
}

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// e^x within 1 ulp (tests measure it against float64 over every exponent). Results under the
// smallest normal number (x < -87.33) are flushed to zero, x > 88.72 gives infinity, NaN stays NaN.
// Method: x = n ln2 + r with |r| <= ln2 / 2, a degree-6 minimax polynomial for e^r (Cephes expf),
// and a two-step scaling by 2^n so that n = 128 does not overflow early.
inline vf exp(vf x) {
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    vf n = fma(x, splat(1.44269504088896341f), magic) - magic;
    vf r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    vf p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p * r, r, r) + 1.0f;
    // Out of range lanes are replaced below; keep their conversion defined.
    vf bounded = n > 130.0f ? splat(130.0f) : (n < -130.0f ? splat(-130.0f) : n);
    bounded = bounded == bounded ? bounded : splat(0.0f);
    vi whole = __builtin_convertvector(bounded, vi);
    vi half = whole >> 1;
    vf y = p * floats((half + 127) << 23) * floats((whole - half + 127) << 23);
    y = x < -87.33654f ? splat(0.0f) : y;
    y = x > 88.72283f ? splat(__builtin_inff()) : y;
    return x == x ? y : x;
}

}  // namespace
