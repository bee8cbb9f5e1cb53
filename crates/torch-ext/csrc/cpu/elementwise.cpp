// Normalisation, activation, and the roofs that measurements are held against.
#include "kernels.h"
#include "reduce.h"

void TE(rms_norm)(const TeRmsNorm* p) {
#pragma omp parallel for schedule(static) num_threads(p->threads) if (p->rows > 1)
    for (size_t row = 0; row < p->rows; ++row) {
        const float* x = p->x + row * p->dim;
        if (p->residual) {
            float* residual = p->residual + row * p->dim;
            for (size_t i = 0; i < p->dim; ++i) residual[i] += x[i];
            x = residual;
        }
        rms_norm_row(x, p->weight, p->dim, p->eps, p->y + row * p->dim);
    }
}

namespace {

inline vf silu_mul(vf gate, vf up) { return gate / (exp(-gate) + 1.0f) * up; }

}  // namespace

void TE(silu_mul)(const TeSiluMul* p) {
#pragma omp parallel for schedule(static) num_threads(p->threads) if (p->rows > 1)
    for (size_t row = 0; row < p->rows; ++row) {
        const float* gate = p->gate_up + row * 2 * p->dim;
        const float* up = gate + p->dim;
        float* y = p->y + row * p->dim;
        size_t i = 0;
        for (; i + W <= p->dim; i += W) store(y + i, silu_mul(load(gate + i), load(up + i)));
        if (i < p->dim) {
            vf g = {}, u = {};
            memcpy(&g, gate + i, (p->dim - i) * sizeof(float));
            memcpy(&u, up + i, (p->dim - i) * sizeof(float));
            vf v = silu_mul(g, u);
            memcpy(y + i, &v, (p->dim - i) * sizeof(float));
        }
    }
}

void TE(exp)(const float* x, float* y, size_t n) {
    for (size_t i = 0; i < n; i += W) {
        size_t width = n - i < (size_t)W ? n - i : W;
        vf v = {};
        memcpy(&v, x + i, width * sizeof(float));
        v = exp(v);
        memcpy(y + i, &v, width * sizeof(float));
    }
}

float TE(roof_read)(const float* x, size_t n, int32_t threads) {
    constexpr size_t PIECE = 64 << 10;
    float total = 0.0f;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) reduction(+ : total)
    for (size_t from = 0; from < n; from += PIECE) {
        size_t to = n - from < PIECE ? n : from + PIECE;
        vf acc[8] = {};
        for (size_t i = from; i + 8 * W <= to; i += 8 * W) {
            prefetch(x + i + 512);
            TE_UNROLL for (int j = 0; j < 8; ++j) acc[j] += load(x + i + j * W);
        }
        for (int j = 1; j < 8; ++j) acc[0] += acc[j];
        total += sum(acc[0]);
    }
    return total;
}

float TE(roof_fma)(size_t rounds, int32_t threads) {
    float total = 0.0f;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        vf acc[12];
        for (int j = 0; j < 12; ++j) acc[j] = splat((float)j);
        vf a = splat(0.999f), b = splat(0.001f);
        for (size_t i = 0; i < rounds; ++i) {
            TE_UNROLL for (int j = 0; j < 12; ++j) acc[j] = fma(acc[j], a, b);
        }
        for (int j = 1; j < 12; ++j) acc[0] += acc[j];
        total += sum(acc[0]);
    }
    return total;
}
