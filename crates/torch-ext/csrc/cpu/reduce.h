// Reductions over one row, with an order of additions that depends on the length alone.
#pragma once

#include "simd.h"

namespace {

// y = x / sqrt(mean(x^2) + eps) * weight. `y` may be `x`.
inline void rms_norm_row(const float* x, const float* weight, size_t n, float eps, float* y) {
    vf acc[4] = {};
    size_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W)
        TE_UNROLL for (int j = 0; j < 4; ++j) {
            vf v = load(x + i + j * W);
            acc[j] = fma(v, v, acc[j]);
        }
    float total = sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
    for (; i < n; ++i) total += x[i] * x[i];
    float scale = 1.0f / __builtin_sqrtf(total / (float)n + eps);
    for (i = 0; i < n; ++i) y[i] = x[i] * scale * weight[i];
}

}  // namespace
