// What the products with few and with some tokens share: their tiles are the 16-row side of mma
// m16n8k16, tokens its 8-column side. With -DSILU=1 a tile is eight rows of the gate and the eight
// rows of up that belong to them, so that a lane has both values of an output.
#include "common.cuh"

DEVICE float4 add(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

struct Problem {
    elem *y;
    const elem *bias;
    int tokens, outputs;
};

DEVICE elem activated(float gate, float up) {
    // Rounded where the separate operations would round.
    gate = to_float(from_float<elem>(gate));
    float silu = to_float(from_float<elem>(silu_fast(gate)));
    return from_float<elem>(silu * to_float(from_float<elem>(up)));
}

/// Writes what a lane holds of a tile and a group of tokens.
DEVICE void finish(const Problem &p, int tile, int group, int lane, float4 c) {
    int token = group * 8 + lane % 4 * 2;
#if SILU
    int row = tile * 8 + lane / 4;
    if (row >= p.outputs) return;
    if (p.bias) {
        float gate = to_float(p.bias[row]), up = to_float(p.bias[p.outputs + row]);
        c = add(c, make_float4(gate, gate, up, up));
    }
    elem *y = p.y + (i64)token * p.outputs + row;
    if (token < p.tokens) y[0] = activated(c.x, c.z);
    if (token + 1 < p.tokens) y[p.outputs] = activated(c.y, c.w);
#else
    int row = tile * 16 + lane / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h, row += 8) {
        if (row >= p.outputs) continue;
        float bias = p.bias ? to_float(p.bias[row]) : 0.f;
        elem *y = p.y + (i64)token * p.outputs + row;
        if (token < p.tokens) y[0] = from_float<elem>((h ? c.z : c.x) + bias);
        if (token + 1 < p.tokens) y[p.outputs] = from_float<elem>((h ? c.w : c.y) + bias);
    }
#endif
}
