// y = x w^T for some rows of x (33 to 64 tokens) and weights too small to fill the GPU with tiles
// of a usual size: CLUSTER thread blocks share out K, and add up through distributed shared memory.
//
// A thread block computes WARPS tiles of 16 rows, one a warp, for all tokens (NT groups of eight).
// Weights go as in gemv.cu: each thread copies its own 16-byte pieces of fragments, and the
// pipeline is filled with them before `pdl_wait()`. The tile of x of a stage is shared by the warps,
// so there is a barrier a chunk.
//
//   -DNT -DSTAGES -DWARPS -DCLUSTER, and -DSILU=1 as in gemv.cu
//
// The sum for one output depends on K and CLUSTER, not on the other tokens. linear.cuh stands
// before this file when it is compiled.

#define THREADS (WARPS * 32)
#define CHUNK 64
#define W_BYTES (4 * THREADS * 16)
#define X_BYTES (NT * 8 * CHUNK * 2)
#define STAGE_BYTES (W_BYTES + X_BYTES)
// Pairs (tile, group of tokens) of a thread block; pair i is finished by block i % CLUSTER.
#define PAIRS (WARPS * NT)

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

/// Writes to the place in block `rank`'s shared memory that is `address` in this block's.
DEVICE void store_remote(u32 address, u32 rank, float4 v) {
#if CLUSTER > 1
    u32 remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(remote), "f"(v.x),
                 "f"(v.y), "f"(v.z), "f"(v.w)
                 : "memory");
#endif
}

/// Where 16 bytes of a token's chunk are in a stage: halves of odd tokens change places, so that
/// the 64-byte pieces of two tokens share no bank.
DEVICE u32 x_place(int token, int vector) {
    return (u32)(token * CHUNK * 2 + ((vector ^ ((token & 1) * 4)) * 16));
}

/// Shared memory: STAGES * STAGE_BYTES, and for clusters PAIRS * 512. `outputs`: columns of y;
/// k % 8 == 0.
extern "C" __global__ void __launch_bounds__(THREADS)
    linear_split(elem *y, const elem *x, const elem *w, const elem *bias, int tokens, int outputs,
                 int k) {
    extern __shared__ __align__(128) u8 shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int g = lane / 4, t8 = lane % 4 * 8;
    const int rank = blockIdx.x % CLUSTER;
    const int tile = blockIdx.x / CLUSTER * WARPS + warp;
    const int chunks = (k + CHUNK - 1) / CHUNK;
    const int my_chunks = (chunks - rank + CLUSTER - 1) / CLUSTER;
    const u32 stages = shared_address(shared);

#if SILU
    const int row = tile * 8 + g;
    const bool valid0 = row < outputs, valid1 = valid0;
    const elem *row0 = w + (i64)(valid0 ? row : 0) * k;
    const elem *row1 = w + (i64)(valid0 ? outputs + row : 0) * k;
#else
    const int row = tile * 16 + g;
    const bool valid0 = row < outputs, valid1 = row + 8 < outputs;
    const elem *row0 = w + (i64)(valid0 ? row : 0) * k;
    const elem *row1 = w + (i64)(valid1 ? row + 8 : 0) * k;
#endif
    const u64 read_once = policy_read_once();
    auto issue_w = [&](int chunk) {
        u32 to = stages + chunk % STAGES * STAGE_BYTES + threadIdx.x * 16;
        int at = (rank + chunk * CLUSTER) * CHUNK + t8;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            int i = at + h * 32;
            bool inside = i < k;
            if (!inside) i = 0;
            cp_async16(to + h * 2 * THREADS * 16, row0 + i, inside && valid0, read_once);
            cp_async16(to + (h * 2 + 1) * THREADS * 16, row1 + i, inside && valid1, read_once);
        }
    };
    auto issue_x = [&](int chunk) {
        u32 to = stages + chunk % STAGES * STAGE_BYTES + W_BYTES;
        int at = (rank + chunk * CLUSTER) * CHUNK;
#pragma unroll
        for (int v = 0; v < NT * 64 / THREADS; ++v) {
            int token = (v * THREADS + threadIdx.x) / 8, vector = threadIdx.x % 8;
            int i = at + vector * 8;
            bool valid = token < tokens && i < k;
            cp_async16(to + x_place(token, vector), x + (valid ? (i64)token * k + i : 0), valid);
        }
    };

    cluster_arrive();
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s)
        if (s < my_chunks) issue_w(s);
    pdl_launch();
    pdl_wait();
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
        if (s < my_chunks) issue_x(s);
        cp_async_commit(); // the first one has all the weights as well
    }

    float acc[NT][4];
#pragma unroll
    for (int n = 0; n < NT; ++n) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.f;
    for (int c = 0; c < my_chunks; ++c) {
        cp_async_wait<STAGES - 2>();
        __syncthreads(); // the tile of x is here, and that of the chunk before was used
        if (c + STAGES - 1 < my_chunks) {
            issue_w(c + STAGES - 1);
            issue_x(c + STAGES - 1);
        }
        cp_async_commit();
        u32 from = stages + c % STAGES * STAGE_BYTES;
        Vec16 a[4];
#pragma unroll
        for (int v = 0; v < 4; ++v)
            a[v] = load_shared16(from + (v * THREADS + threadIdx.x) * 16);
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                Vec16 b = load_shared16(from + W_BYTES + x_place(n * 8 + g, h * 4 + t8 / 8));
#pragma unroll
                for (int q = 0; q < 4; q += 2)
                    mma16816<elem>(acc[n], a[2 * h].word[q], a[2 * h + 1].word[q],
                                   a[2 * h].word[q + 1], a[2 * h + 1].word[q + 1], b.word[q],
                                   b.word[q + 1]);
            }
    }

    const Problem problem = {y, bias, tokens, outputs};
#if CLUSTER > 1
    float4 *sums = (float4 *)(shared + STAGES * STAGE_BYTES);
    cluster_wait(); // all blocks of the cluster have started
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        int pair = warp * NT + n;
        float4 *place = sums + (pair / CLUSTER * CLUSTER + rank) * 32 + lane;
        store_remote(shared_address(place), pair % CLUSTER,
                     make_float4(acc[n][0], acc[n][1], acc[n][2], acc[n][3]));
    }
    cluster_arrive();
    cluster_wait();
    for (int i = warp; i < PAIRS / CLUSTER; i += WARPS) {
        const float4 *part = sums + i * CLUSTER * 32 + lane;
        float4 sum = part[0];
#pragma unroll
        for (int r = 1; r < CLUSTER; ++r) sum = add(sum, part[r * 32]);
        int pair = i * CLUSTER + rank;
        finish(problem, tile - warp + pair / NT, pair % NT, lane, sum);
    }
#else
#pragma unroll
    for (int n = 0; n < NT; ++n)
        finish(problem, tile, n, lane, make_float4(acc[n][0], acc[n][1], acc[n][2], acc[n][3]));
#endif
}
