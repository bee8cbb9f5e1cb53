// Element types in memory. Arithmetic is always float32; narrowing rounds to nearest, ties to even.
#pragma once

#include "simd.h"

namespace {

enum Dtype : int32_t { DTYPE_F32 = 0, DTYPE_BF16 = 1, DTYPE_F16 = 2 };

inline uint32_t float_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}
inline float bits_float(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

inline uint16_t bf16_from(float x) {
    uint32_t u = float_bits(x);
    uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    uint32_t nan = (u >> 16) | 0x40;  // quiet, never rounded up to infinity
    return (uint16_t)((u & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}
inline float bf16_to(uint16_t h) { return bits_float((uint32_t)h << 16); }

#if defined(__F16C__)
inline uint16_t f16_from(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
inline float f16_to(uint16_t h) { return _cvtsh_ss(h); }
#else
inline float f16_to(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7fff) << 13;
    if ((h & 0x7c00) == 0x7c00) return bits_float(sign | rest | 0x7f800000);
    // Multiplying by 2^112 moves the exponent and normalises subnormal numbers, exactly.
    return bits_float(sign | float_bits(bits_float(rest) * 5.192296858534828e33f));
}
inline uint16_t f16_from(float x) {
    uint32_t u = float_bits(x), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
    if (a > 0x7f800000) return (uint16_t)(sign | 0x7e00 | ((a >> 13) & 0x3ff));
    if (a >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // >= 65520 rounds to infinity
    if (a < 0x38800000) {
        // Subnormal: adding 0.5 places the last bit of the result at the last bit of the sum.
        return (uint16_t)(sign | (float_bits(bits_float(a) + 0.5f) - 0x3f000000));
    }
    return (uint16_t)(sign | ((a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13));
}
#endif

// Each type reads and writes single elements, and reads W at once. Sources may be unaligned.
struct F32 {
    static constexpr bool PAIRED = false;
    static constexpr size_t SIZE = 4;
    static float get(const void* base, size_t i) {
        float x;
        memcpy(&x, (const char*)base + 4 * i, 4);
        return x;
    }
    static void put(void* base, size_t i, float x) { memcpy((char*)base + 4 * i, &x, 4); }
    static vf load(const void* base, size_t i) { return load_as<vf>((const char*)base + 4 * i); }
};

struct Bf16 {
    static constexpr bool PAIRED = true;  // see panel.h
    static constexpr size_t SIZE = 2;
    static float get(const void* base, size_t i) {
        uint16_t h;
        memcpy(&h, (const char*)base + 2 * i, 2);
        return bf16_to(h);
    }
    static void put(void* base, size_t i, float x) {
        uint16_t h = bf16_from(x);
        memcpy((char*)base + 2 * i, &h, 2);
    }
    static vf load(const void* base, size_t i) {
        typedef uint16_t half_width __attribute__((vector_size(2 * W)));
        half_width h = load_as<half_width>((const char*)base + 2 * i);
        return (vf)(__builtin_convertvector(h, vu) << 16);
    }
};

struct F16 {
    static constexpr bool PAIRED = false;
    static constexpr size_t SIZE = 2;
    static float get(const void* base, size_t i) {
        uint16_t h;
        memcpy(&h, (const char*)base + 2 * i, 2);
        return f16_to(h);
    }
    static void put(void* base, size_t i, float x) {
        uint16_t h = f16_from(x);
        memcpy((char*)base + 2 * i, &h, 2);
    }
    static vf load(const void* base, size_t i) {
        const char* p = (const char*)base + 2 * i;
#if defined(__AVX512F__)
        return _mm512_maskz_cvtph_ps((__mmask16)-1, _mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
        return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__)
        return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)p)));
#else
        vf v;
        for (int j = 0; j < W; ++j) v[j] = get(p, j);
        return v;
#endif
    }
};

// Calls f with the type that a runtime tag names.
template <class F>
inline void with_dtype(int32_t dtype, F f) {
    if (dtype == DTYPE_F32)
        f(F32{});
    else if (dtype == DTYPE_BF16)
        f(Bf16{});
    else
        f(F16{});
}

// Narrows n float32 values into a row of another type.
template <class T>
inline void put_row(void* dst, const float* src, size_t n) {
    for (size_t i = 0; i < n; ++i) T::put(dst, i, src[i]);
}
template <>
inline void put_row<F32>(void* dst, const float* src, size_t n) {
    memcpy(dst, src, 4 * n);
}
#if defined(__F16C__)
template <>
inline void put_row<F16>(void* dst, const float* src, size_t n) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128((__m128i*)((char*)dst + 2 * i), h);
    }
    for (; i < n; ++i) F16::put(dst, i, src[i]);
}
#endif

// Widens n values of a row to float32.
template <class T>
inline void get_row(float* dst, const void* src, size_t n) {
    size_t i = 0;
    for (; i + W <= n; i += W) store(dst + i, T::load(src, i));
    for (; i < n; ++i) dst[i] = T::get(src, i);
}

}  // namespace
