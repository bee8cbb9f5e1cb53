// y = x w^T for few rows of x (tokens): decode, where all the time goes into reading w once.
//
// The weights take the 16-row side of mma m16n8k16 ("swapped"), tokens the 8-column side, so up to
// eight tokens cost what one costs. A tile is 16 rows of w; a thread block computes R tiles for NT
// groups of 8 tokens, then the next R; its warps share out K in chunks of 64 and add up through
// shared memory at the end.
//
// The order of elements along K within a chunk does not matter as long as w and x agree on it. So
// a lane takes 16 contiguous bytes of a row for four fragment registers, straight from the row-major
// weights, and no shuffling is needed. Each thread copies the weights that it will use itself
// (cp.async into slots of its own): the pipeline has no barrier in it. A step of the pipeline is one
// item: the part of one tile in one chunk, four vectors a thread.
//
// Weights depend on no earlier kernel, so the pipeline is filled before `pdl_wait()`: while the
// kernel before finishes, the first STAGES - 1 items are on their way.
//
//   -DR -DNT -DSTAGES
//   -DX_STREAM=1   x goes through the pipeline with the weights; 0: all of it stays in shared
//                  memory, in rows of PITCH(k) elements
//   -DNORM=1       x := rms_norm(residual + x) first; each thread block does it for itself, and
//                  one of them writes the sum. With X_STREAM=0
//   -DSILU=1       w is [gate rows | up rows], y = silu(gate) * up. A tile is then eight rows of
//                  either half, and a lane has both values of an output
//
// The sum for one output depends on K alone: not on R, NT, or the other tokens.
//
// linear.cuh stands before this file when it is compiled.

#define WARPS 8
#define THREADS (WARPS * 32)
#define CHUNK 64
#define PAIRS (R * NT)
// Pairs (tile, group of tokens) added up in one pass.
#define PASS (PAIRS < 8 ? PAIRS : 8)
// Chunks of x in flight or in use, when it is streamed.
#define X_SLOTS ((R + STAGES - 2) / R + 1)
#define X_BYTES (NT * 2 * THREADS * 16)
#define ITEM_BYTES (4 * THREADS * 16)
// Elements from one row of x in shared memory to the next: eight rows of 64 bytes share no bank.
#define PITCH(k) (((k) + CHUNK - 1) / CHUNK * CHUNK + 32)

/// Puts rms_norm(residual + x) into `rows` (shared), and this block's share of residual + x into
/// `residual_out`. `squares`: WARPS floats a row; `weight` (shared) may still be on its way in the
/// oldest group of cp.async. Rounds where the separate operations would.
DEVICE void normalize(elem *rows, const elem *weight, float *squares, const elem *residual,
                      const elem *x, elem *residual_out, int tokens, int k, float eps) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int pitch = PITCH(k), vectors = (pitch - 32) / 8;
    // Few rows: several warps for each.
    const int share = tokens == 1 ? 8 : tokens == 2 ? 4 : tokens <= 4 ? 2 : 1;
    const int first_row = warp / share, part = warp % share;
    const int start = part * 32 + lane, step = share * 32;
    const int BATCH = 4; // loads under way together
    for (int row = first_row; row < tokens; row += WARPS / share) {
        bool writer = (u32)row % gridDim.x == blockIdx.x;
        float sum = 0.f;
        for (int v0 = start; v0 < vectors; v0 += BATCH * step) {
            Vec16 rv[BATCH], xv[BATCH];
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                i64 at = (i64)row * k + (v0 + b * step) * 8;
                rv[b].raw = xv[b].raw = make_uint4(0, 0, 0, 0);
                if ((v0 + b * step) * 8 < k) {
                    rv[b] = load16(residual + at);
                    if (x) xv[b] = load16(x + at);
                }
            }
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                int v = v0 + b * step;
                if (v >= vectors) continue;
                float h[8], added[8];
                unpack8<elem>(rv[b], h);
                unpack8<elem>(xv[b], added);
#pragma unroll
                for (int e = 0; e < 8; ++e) h[e] += added[e];
                Vec16 rounded = pack8<elem>(h);
                unpack8<elem>(rounded, h);
#pragma unroll
                for (int e = 0; e < 8; ++e) sum += h[e] * h[e];
                *(uint4 *)(rows + row * pitch + v * 8) = rounded.raw;
                if (writer && v * 8 < k) store16(residual_out + (i64)row * k + v * 8, rounded);
            }
        }
        sum = warp_sum(sum);
        if (lane == 0) squares[row * WARPS + part] = sum;
    }
    cp_async_wait<STAGES - 1>();
    __syncthreads();
    for (int row = first_row; row < tokens; row += WARPS / share) {
        float sum = 0.f;
        for (int i = 0; i < share; ++i) sum += squares[row * WARPS + i];
        float scale = rsqrtf(sum / (float)k + eps);
        for (int v = start; v * 8 < k; v += step) {
            uint4 *place = (uint4 *)(rows + row * pitch + v * 8);
            Vec16 in, g;
            in.raw = *place;
            g.raw = *(const uint4 *)(weight + v * 8);
            float h[8], w[8];
            unpack8<elem>(in, h);
            unpack8<elem>(g, w);
#pragma unroll
            for (int e = 0; e < 8; ++e) h[e] = to_float(from_float<elem>(h[e] * scale)) * w[e];
            *place = pack8<elem>(h).raw;
        }
    }
}

/// Shared memory, in this order: weight slots; x; sums of warps; and for NORM its weight and the
/// sums of squares. `outputs`: columns of y; k % 8 == 0.
extern "C" __global__ void __launch_bounds__(THREADS)
    linear_small(elem *y, const elem *x, const elem *w, const elem *bias, int tokens, int outputs,
                 int k, const elem *residual, elem *residual_out, const elem *norm_weight,
                 float eps) {
    extern __shared__ __align__(128) u8 shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // Row of a fragment (or token), and position along K.
    const int g = lane / 4, t8 = lane % 4 * 8;
    const int chunks = (k + CHUNK - 1) / CHUNK;
    const int my_chunks = (chunks - warp + WARPS - 1) / WARPS;
    const int pitch = PITCH(k);
    const int x_bytes = X_STREAM ? X_SLOTS * X_BYTES : tokens * pitch * 2;
    const u32 ring = shared_address(shared) + threadIdx.x * 16;
    elem *rows = (elem *)(shared + STAGES * ITEM_BYTES);
    const u32 x_ring = ring + STAGES * ITEM_BYTES;
    float4 *sums = (float4 *)(shared + STAGES * ITEM_BYTES + x_bytes);

    const int tiles = (outputs + (SILU ? 7 : 15)) / (SILU ? 8 : 16);
    const int blocks = (tiles + R - 1) / R;

    const u64 read_once = policy_read_once();

    // What is issued next: tile `next_r` of block `next_block`, chunk `next_chunk`.
    int next_block = my_chunks > 0 ? blockIdx.x : blocks;
    int next_chunk = 0, next_r = 0, issue_slot = 0, x_issue_slot = 0;
    auto issue_x = [&](int chunk) {
        u32 to = x_ring + x_issue_slot * X_BYTES;
        int at = (warp + chunk * WARPS) * CHUNK + t8;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            int token = n * 8 + g;
            bool valid = token < tokens;
            const elem *row = x + (valid ? (i64)token * k : 0);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                int i = at + h * 32;
                bool inside = i < k;
                cp_async16(to + (n * 2 + h) * THREADS * 16, row + (inside ? i : 0),
                           valid && inside);
            }
        }
        x_issue_slot = x_issue_slot + 1 == X_SLOTS ? 0 : x_issue_slot + 1;
    };
    auto issue = [&](bool with_x) {
        if (next_block < blocks) {
            int tile = next_block * R + next_r;
#if SILU
            int row = tile * 8 + g;
            bool valid0 = row < outputs, valid1 = valid0;
            const elem *row0 = w + (i64)(valid0 ? row : 0) * k;
            const elem *row1 = w + (i64)(valid0 ? outputs + row : 0) * k;
#else
            int row = tile * 16 + g;
            bool valid0 = row < outputs, valid1 = row + 8 < outputs;
            const elem *row0 = w + (i64)(valid0 ? row : 0) * k;
            const elem *row1 = w + (i64)(valid1 ? row + 8 : 0) * k;
#endif
            u32 to = ring + issue_slot * ITEM_BYTES;
            int at = (warp + next_chunk * WARPS) * CHUNK + t8;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                int i = at + h * 32;
                bool inside = i < k;
                if (!inside) i = 0;
                cp_async16(to + h * 2 * THREADS * 16, row0 + i, inside && valid0, read_once);
                cp_async16(to + (h * 2 + 1) * THREADS * 16, row1 + i, inside && valid1, read_once);
            }
            issue_slot = issue_slot + 1 == STAGES ? 0 : issue_slot + 1;
            if (X_STREAM && with_x && next_r == 0) issue_x(next_chunk);
            if (++next_r == R) {
                next_r = 0;
                if (++next_chunk == my_chunks) {
                    next_chunk = 0;
                    next_block += gridDim.x;
                }
            }
        }
        cp_async_commit();
    };

#if NORM
    elem *norm_shared = (elem *)(sums + PASS * THREADS);
    for (int i = threadIdx.x * 8; i < k; i += THREADS * 8)
        cp_async16(shared_address(norm_shared + i), norm_weight + i);
    cp_async_commit();
#endif
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) issue(false);
    pdl_launch();
    pdl_wait();

#if NORM
    normalize(rows, norm_shared, (float *)(norm_shared + k), residual, x, residual_out, tokens, k,
              eps);
#elif X_STREAM
    // x of the items that were issued before the wait.
    int my_blocks = (blocks - blockIdx.x + gridDim.x - 1) / gridDim.x;
    for (int s = 0; s < STAGES - 1; s += R)
        if (s / R < my_chunks * my_blocks) issue_x(s / R % my_chunks);
    cp_async_commit();
#else
    for (int token = 0; token < tokens; ++token)
        for (int i = threadIdx.x * 8; i < pitch - 32; i += THREADS * 8)
            cp_async16(shared_address(rows + token * pitch + i),
                       x + (i64)token * k + (i < k ? i : 0), i < k);
    cp_async_commit();
#endif
    cp_async_wait<0>();
    if (!X_STREAM) __syncthreads();

    // Where a lane finds its part of x: columns of the product past the last token are not used,
    // and may hold anything.
    u32 x_at[NT];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        int token = n * 8 + g < tokens ? n * 8 + g : tokens - 1;
        x_at[n] = shared_address(rows + token * pitch + warp * CHUNK + t8);
    }
    const Problem problem = {y, bias, tokens, outputs};
    int read_slot = 0, x_read_slot = 0;
    for (int block = blockIdx.x; block < blocks; block += gridDim.x) {
        float acc[PAIRS][4];
#pragma unroll
        for (int p = 0; p < PAIRS; ++p) acc[p][0] = acc[p][1] = acc[p][2] = acc[p][3] = 0.f;
        for (int c = 0; c < my_chunks; ++c) {
            Vec16 b[NT][2];
#pragma unroll
            for (int r = 0; r < R; ++r) {
                cp_async_wait<STAGES - 2>();
                if (r == 0) {
#pragma unroll
                    for (int n = 0; n < NT; ++n)
#pragma unroll
                        for (int h = 0; h < 2; ++h)
                            b[n][h] = load_shared16(
                                X_STREAM
                                    ? x_ring + x_read_slot * X_BYTES + (n * 2 + h) * THREADS * 16
                                    : x_at[n] + (c * WARPS * CHUNK + h * 32) * 2);
                    x_read_slot = x_read_slot + 1 == X_SLOTS ? 0 : x_read_slot + 1;
                }
                u32 from = ring + read_slot * ITEM_BYTES;
                Vec16 a[4];
#pragma unroll
                for (int v = 0; v < 4; ++v) a[v] = load_shared16(from + v * THREADS * 16);
                read_slot = read_slot + 1 == STAGES ? 0 : read_slot + 1;
                // Into the slot of the item before this one, which the products below it used.
                issue(true);
#pragma unroll
                for (int h = 0; h < 2; ++h)
#pragma unroll
                    for (int q = 0; q < 4; q += 2)
#pragma unroll
                        for (int n = 0; n < NT; ++n)
                            mma16816<elem>(acc[r * NT + n], a[2 * h].word[q],
                                           a[2 * h + 1].word[q], a[2 * h].word[q + 1],
                                           a[2 * h + 1].word[q + 1], b[n][h].word[q],
                                           b[n][h].word[q + 1]);
            }
        }

#pragma unroll
        for (int p0 = 0; p0 < PAIRS; p0 += PASS) {
            __syncthreads(); // the sums of the pass before were read
#pragma unroll
            for (int p = p0; p < PAIRS && p < p0 + PASS; ++p)
                sums[((p - p0) * WARPS + warp) * 32 + lane] =
                    make_float4(acc[p][0], acc[p][1], acc[p][2], acc[p][3]);
            __syncthreads();
            int pair = p0 + warp;
            if (warp < PASS && pair < PAIRS) {
                const float4 *part = sums + warp * WARPS * 32 + lane;
                float4 sum = part[0];
#pragma unroll
                for (int i = 1; i < WARPS; ++i) sum = add(sum, part[i * 32]);
                finish(problem, block * R + pair / NT, pair % NT, lane, sum);
            }
        }
    }
}
