// RMS norm over rows, alone and behind the residual addition. One thread block a row; every thread
// keeps its VECS vectors of eight elements in registers, so a row is read once.
//
// Rounding, as the models do it: the sum of residual and x is rounded to the element type before
// the norm sees it; the normalized value is rounded before the weight multiplies it.
#include "common.cuh"

/// -DVECS: 16-byte vectors a thread; VECS * 8 * blockDim.x >= width, and width % 8 == 0.
/// -DADD=1: of residual + x, which goes to `residual_out` (it may be `residual`).
extern "C" __global__ void rms_norm(elem *out, const elem *x, const elem *residual,
                                    elem *residual_out, const elem *weight, float eps, int width) {
    __shared__ float scratch[33];
    i64 row = (i64)blockIdx.x * width;
    Vec16 w[VECS];
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
        int i = (v * blockDim.x + threadIdx.x) * 8;
        if (i < width) w[v].raw = __ldg((const uint4 *)(weight + i));
    }
    pdl_launch();
    pdl_wait();

    float value[VECS][8], sum = 0.f;
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
        int i = (v * blockDim.x + threadIdx.x) * 8;
        if (i >= width) continue;
        unpack8<elem>(load16(x + row + i), value[v]);
#if ADD
        float r[8];
        unpack8<elem>(load16(residual + row + i), r);
#pragma unroll
        for (int e = 0; e < 8; ++e) r[e] += value[v][e];
        Vec16 rounded = pack8<elem>(r);
        store16(residual_out + row + i, rounded);
        unpack8<elem>(rounded, value[v]);
#endif
#pragma unroll
        for (int e = 0; e < 8; ++e) sum += value[v][e] * value[v][e];
    }
    float scale = rsqrtf(block_sum(sum, scratch) / (float)width + eps);
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
        int i = (v * blockDim.x + threadIdx.x) * 8;
        if (i >= width) continue;
        float g[8];
        unpack8<elem>(w[v], g);
#pragma unroll
        for (int e = 0; e < 8; ++e) g[e] *= to_float(from_float<elem>(value[v][e] * scale));
        store16(out + row + i, pack8<elem>(g));
    }
}
