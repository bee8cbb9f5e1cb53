// How `linear_wgmma.cu` gets results from registers to y: through shared memory, where 8 x 8 parts are turned around, since
// a token's row is what lies together in y, and a lane has two rows of many tokens.

#if HOPPER
/// A lane's part of 16 rows and 8 tokens, with the bias, to `scratch`: 32 bytes for each token.
DEVICE void turn_around(const Problem &p, int tile, int lane, float4 c, u32 scratch) {
    u32 to = scratch + (lane % 8 * 2 + lane / 8 % 2) * 16;
    int row = tile * 16;
    if (p.bias && row < p.outputs) {
        float low = to_float(p.bias[row + lane / 4]);
        float high = row + 8 < p.outputs ? to_float(p.bias[row + 8 + lane / 4]) : 0.f;
        c = add(c, make_float4(low, low, high, high));
    }
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(pack2<elem>(c.x, c.y)),
                 "r"(pack2<elem>(c.z, c.w))
                 : "memory");
}

/// Pieces of 16 bytes that a warpgroup's 64 rows of w (with SILU 32 results) make of a token's row.
#define PIECES (SILU ? 4 : 8)

/// Where piece `piece` of a token is in a warpgroup's scratch: eight tokens share no bank.
DEVICE u32 piece_place(u32 scratch, int token, int piece) {
    return scratch + (token * PIECES + (piece ^ (SILU ? token / 2 % 4 : token % 8))) * 16;
}

/// A warpgroup's 64 rows of w, from unit `tile` of 16 on, and all tokens: 32 tokens at a time through `scratch`, 4096 bytes
/// of this warpgroup's, so that lines of y are written as a whole. For rows of y that begin at multiples of
/// 16 bytes.
DEVICE void finish_tile(const Problem &p, int tile, const float (&acc)[NT * 4], u32 scratch) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int first = tile * (SILU ? 8 : 16), mine = first + warp * (SILU ? 8 : 16) + lane / 4;
    float low = 0.f, high = 0.f;
    if (p.bias && mine < p.outputs) {
        low = to_float(p.bias[mine]);
        if (SILU || mine + 8 < p.outputs) high = to_float(p.bias[mine + (SILU ? p.outputs : 8)]);
    }
#pragma unroll
    for (int n0 = 0; n0 < NT; n0 += 4) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float *c = acc + 4 * (n0 + j);
            float2 upper = make_float2(c[0] + low, c[1] + low), lower = make_float2(c[2] + high, c[3] + high);
#if SILU
            u32 part = silu_mul2<elem>(upper, lower), to = piece_place(scratch, j * 8 + lane % 8, warp);
            asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(to), "r"(part) : "memory");
#else
            u32 to = piece_place(scratch, j * 8 + lane % 8, warp * 2 + lane / 8 % 2);
            asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to),
                         "r"(pack2<elem>(upper.x, upper.y)), "r"(pack2<elem>(lower.x, lower.y))
                         : "memory");
#endif
        }
        asm volatile("bar.sync %0, 128;" ::"r"(2 + threadIdx.x / 128) : "memory");
#pragma unroll
        for (int i = threadIdx.x % 128; i < 32 * PIECES; i += 128) {
            int token = n0 * 8 + i / PIECES, row = first + i % PIECES * 8;
            if (token < p.tokens && row < p.outputs) {
                Vec16 v = load_shared16(piece_place(scratch, i / PIECES, i % PIECES));
                store16(p.y + (i64)token * p.outputs + row, v);
            }
        }
        asm volatile("bar.sync %0, 128;" ::"r"(2 + threadIdx.x / 128) : "memory");
    }
}

/// What `finish` does, with a row of 16 or 32 bytes for each token at once: through `scratch`, 256 bytes of this warp's,
/// where the 8 x 8 parts are turned around. For rows of y that begin at multiples of 16 bytes.
DEVICE void finish_rows(const Problem &p, int tile, int group, int lane, float4 c, u32 scratch) {
    const int wide = SILU ? 1 : 2; // parts
#if SILU
    u32 to = scratch + lane % 8 * 16;
    int row = tile * 8;
    if (p.bias && row < p.outputs) {
        float gate = to_float(p.bias[row + lane / 4]), up = to_float(p.bias[p.outputs + row + lane / 4]);
        c = add(c, make_float4(gate, gate, up, up));
    }
    u32 part = silu_mul2<elem>(make_float2(c.x, c.y), make_float2(c.z, c.w));
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(to), "r"(part) : "memory");
#else
    int row = tile * 16;
    turn_around(p, tile, lane, c, scratch);
#endif
    __syncwarp();
    int token = group * 8 + lane / wide;
    row += lane % wide * 8;
    if (lane < 8 * wide && token < p.tokens && row < p.outputs) {
        uint4 v;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "r"(scratch + lane * 16)
                     : "memory");
        *(uint4 *)(p.y + (i64)token * p.outputs + row) = v;
    }
    __syncwarp();
}

/// Where a lane's 16 bytes of what `finish_added` reads and writes begin: a token, and which row; -1 if there are none.
struct Place {
    int token, row;
    i64 at;
    DEVICE Place(const Problem &p, int tile, int group, int lane) {
        token = group * 8 + lane / 2, row = tile * 16 + lane % 2 * 8;
        at = lane < 16 && token < p.tokens && row < p.outputs ? (i64)token * p.outputs + row : -1;
    }
};

/// Adds results, rounded as if they were written, to the residual, of which `before` is this lane's part; writes the sum
/// there and times `weight`, this lane's part of the gain, to y. Returns the squares of the sums of a token's 16 rows, in
/// lane 2 * token.
DEVICE float finish_added(const Problem &p, elem *residual, int tile, int group, int lane, float4 c, u32 scratch,
                          Vec16 before, Vec16 weight) {
    const Place place(p, tile, group, lane);
    turn_around(p, tile, lane, c, scratch);
    __syncwarp();
    float squares = 0.f;
    if (place.at >= 0) {
        float sum[8], r[8], g[8];
        unpack8<elem>(load_shared16(scratch + lane * 16), sum);
        unpack8<elem>(before, r);
        unpack8<elem>(weight, g);
#pragma unroll
        for (int e = 0; e < 8; ++e) sum[e] += r[e];
        Vec16 rounded = pack8<elem>(sum);
        store16(residual + place.at, rounded);
        unpack8<elem>(rounded, sum);
#pragma unroll
        for (int e = 0; e < 8; ++e) squares += sum[e] * sum[e], g[e] *= sum[e];
        store16(p.y + place.at, pack8<elem>(g));
    }
    __syncwarp();
    return squares + __shfl_xor_sync(FULL_WARP, squares, 1);
}
#endif
