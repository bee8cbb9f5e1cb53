// y = x w^T for few rows of x (tokens): decode, where all the time goes into reading w once.
//
// The weights take the 16-row side of mma m16n8k16 ("swapped"), tokens the 8-column side, so up to
// eight tokens cost what one costs. A tile is 16 rows of w; a thread block computes R tiles for NT
// groups of 8 tokens; its warps share out K in chunks of 64 and add up through shared memory at
// the end. With CLUSTER > 1 that many thread blocks share out K and add up through distributed
// shared memory, which keeps all multiprocessors busy when w has few rows.
//
// The order of elements along K within a chunk does not matter as long as w and x agree on it. So
// a lane takes 16 contiguous bytes of a row for four fragment registers, straight from the row-major
// weights, and no shuffling is needed. Each thread copies what it will use itself (cp.async into
// slots of its own): the pipeline has no barrier in it. A step of the pipeline is one item: the part
// of one tile in one chunk, four vectors a thread.
//
// Weights depend on no earlier kernel, so the pipeline is filled before `pdl_wait()`: while the
// kernel before finishes, the first STAGES - 1 items are on their way.
//
//   -DR -DNT -DSTAGES -DWARPS -DCLUSTER
//   -DX_STREAM=1   x goes through the pipeline with the weights; 0: all of it stays in shared
//                  memory (K * NT * 16 / CLUSTER bytes)
//   -DNORM=1       x := rms_norm(residual += x) first; each thread block does it for itself.
//                  With X_STREAM=0, CLUSTER=1
//   -DSILU=1       w is [gate rows | up rows], y = silu(gate) * up. A tile is then eight rows of
//                  either half, and a lane has both values of an output
//
// The sum for one output depends on WARPS * CLUSTER and K alone: not on R, NT, or other tokens.
#include "common.cuh"

#define THREADS (WARPS * 32)
#define SPLITS (WARPS * CLUSTER)
#define CHUNK 64
// Pairs (tile, group of tokens) added up in one pass.
#define PAIRS (R * NT)
#define PASS (PAIRS < 8 ? PAIRS : 8)
// Chunks of x in flight or in use, when it is streamed.
#define X_SLOTS ((R + STAGES - 2) / R + 1)
#define X_BYTES (NT * 2 * THREADS * 16)
#define ITEM_BYTES (4 * THREADS * 16)

DEVICE void cluster_arrive() {
#if CLUSTER > 1
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
DEVICE void cluster_wait() {
#if CLUSTER > 1
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

/// Writes four floats to `address`, a place in this block's shared memory, in block `rank`'s.
DEVICE void store_remote(u32 address, u32 rank, float4 v) {
#if CLUSTER > 1
    u32 remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(remote), "f"(v.x),
                 "f"(v.y), "f"(v.z), "f"(v.w)
                 : "memory");
#endif
}

DEVICE float4 add(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

/// Sum of COUNT (a power of two) values as a balanced tree: the same for any way to split them into
/// thread blocks.
template <int COUNT> DEVICE float4 tree_sum(const float4 *values, int stride) {
    float4 v[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) v[i] = values[i * stride];
#pragma unroll
    for (int d = 1; d < COUNT; d *= 2)
#pragma unroll
        for (int i = 0; i + d < COUNT; i += 2 * d) v[i] = add(v[i], v[i + d]);
    return v[0];
}

struct Problem {
    elem *y;
    const elem *bias;
    int tokens, outputs;
};

DEVICE elem activated(float gate, float up) {
    // Rounded where the separate operations would round.
    gate = to_float(from_float<elem>(gate));
    float silu = to_float(from_float<elem>(gate / (1.f + expf(-gate))));
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

/// Shared memory, in this order: weight slots, x, sums of warps, sums of thread blocks, and for
/// NORM its weight and the sums of squares. `outputs`: columns of y; k % 8 == 0.
extern "C" __global__ void __launch_bounds__(THREADS)
    linear_small(elem *y, const elem *x, const elem *w, const elem *bias, int tokens, int outputs,
                 int k, const elem *residual, elem *residual_out, const elem *norm_weight,
                 float eps) {
    extern __shared__ __align__(128) u8 shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // Row of a fragment (or token), and position along K.
    const int g = lane / 4, t8 = lane % 4 * 8;
    const int rank = CLUSTER > 1 ? blockIdx.x % CLUSTER : 0;
    const int split = rank * WARPS + warp;
    const int chunks = (k + CHUNK - 1) / CHUNK;
    const int my_chunks = (chunks - split + SPLITS - 1) / SPLITS;
#if X_STREAM
    const int x_slots = X_SLOTS;
#else
    const int x_slots = (chunks + SPLITS - 1) / SPLITS;
#endif
    const u32 ring = shared_address(shared) + threadIdx.x * 16;
    const u32 x_ring = ring + STAGES * ITEM_BYTES;
    float4 *sums = (float4 *)(shared + STAGES * ITEM_BYTES + x_slots * X_BYTES);
    float4 *cluster_sums = sums + PASS * THREADS;

    const int tiles = (outputs + (SILU ? 7 : 15)) / (SILU ? 8 : 16);
    const int blocks = (tiles + R - 1) / R;
    const int first_block = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;

    // What is issued next: tile `next_r` of block `next_block`, chunk `next_chunk`.
    int next_block = my_chunks > 0 ? first_block : blocks;
    int next_chunk = 0, next_r = 0, issue_slot = 0, x_issue_slot = 0;
    auto issue_x = [&](int chunk) {
        u32 to = x_ring + x_issue_slot * X_BYTES;
        int at = (split + chunk * SPLITS) * CHUNK + t8;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            int token = n * 8 + g;
            bool valid = token < tokens;
            const elem *row = x + (valid ? (i64)token * k : 0);
#pragma unroll
            for (int half_chunk = 0; half_chunk < 2; ++half_chunk) {
                int i = at + half_chunk * 32;
                bool inside = i < k;
                cp_async16(to + (n * 2 + half_chunk) * THREADS * 16, row + (inside ? i : 0),
                           valid && inside);
            }
        }
        x_issue_slot = x_issue_slot + 1 == x_slots ? 0 : x_issue_slot + 1;
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
            int at = (split + next_chunk * SPLITS) * CHUNK + t8;
#pragma unroll
            for (int half_chunk = 0; half_chunk < 2; ++half_chunk) {
                int i = at + half_chunk * 32;
                bool inside = i < k;
                if (!inside) i = 0;
                cp_async16(to + half_chunk * 2 * THREADS * 16, row0 + i, inside && valid0);
                cp_async16(to + (half_chunk * 2 + 1) * THREADS * 16, row1 + i, inside && valid1);
            }
            issue_slot = issue_slot + 1 == STAGES ? 0 : issue_slot + 1;
            if (X_STREAM && with_x && next_r == 0) issue_x(next_chunk);
            if (++next_r == R) {
                next_r = 0;
                if (++next_chunk == my_chunks) {
                    next_chunk = 0;
                    next_block += clusters;
                }
            }
        }
        cp_async_commit();
    };

    cluster_arrive();
#if NORM
    elem *norm_shared = (elem *)(cluster_sums);
    for (int i = threadIdx.x * 8; i < k; i += THREADS * 8)
        cp_async16(shared_address(norm_shared + i), norm_weight + i);
    cp_async_commit();
#endif
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) issue(false);
    pdl_launch();
    pdl_wait();

#if NORM
    // A thread normalizes the fragments of x that it will use.
    float *squares = (float *)(norm_shared + k);
    float square[NT];
#pragma unroll
    for (int n = 0; n < NT; ++n) square[n] = 0.f;
    // Chunks whose loads are under way together.
    const int BATCH = NT == 1 ? 4 : NT == 2 ? 2 : 1;
    for (int c0 = 0; c0 < my_chunks; c0 += BATCH) {
        Vec16 rv[BATCH][NT][2], xv[BATCH][NT][2];
#pragma unroll
        for (int b = 0; b < BATCH; ++b)
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    int i = (split + (c0 + b) * SPLITS) * CHUNK + t8 + h * 32, token = n * 8 + g;
                    rv[b][n][h].raw = xv[b][n][h].raw = make_uint4(0, 0, 0, 0);
                    if (c0 + b < my_chunks && i < k && token < tokens) {
                        rv[b][n][h] = load16(residual + (i64)token * k + i);
                        if (x) xv[b][n][h] = load16(x + (i64)token * k + i);
                    }
                }
#pragma unroll
        for (int b = 0; b < BATCH; ++b)
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    if (c0 + b >= my_chunks) continue;
                    int i = (split + (c0 + b) * SPLITS) * CHUNK + t8 + h * 32, token = n * 8 + g;
                    float r[8], added[8];
                    unpack8<elem>(rv[b][n][h], r);
                    unpack8<elem>(xv[b][n][h], added);
#pragma unroll
                    for (int e = 0; e < 8; ++e) r[e] += added[e];
                    Vec16 rounded = pack8<elem>(r);
                    unpack8<elem>(rounded, r);
#pragma unroll
                    for (int e = 0; e < 8; ++e) square[n] += r[e] * r[e];
                    store_shared16(x_ring + (c0 + b) * X_BYTES + (n * 2 + h) * THREADS * 16,
                                   rounded);
                    if (i < k && token < tokens && token % gridDim.x == blockIdx.x)
                        store16(residual_out + (i64)token * k + i, rounded);
                }
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        square[n] += __shfl_xor_sync(FULL_WARP, square[n], 1);
        square[n] += __shfl_xor_sync(FULL_WARP, square[n], 2);
        if (t8 == 0) squares[(n * 8 + g) * WARPS + warp] = square[n];
    }
    cp_async_wait<STAGES - 1>(); // the norm's weight
    __syncthreads();
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) sum += squares[(n * 8 + g) * WARPS + i];
        square[n] = rsqrtf(sum / (float)k + eps);
    }
    for (int c = 0; c < my_chunks; ++c) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            int i = (split + c * SPLITS) * CHUNK + t8 + h * 32;
            if (i >= k) continue;
            Vec16 weight;
            weight.raw = *(const uint4 *)(norm_shared + i);
            float scale[8];
            unpack8<elem>(weight, scale);
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                u32 place = x_ring + c * X_BYTES + (n * 2 + h) * THREADS * 16;
                float v[8];
                unpack8<elem>(load_shared16(place), v);
#pragma unroll
                for (int e = 0; e < 8; ++e)
                    v[e] = to_float(from_float<elem>(v[e] * square[n])) * scale[e];
                store_shared16(place, pack8<elem>(v));
            }
        }
    }
#elif X_STREAM
    // x of the items that were issued before the wait: the first chunks of the first block, and
    // of those after it.
    for (int s = 0; s < STAGES - 1; s += R)
        if (s / R < my_chunks * ((blocks - first_block + clusters - 1) / clusters))
            issue_x(s / R % my_chunks);
    cp_async_commit();
#else
    for (int c = 0; c < my_chunks; ++c) issue_x(c);
    cp_async_commit();
#endif
    cp_async_wait<0>();

    const Problem problem = {y, bias, tokens, outputs};
    int read_slot = 0, x_read_slot = 0;
    for (int block = first_block; block < blocks; block += clusters) {
        float acc[PAIRS][4];
#pragma unroll
        for (int p = 0; p < PAIRS; ++p) acc[p][0] = acc[p][1] = acc[p][2] = acc[p][3] = 0.f;
        for (int c = 0; c < my_chunks; ++c) {
            Vec16 b[NT][2];
#pragma unroll
            for (int r = 0; r < R; ++r) {
                cp_async_wait<STAGES - 2>();
                if (r == 0) {
                    u32 from = x_ring + (X_STREAM ? x_read_slot : c) * X_BYTES;
#pragma unroll
                    for (int n = 0; n < NT; ++n)
#pragma unroll
                        for (int h = 0; h < 2; ++h)
                            b[n][h] = load_shared16(from + (n * 2 + h) * THREADS * 16);
                    x_read_slot = x_read_slot + 1 == x_slots ? 0 : x_read_slot + 1;
                }
                u32 from = ring + read_slot * ITEM_BYTES;
                Vec16 a[4];
#pragma unroll
                for (int v = 0; v < 4; ++v) a[v] = load_shared16(from + v * THREADS * 16);
                read_slot = read_slot + 1 == STAGES ? 0 : read_slot + 1;
                // Into the slot of the item before this one.
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

        cluster_wait(); // all blocks of the cluster have started, and read the sums before
#pragma unroll
        for (int p0 = 0; p0 < PAIRS; p0 += PASS) {
            // The last pass may be a short one.
            const int pairs = PAIRS - p0 < PASS ? PAIRS - p0 : PASS;
            __syncthreads(); // the sums of the pass before were read
#pragma unroll
            for (int p = 0; p < PASS; ++p)
                if (p < pairs)
                    sums[(p * WARPS + warp) * 32 + lane] =
                        make_float4(acc[(p0 + p) % PAIRS][0], acc[(p0 + p) % PAIRS][1],
                                    acc[(p0 + p) % PAIRS][2], acc[(p0 + p) % PAIRS][3]);
            __syncthreads();
            for (int p = warp; p < pairs; p += WARPS) {
                float4 sum = tree_sum<WARPS>(sums + p * WARPS * 32 + lane, 32);
                int pair = p0 + p;
#if CLUSTER > 1
                // Pair i is finished by block i % CLUSTER.
                float4 *place = cluster_sums + (pair / CLUSTER * CLUSTER + rank) * 32 + lane;
                store_remote(shared_address(place), pair % CLUSTER, sum);
#else
                finish(problem, block * R + pair / NT, pair % NT, lane, sum);
#endif
            }
        }
#if CLUSTER > 1
        cluster_arrive();
        cluster_wait();
        for (int i = warp; i * CLUSTER + rank < PAIRS; i += WARPS) {
            float4 sum = tree_sum<CLUSTER>(cluster_sums + i * CLUSTER * 32 + lane, 32);
            int pair = i * CLUSTER + rank;
            finish(problem, block * R + pair / NT, pair % NT, lane, sum);
        }
        cluster_arrive();
#endif
    }
    cluster_wait();
}
