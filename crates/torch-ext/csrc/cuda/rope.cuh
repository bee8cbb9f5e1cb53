// The norm of a head of Q or K and its rotation, by one warp, for the files that this text is put in front of. Defines:
// ROTARY_DIM (a multiple of 4, at most HEAD_DIM; without it there is nothing here), HEAD_DIM, QK_NORM (0 or 1).
#include "common.cuh"

#if defined(ROTARY_DIM)
static const int HALF_ROT = ROTARY_DIM / 2;
// Two neighbours of the first half and their two partners of the second are one unit of work.
static const int TURNS = (HALF_ROT / 2 + 31) / 32;
static const int REST = (HEAD_DIM - ROTARY_DIM) / 2;
static const int COPIES = (REST + 31) / 32;
// Registers of a head: first half, second half, rest.
static const int WORDS = 2 * TURNS + COPIES;

/// Where a lane's `i`-th pair of elements is in a head; negative: nowhere.
DEVICE int place(int i, int lane) {
    if (i < 2 * TURNS) {
        int pair = lane + 32 * (i / 2);
        return 2 * pair < HALF_ROT ? 2 * pair + (i % 2 ? HALF_ROT : 0) : -1;
    }
    int pair = lane + 32 * (i - 2 * TURNS);
    return pair < REST ? ROTARY_DIM + 2 * pair : -1;
}

/// x, normalized: rounded before and after the multiplication by the weight, as in the models'
/// own code.
DEVICE float2 scaled(float2 x, float inv, u32 weight) {
    float2 w = unpack2<elem>(weight);
    float2 y = unpack2<elem>(pack2<elem>(x.x * inv, x.y * inv));
    return unpack2<elem>(pack2<elem>(y.x * w.x, y.y * w.y));
}

/// a cos + b sin. Which of the products is fused with the sum is said here, not left to the compiler:
/// a row's bits must not depend on the kernel.
DEVICE float turn(float a, float b, float cos, float sin) { return __fmaf_rn(a, cos, __fmul_rn(b, sin)); }

/// The angles of a position.
struct Angles {
    float2 cos[TURNS], sin[TURNS];

    DEVICE void load(const float *cos_table, const float *sin_table, i64 row, i64 positions, int lane) {
        row = row < 0 ? 0 : (row >= positions ? positions - 1 : row);
#pragma unroll
        for (int i = 0; i < TURNS; ++i) {
            int at = place(2 * i, lane);
            if (at < 0) continue;
            cos[i] = *(const float2 *)(cos_table + row * HALF_ROT + at);
            sin[i] = *(const float2 *)(sin_table + row * HALF_ROT + at);
        }
    }
};

/// This lane's pairs of a head, or of a norm's weight; zeros where it has none.
DEVICE void load_head(const elem *from, int lane, u32 (&words)[WORDS]) {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
        int at = place(i, lane);
        words[i] = at >= 0 ? *(const u32 *)(from + at) : 0;
    }
}
DEVICE void store_head(elem *to, int lane, const u32 (&words)[WORDS]) {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
        int at = place(i, lane);
        if (at >= 0) *(u32 *)(to + at) = words[i];
    }
}

/// Normalizes (with QK_NORM) and rotates a head.
DEVICE void turn_head(u32 (&words)[WORDS], const u32 (&weight)[WORDS], float eps, const Angles &angles) {
    float2 x[WORDS];
#pragma unroll
    for (int i = 0; i < WORDS; ++i) x[i] = unpack2<elem>(words[i]);
#if QK_NORM
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) squares = __fmaf_rn(x[i].x, x[i].x, __fmaf_rn(x[i].y, x[i].y, squares));
    float inv = rsqrtf(warp_sum(squares) / HEAD_DIM + eps);
#pragma unroll
    for (int i = 0; i < WORDS; ++i) x[i] = scaled(x[i], inv, weight[i]);
#endif
#pragma unroll
    for (int i = 0; i < TURNS; ++i) {
        float2 a = x[2 * i], b = x[2 * i + 1], c = angles.cos[i], s = angles.sin[i];
        x[2 * i] = make_float2(turn(a.x, b.x, c.x, -s.x), turn(a.y, b.y, c.y, -s.y));
        x[2 * i + 1] = make_float2(turn(b.x, a.x, c.x, s.x), turn(b.y, a.y, c.y, s.y));
    }
#pragma unroll
    for (int i = 0; i < WORDS; ++i) words[i] = pack2<elem>(x[i].x, x[i].y);
}
#endif
