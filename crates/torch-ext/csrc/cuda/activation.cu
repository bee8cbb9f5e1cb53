// silu(gate) * up of rows [gate | up].
#include "common.cuh"

/// out [tokens, width] of gate_up [tokens, 2 * width]; width % 8 == 0. One thread, eight elements.
extern "C" __global__ void silu_mul(elem *out, const elem *gate_up, i64 tokens, int width) {
    pdl_launch();
    pdl_wait();
    int vectors = width / 8;
    i64 index = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= tokens * vectors) return;
    i64 token = index / vectors;
    int i = (int)(index - token * vectors) * 8;
    const elem *row = gate_up + token * 2 * width;
    float gate[8], up[8];
    unpack8<elem>(load16(row + i), gate);
    unpack8<elem>(load16(row + width + i), up);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
        // silu is an operation of its own in the models: its result is rounded.
        up[e] *= to_float(from_float<elem>(silu_fast(gate[e])));
    }
    store16(out + token * width + i, pack8<elem>(up));
}
