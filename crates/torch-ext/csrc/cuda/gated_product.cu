// y = silu(gate) * up of many rows of x (tokens) on Hopper: prefill, where the tensor cores are the limit. gate and up are
// x w^T, w the gate's rows, then those of up.
//
// The SiLU as a kernel of its own reads twice as much as it writes, of the largest activation that a model has. Here it is the
// end of the product. TMA puts the rows of w in the order of eight of the gate, the eight of up that belong to them, the
// next eight of the gate..., so that a lane has both values of an output.
//
// A thread block takes tiles of TOKENS rows of x and COLUMNS of w: two warpgroups multiply (wgmma), 64 tokens each, one warp
// copies (TMA) into a ring of STAGES chunks of K. The two thread blocks of a cluster have the same columns, and each fetches
// half of the weights for both.
//
// A row's results do not depend on the other rows, nor on timing.
//
// hopper.cuh stands before this file when it is compiled.

#define TOKENS 128
#define COLUMNS 256
#define CHUNK 64
#define STAGES 4
/// Rows of the grid of tiles that are worked on together, in units of clusters: their x and w stay in L2.
#define BAND 8
#define CLUSTER 2
#define X_BYTES (TOKENS * CHUNK * 2)
#define W_BYTES (COLUMNS * CHUNK * 2)
#define STAGE_BYTES (X_BYTES + W_BYTES)
/// Columns of y that a tile gives: of 16 tokens, a warp's share, in panels of 64.
#define OUTPUTS (COLUMNS / 2)
#define PANELS (OUTPUTS / 64)
#define PANEL_BYTES (16 * 64 * 2)

#if HOPPER
// ---- the product ------------------------------------------------------------------------------------------------------

#if defined(T_BF16)
#define TYPES "bf16.bf16"
#else
#define TYPES "f16.f16"
#endif
#define OUT8(i)                                                                                                        \
    "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]),        \
        "+f"(c[i + 7])
#define OUT32(i) OUT8(i), OUT8(i + 8), OUT8(i + 16), OUT8(i + 24)

/// c (64 x COLUMNS) += a b^T, both in shared memory, 16 elements of K.
DEVICE void multiply(float (&c)[COLUMNS / 2], u64 a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPES " {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
                 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
                 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
                 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
                 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
                 "%128, %129, 1, 1, 1, 0, 0;\n"
                 : OUT32(0), OUT32(32), OUT32(64), OUT32(96)
                 : "l"(a), "l"(b));
}

/// Where the 16 bytes of a row of 16 begin in a panel.
DEVICE u32 panel_place(u32 panel, int row, int part) { return panel + row * 128 + ((part ^ (row & 7)) << 4); }

// ---- the kernel -------------------------------------------------------------------------------------------------------

/// A cluster's tiles: which tokens and columns the next one has.
struct Tiles {
    int clusters_of_tokens, columns, at, step;

    DEVICE bool more() const { return at < clusters_of_tokens * columns; }
    DEVICE void next() { at += step; }
    /// In units of a cluster's tokens, and of a tile's columns.
    DEVICE int2 place() const {
        int band = at / (BAND * columns), in_band = at - band * (BAND * columns);
        int left = clusters_of_tokens - band * BAND, rows = left < BAND ? left : BAND;
        return make_int2(band * BAND + in_band % rows, in_band / rows);
    }
};

#endif

/// Shared memory: STAGES * STAGE_BYTES, 8 * PANELS * PANEL_BYTES, and room to begin at a multiple of 1024. `x` has boxes of
/// TOKENS rows, `w` (as [k, 8, 2, outputs / 8]) of COLUMNS / CLUSTER, `y` of 16, all of 64 columns with the 128-byte
/// swizzle. y is [tokens, outputs]; outputs % 8 == 0. Grid: clusters, at most as many as there are tiles of them.
extern "C" __global__ void __launch_bounds__(384, 1)
    gated_product(const __grid_constant__ TensorMap y, const __grid_constant__ TensorMap w,
                  const __grid_constant__ TensorMap x, int tokens, int outputs, int k) {
#if HOPPER
    extern __shared__ __align__(1024) u8 shared[];
    __shared__ __align__(8) u64 barriers[2 * STAGES];
    const u32 ring = (shared_address(shared) + 1023) & ~1023u;
    const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
    const int warp = __shfl_sync(FULL_WARP, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const int rank = blockIdx.x % CLUSTER;
    const int chunks = (k + CHUNK - 1) / CHUNK;
    Tiles tiles = {(tokens + CLUSTER * TOKENS - 1) / (CLUSTER * TOKENS), (outputs + OUTPUTS - 1) / OUTPUTS,
                   (int)blockIdx.x / CLUSTER, (int)gridDim.x / CLUSTER};

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, CLUSTER * 8); // every warp that reads what this block sends
        }
        barrier_init_done();
    }
    cluster_sync(); // both blocks have their barriers
    pdl_launch();
    pdl_wait();

    if (warp >= 8) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (warp > 8 || lane > 0) return;
        const u64 usual = policy_usual();
        int stage = 0;
        u32 parity = 1;
        auto turn = [&] {
            if (++stage == STAGES) stage = 0, parity ^= 1;
        };
        for (; tiles.more(); tiles.next()) {
            const int2 place = tiles.place();
            for (int c = 0; c < chunks; ++c, turn()) {
                barrier_wait(empty + 8 * stage, parity);
                u32 to = ring + stage * STAGE_BYTES, barrier = full + 8 * stage;
                barrier_arrive_expect(barrier, STAGE_BYTES);
                copy_box(to, &x, c * CHUNK, (place.x * CLUSTER + rank) * TOKENS, barrier, usual);
                to += X_BYTES + rank * (W_BYTES / CLUSTER);
                copy_box4_to((1 << CLUSTER) - 1, to, &w, c * CHUNK, (place.y * CLUSTER + rank) * (COLUMNS / 16 / CLUSTER),
                             barrier, usual);
            }
        }
        // No block ends while the other may still arrive at its barriers.
        for (int s = 0; s < STAGES; ++s, turn()) barrier_wait(empty + 8 * stage, parity);
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    auto release = [&](int stage) {
        __syncwarp();
        if (lane < CLUSTER) barrier_arrive_remote(empty + 8 * stage, lane);
    };
    const u64 rows = descriptor(ring + warp / 4 * (64 * CHUNK * 2), 16), columns = descriptor(ring + X_BYTES, 16);
    const u32 panels = ring + STAGES * STAGE_BYTES + warp * (PANELS * PANEL_BYTES);
    int stage = 0;
    u32 parity = 0;
    for (; tiles.more(); tiles.next()) {
        const int2 place = tiles.place();
        // The first of this warp's 16.
        const int token = (place.x * CLUSTER + rank) * TOKENS + warp * 16;
        float acc[COLUMNS / 2];
#pragma unroll
        for (int i = 0; i < COLUMNS / 2; ++i) acc[i] = 0.f;
        int before = -1;
        for (int c = 0; c < chunks; ++c) {
            barrier_wait(full + 8 * stage, parity);
            wgmma_fence();
#pragma unroll
            for (int d = 0; d < CHUNK / 16; ++d)
                multiply(acc, descriptor_on(rows, stage * STAGE_BYTES + d * 32),
                         descriptor_on(columns, stage * STAGE_BYTES + d * 32));
            wgmma_commit();
            // The products of the chunk before this one are complete.
            wgmma_wait<1>();
            if (before >= 0) release(before);
            before = stage;
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
        wgmma_wait<0>();
        settled(acc);
        if (before >= 0) release(before);

        // A panel is 64 columns: eight groups of eight, of which a lane has two elements in two rows each.
#pragma unroll
        for (int p = 0; p < PANELS; ++p) {
            const u32 panel = panels + p * PANEL_BYTES;
            // The last tile's panel is on its way to memory.
            if (lane == 0) store_wait_read<PANELS - 1>();
            __syncwarp();
#pragma unroll
            for (int g = 0; g < 8; g += 2) {
                u32 v[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float *c = acc + 8 * (p * 8 + g + i / 2) + i % 2 * 2;
                    v[i] = silu_mul2<elem>(make_float2(c[0], c[1]), make_float2(c[4], c[5]));
                }
                store_matrix_x4(panel_place(panel, lane % 16, g + lane / 16), v);
            }
            proxy_fence();
            __syncwarp();
            if (lane == 0) {
                store_box(&y, place.y * OUTPUTS + p * 64, token, panel);
                store_commit();
            }
        }
    }
    if (lane == 0) store_wait();
#endif
}
