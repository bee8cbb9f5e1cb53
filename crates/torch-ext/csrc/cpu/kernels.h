// Names of the kernels of one instruction set: TE(linear) is te_linear_avx2 when TE_ISA is avx2.
#pragma once

#include "api.h"

#define TE_JOIN2(a, b) te_##a##_##b
#define TE_JOIN(a, b) TE_JOIN2(a, b)
#define TE(name) TE_JOIN(name, TE_ISA)

extern "C" {
void TE(pack)(const TePack*);
void TE(linear)(const TeLinear*);
void TE(embedding)(const TeEmbedding*);
void TE(rms_norm)(const TeRmsNorm*);
void TE(silu_mul)(const TeSiluMul*);
void TE(rope)(const TeRope*);
size_t TE(attention_scratch)(size_t rows, size_t d);
void TE(attention)(const TeAttention*);
void TE(exp)(const float*, float*, size_t);
float TE(roof_read)(const float*, size_t, int32_t);
float TE(roof_fma)(size_t, int32_t);
}
