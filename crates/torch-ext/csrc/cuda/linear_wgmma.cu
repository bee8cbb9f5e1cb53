// y = x w^T for 9 to 512 rows of x (tokens) on Hopper: decode of a batch, where the time goes into
// reading w once, and the rest of the machine must not be in the way of that.
//
// The weights take the 64-row side of wgmma ("swapped"), tokens its column side. A tile is ROWS = 64
// WGS rows of w, one warpgroup for every 64, and all tokens, or one half of them. K goes by in chunks of 64 elements, a
// stage of a ring in shared memory each: one warp starts the copies (TMA), the others multiply.
//
// Two things besides w use up bandwidth. Every tile needs all of x: SHARE thread blocks of a cluster
// work on neighbouring tiles at the same pace, each fetches its part of a chunk of x and sends it to
// all of them. And few tiles of a usual size do not fill the GPU: SPLIT thread blocks of a cluster
// share out K, each a contiguous range, and add up through distributed shared memory, in the order
// of their ranges. A cluster is SHARE * SPLIT thread blocks; block r is `r % SHARE`-th of its tiles
// and has the `r / SHARE`-th range.
//
// Weights depend on no earlier kernel, so the ring is filled with them before `pdl_wait()`; x follows.
//
//   -DNT=4, 8, 16, 20, 24, 28 or 32: groups of eight tokens; -DWGS -DSPLIT -DSHARE -DSTAGES; and -DSILU=1 as in
//   gemv.cu: the rows of a tile are then eight of the gate, the eight of up that belong to them, the
//   next eight of the gate... which TMA puts in this order.
//
// An RMS norm between two products costs a kernel that waits for all of the first and is waited for by all of the second.
// Here both do their part of it, since a row's norm is one factor:
//   -DADD=1: the product is added to `residual`, and what is written to y is the sum times `gain`, the norm's weight. Each
//   tile writes the squares of its part of a row, added up.
//   -DSCALED=1: x is such rows, and a row's results are multiplied by 1 / sqrt(mean square + eps) in the end.
//
// The sum for one output depends on K and SPLIT alone: not on timing, nor on the other tokens.
//
// hopper.cuh, linear.cuh and linear_wgmma_end.cuh stand before this file when it is compiled.

#define TOKENS (NT * 8)
#define ROWS (WGS * 64)
#define CHUNK 64
#define CLUSTER (SHARE * SPLIT)
#define CONSUMERS (WGS * 128)
#define THREADS (CONSUMERS + 32 + 32 * SCALED)
#define W_BYTES (ROWS * CHUNK * 2)
#define X_BYTES (TOKENS * CHUNK * 2)
#define STAGE_BYTES (W_BYTES + X_BYTES)
// Pairs (16 rows, group of tokens) of a tile; with SPLIT, pair i is finished by the block of range i % SPLIT.
#define PAIRS (WGS * 4 * NT)
static_assert(NT % SHARE == 0, "a part of x is whole groups of eight tokens");
static_assert(!ADD || (!SILU && WGS == 1 && NT % SPLIT == 0), "a block of a split finishes whole columns of a tile");
static_assert(PAIRS % SPLIT == 0 && (SPLIT == 1 || PAIRS * 512 <= STAGES * STAGE_BYTES), "sums fit into the ring");

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
#define OUT16(i) OUT8(i), OUT8(i + 8)
#define R16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define R32 R16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define R48 R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define R64 R48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define R80 R64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define R96 R80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define R112 R96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define R128 R112 ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
/// c (64 x TOKENS) += a b^T, both in shared memory, 16 elements of K.
#define MULTIPLY(COLUMNS, REGISTERS, A, B, ...)                                                                        \
    DEVICE void multiply(float(&c)[NT * 4], u64 a, u64 b) {                                                            \
        asm volatile("wgmma.mma_async.sync.aligned.m64" COLUMNS "k16.f32." TYPES " {" REGISTERS "}, " A ", " B         \
                     ", 1, 1, 1, 0, 0;\n"                                                                              \
                     : __VA_ARGS__                                                                                     \
                     : "l"(a), "l"(b));                                                                                \
    }
#if NT == 4
MULTIPLY("n32", R16, "%16", "%17", OUT16(0))
#elif NT == 8
MULTIPLY("n64", R32, "%32", "%33", OUT16(0), OUT16(16))
#elif NT == 16
MULTIPLY("n128", R64, "%64", "%65", OUT16(0), OUT16(16), OUT16(32), OUT16(48))
#elif NT == 20
MULTIPLY("n160", R80, "%80", "%81", OUT16(0), OUT16(16), OUT16(32), OUT16(48), OUT16(64))
#elif NT == 24
MULTIPLY("n192", R96, "%96", "%97", OUT16(0), OUT16(16), OUT16(32), OUT16(48), OUT16(64), OUT16(80))
#elif NT == 28
MULTIPLY("n224", R112, "%112", "%113", OUT16(0), OUT16(16), OUT16(32), OUT16(48), OUT16(64), OUT16(80), OUT16(96))
#elif NT == 32
MULTIPLY("n256", R128, "%128", "%129", OUT16(0), OUT16(16), OUT16(32), OUT16(48), OUT16(64), OUT16(80), OUT16(96), OUT16(112))
#endif

// ---- the kernel -------------------------------------------------------------------------------------------------------

/// Which chunk of which tile is copied next.
struct Cursor {
    int group, chunk; // of SHARE tiles; of this block's range
    int clusters, chunks;

    DEVICE void next() {
        if (++chunk == chunks) chunk = 0, group += clusters;
    }
};
#endif

/// Shared memory: STAGES * STAGE_BYTES and room to begin at a multiple of 1024. `w` has boxes of ROWS rows ([k, 8, 2,
/// groups of 8] with SILU), `x` of `x_rows`, both of CHUNK columns with the 128-byte swizzle. `outputs`: columns
/// of y; `tiles` of w. `spans`: 1, or 2 where the cluster after each takes the second half of the tokens. `x_rows`: a multiple
/// of 8 for which SHARE boxes hold all tokens of a span, and no more than TOKENS rows. What
/// lies behind them in the ring is not copied (TMA takes its time for rows that are not there either), and what becomes of
/// it is not written. Grid: clusters, with SPLIT exactly one for SHARE tiles and a span. With ADD or SCALED, `squares` is
/// [parts, TOKENS], one part for each tile of the product that writes them, and there is one span; outputs % 8 == 0 with ADD.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    linear_wgmma(elem *y, const elem *bias, const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x,
                 int tokens, int outputs, int k, int tiles, elem *residual, const elem *gain, float *squares, int parts,
                 float eps, int x_rows, int spans) {
#if HOPPER
    extern __shared__ __align__(1024) u8 shared[];
    __shared__ __align__(8) u64 barriers[2 * STAGES + 2];
    const u32 ring = (shared_address(shared) + 1023) & ~1023u;
    const u32 full = shared_address(barriers), empty = full + 8 * STAGES, summed = empty + 8 * STAGES;
    // Uniform for the compiler too, and so is what is made of it.
    const int warp = __shfl_sync(FULL_WARP, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const int rank = blockIdx.x % CLUSTER, share = rank % SHARE, split = rank / SHARE;
    const int span = blockIdx.x / CLUSTER & (spans - 1), first_token = span * SHARE * x_rows;
    const int cluster = blockIdx.x / CLUSTER >> (spans - 1), clusters = gridDim.x / CLUSTER >> (spans - 1);
    const int groups = (tiles + SHARE - 1) / SHARE;
    const int all_chunks = (k + CHUNK - 1) / CHUNK;
    const int first_chunk = (int)((i64)all_chunks * split / SPLIT);
    const int chunks = (int)((i64)all_chunks * (split + 1) / SPLIT) - first_chunk;
    // Of this block: chunks of all its tiles, and how many fill the ring for the first time.
    const int total = cluster < groups ? ((groups - cluster - 1) / clusters + 1) * chunks : 0;
    const int early = total < STAGES ? total : STAGES;
    const u64 read_once = policy_read_once(), keep = policy_keep();
    const int x_bytes = x_rows * CHUNK * 2; // of a box

    auto copy_w = [&](const Cursor &c, int stage) {
        u32 to = ring + stage * STAGE_BYTES, barrier = full + 8 * stage;
        int tile = c.group * SHARE + share, column = (first_chunk + c.chunk) * CHUNK;
        barrier_arrive_expect(barrier, W_BYTES + SHARE * x_bytes);
#if SILU
        copy_box4(to, &w, column, tile * (ROWS / 16), barrier, read_once);
#else
        copy_box(to, &w, column, tile * ROWS, barrier, read_once);
#endif
    };
    // Each block of a cluster's share gets what all of them fetch, and its barrier counts it.
    auto copy_x = [&](const Cursor &c, int stage) {
        u32 to = ring + stage * STAGE_BYTES + W_BYTES + share * x_bytes, barrier = full + 8 * stage;
        int column = (first_chunk + c.chunk) * CHUNK, row = first_token + share * x_rows;
#if SHARE > 1
        copy_box_to((u16)(((1 << SHARE) - 1) << (split * SHARE)), to, &x, column, row, barrier, keep);
#else
        copy_box(to, &x, column, row, barrier, keep);
#endif
    };

    const Cursor start = {cluster, 0, clusters, chunks};
    if (threadIdx.x == CONSUMERS) {
        for (int s = 0; s < STAGES; ++s) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, SHARE * CONSUMERS / 32); // every warp that reads what this block sends
        }
        barrier_init(summed, 1);
        barrier_init(summed + 8, 32); // the factors of SCALED
        barrier_init_done();
        barrier_arrive_expect(summed, PAIRS * 512);
        Cursor c = start;
        for (int s = 0; s < early; ++s, c.next()) copy_w(c, s);
    }
    __syncwarp();
#if CLUSTER > 1
    cluster_sync(); // all blocks have their barriers
#else
    __syncthreads();
#endif
    pdl_launch();
    pdl_wait();

    if (warp == CONSUMERS / 32) {
        if (lane == 0) {
            Cursor c = start;
            for (int s = 0; s < early; ++s, c.next()) copy_x(c, s);
            int stage = 0;
            u32 parity = 0;
            for (int i = early; i < total + early; ++i, c.next()) {
                // In the end too: no block ends while another may still arrive at its barriers.
                barrier_wait(empty + 8 * stage, parity);
                if (i < total) {
                    copy_w(c, stage);
                    copy_x(c, stage);
                }
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
        }
        __syncwarp();
#if SPLIT > 1
        cluster_sync();
#endif
        return;
    }

#if SCALED
    __shared__ float factors[TOKENS];
    if (warp == CONSUMERS / 32 + 1) {
        // While the products run, this warp adds up each row's squares, in the order of the parts.
        const int each = TOKENS / 32;
        float sum[each] = {};
#pragma unroll 16
        for (int part = 0; part < parts; ++part)
#pragma unroll
            for (int i = 0; i < each; ++i) sum[i] += squares[part * TOKENS + i * 32 + lane];
#pragma unroll
        for (int i = 0; i < each; ++i) factors[i * 32 + lane] = rsqrtf(sum[i] / (float)k + eps);
        barrier_arrive(summed + 8);
#if SPLIT > 1
        __syncwarp();
        cluster_sync();
#endif
        return;
    }
#endif

    // A stage that this warp has read may be filled anew, by each block that sends to it.
    auto release = [&](int stage) {
        __syncwarp();
#if SHARE > 1
        if (lane < SHARE) barrier_arrive_remote(empty + 8 * stage, split * SHARE + lane);
#else
        if (lane == 0) barrier_arrive(empty + 8 * stage);
#endif
    };
    const Problem problem = {y + (i64)first_token * outputs, bias, min(tokens - first_token, SHARE * x_rows), outputs};
    // A warpgroup's, or a warp's.
    __shared__ __align__(128) u8 scratch[WGS * (SPLIT == 1 && !ADD ? 4096 : 1024)];
    const bool whole = outputs % 8 == 0;
    auto scaled = [&](int group, float4 c) {
#if SCALED
        float2 factor = *(const float2 *)(factors + group * 8 + lane % 4 * 2);
        c = make_float4(c.x * factor.x, c.y * factor.y, c.z * factor.x, c.w * factor.y);
#endif
        return c;
    };
#if ADD
    // Of the tile, for each 16 rows and each token.
    __shared__ float part_squares[WGS * 4][TOKENS];
    // The pairs that a warp finishes: with a split every (number of warps)-th of this block's, else its own.
    const int mine = NT / SPLIT;
    auto pair_of = [&](int j) { return SPLIT > 1 ? (warp + j * (CONSUMERS / 32)) * SPLIT + split : warp * NT + j; };
    auto put_added = [&](int tile, int pair, float4 c, Vec16 before, Vec16 weight) {
        int group = pair % NT, unit = pair / NT;
        float sum = finish_added(problem, residual, tile + unit, group, lane, c, shared_address(scratch + warp * 256),
                                 before, weight);
        if (lane < 16 && lane % 2 == 0) part_squares[unit][group * 8 + lane / 2] = sum;
    };
    // All of this block's pairs are finished when every warp is here.
    auto put_squares = [&](int tile) {
        asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
        for (int token = threadIdx.x; token < TOKENS; token += CONSUMERS) {
            float sum = 0.f;
#pragma unroll
            for (int unit = 0; unit < WGS * 4; ++unit) sum += part_squares[unit][token];
            if (token / 8 % SPLIT == split && tile < tiles) squares[tile * TOKENS + token] = sum;
        }
        asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
    };
#endif
    const u64 rows = descriptor(ring + warp / 4 * (64 * CHUNK * 2), 16), columns = descriptor(ring + W_BYTES, 16);
    int stage = 0;
    u32 parity = 0;
    for (int group = cluster; group < groups; group += clusters) {
        float acc[NT * 4];
#pragma unroll
        for (int i = 0; i < NT * 4; ++i) acc[i] = 0.f;
        // In units of 16 rows of w.
        const int tile = (group * SHARE + share) * (ROWS / 16);
#if ADD
        // On their way while the products run: behind them, each would be a trip to memory that all wait for.
        Vec16 held[mine], weights[mine];
#pragma unroll
        for (int j = 0; j < mine; ++j) {
            const Place place(problem, tile + pair_of(j) / NT, pair_of(j) % NT, lane);
            held[j] = weights[j] = {};
            if (place.at < 0) continue;
            held[j] = load16(residual + place.at);
            weights[j].raw = __ldg((const uint4 *)(gain + place.row));
        }
#endif
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

#if SCALED
        barrier_wait(summed + 8, 0);
#endif
#if SPLIT > 1
        float4 *sums = (float4 *)(shared + (ring - shared_address(shared)));
        cluster_sync(); // no block needs its ring any more
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            int pair = warp * NT + n;
            float4 *place = sums + (pair / SPLIT * SPLIT + split) * 32 + lane;
            store_cluster(shared_address(place), summed, pair % SPLIT * SHARE + share,
                          make_float4(acc[4 * n], acc[4 * n + 1], acc[4 * n + 2], acc[4 * n + 3]));
        }
        auto sum_of = [&](int i) {
            const float4 *part = sums + i * SPLIT * 32 + lane;
            float4 sum = part[0];
#pragma unroll
            for (int s = 1; s < SPLIT; ++s) sum = add(sum, part[s * 32]);
            return sum;
        };
#if ADD
        barrier_wait(summed, 0);
#pragma unroll
        for (int j = 0; j < mine; ++j)
            put_added(tile, pair_of(j), sum_of(pair_of(j) / SPLIT), held[j], weights[j]);
        put_squares(group * SHARE + share);
#else
        barrier_wait(summed, 0);
        for (int i = warp; i < PAIRS / SPLIT; i += CONSUMERS / 32) {
            int pair = i * SPLIT + split, group = pair % NT;
            float4 c = scaled(group, sum_of(i));
            if (whole)
                finish_rows(problem, tile + pair / NT, group, lane, c, shared_address(scratch + warp * 256));
            else
                finish(problem, tile + pair / NT, group, lane, c);
        }
#endif
#elif ADD
#pragma unroll
        for (int j = 0; j < mine; ++j) {
            const float *c = acc + 4 * j;
            put_added(tile, pair_of(j), make_float4(c[0], c[1], c[2], c[3]), held[j], weights[j]);
        }
        put_squares(group * SHARE + share);
#else
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            float *c = acc + 4 * n;
            float4 v = scaled(n, make_float4(c[0], c[1], c[2], c[3]));
            c[0] = v.x, c[1] = v.y, c[2] = v.z, c[3] = v.w;
        }
        if (whole)
            finish_tile(problem, tile + warp / 4 * 4, acc, shared_address(scratch + warp / 4 * 4096));
        else
#pragma unroll
            for (int n = 0; n < NT; ++n)
                finish(problem, tile + warp, n, lane, make_float4(acc[4 * n], acc[4 * n + 1], acc[4 * n + 2], acc[4 * n + 3]));
#endif
    }

#endif
}
