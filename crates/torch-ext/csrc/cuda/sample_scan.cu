// What `sample_select` and the race over what it leaves need to know of all logits. Two kernels:
//   sample_scan       grid (any number, rows): the largest logit of every 64 tokens, and of slices;
//   sample_histogram  grid (slices, rows): for top-p without top-k, where `sample_select` could not
//                     tell without: sums of exp((x - max) / t) by bucket of x, in fixed point (so
//                     their order does not matter).

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    sample_scan(INPUTS, TABLES, int slices, float *chunk_max, Stats *stats, u64 *histogram) {
    __shared__ Row row;
    __shared__ float scratch[33];
    __shared__ int bad_raw, bad;
    int at = blockIdx.y, thread = threadIdx.x;
    // This block's slices.
    int each = (slices + gridDim.x - 1) / gridDim.x;
    int slice = blockIdx.x * each, end = min(slice + each, slices);
    pdl_wait();
    pdl_launch();
    if (thread == 0) bad_raw = bad = NO_TOKEN;
    const elem *data = logits + at * stride;
    i64 chunks = (vocab + CHUNK - 1) / CHUNK;
    // Under way while the slot is looked up, or the slice before it is worked on.
    Eight next[2];
    auto fetch = [&](int slice) {
#pragma unroll
        for (int g = 0; g < 2; ++g) {
            const int token = slice * SLICE + g * (SLICE / 2) + thread * 8;
            next[g].load(data, token < vocab ? vocab : 0, aligned, token);
        }
    };
    if (slice < end) fetch(slice);
    if (!load_row(row, at, slice * SLICE, end * SLICE, row_slots, positions, slots, aux, tail,
                  blocks, max_slots)) {
        return;
    }
    for (int i = blockIdx.x * THREADS + thread; histogram && i < BUCKETS; i += gridDim.x * THREADS) {
        histogram[(i64)at * BUCKETS + i] = 0;
    }
    Edits edits(row, blocks, vocab);
    bool edited = edits.any(row);
    const bool sums = needs_sum(row.slot, vocab);
    const float scale = __fdividef(1.4426950408889634f, row.slot.temperature);
    for (; slice < end; ++slice) {
        int first = slice * SLICE;
        float x[2][8], most = -INF, least = INF;
        next[0].get(x[0]), next[1].get(x[1]);
        if (slice + 1 < end) fetch(slice + 1);
#pragma unroll
        for (int g = 0; g < 2; ++g) {
            int token = first + g * (SLICE / 2) + thread * 8;
            float here = -INF;
            if (token < vocab) {
                int found = first_bad(x[g], token);
                if (found != NO_TOKEN) atomicMin(&bad_raw, found);
                if (edited) {
                    edits.apply(row, token, x[g]);
                    found = first_bad(x[g], token);
                    if (found != NO_TOKEN) atomicMin(&bad, found);
                }
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    here = fmaxf(here, x[g][i]);
                    if (token + i < vocab) least = fminf(least, x[g][i]);
                }
                most = fmaxf(most, here);
            }
#pragma unroll
            for (int d = 1; d < 8; d *= 2) here = fmaxf(here, __shfl_xor_sync(FULL_WARP, here, d));
            if (thread % 8 == 0 && token < vocab) chunk_max[at * chunks + token / CHUNK] = here;
        }
        most = block_max(most, scratch);
        least = -block_max(-least, scratch);
        float sum = 0.f;
        if (sums && most > -INF) {
#pragma unroll
            for (int g = 0; g < 2; ++g) {
#pragma unroll
                for (int i = 0; i < 8; ++i) sum += exp2_fast((x[g][i] - most) * scale);
            }
            sum = block_sum(sum, scratch);
        }
        if (thread == 0) stats[(i64)at * slices + slice] = {most, least, NO_TOKEN, NO_TOKEN, sum};
    }
    __syncthreads();
    // Of all this block's slices: only the row's first counts.
    if (thread == 0 && (bad_raw != NO_TOKEN || bad != NO_TOKEN)) {
        Stats *last = stats + (i64)at * slices + end - 1;
        last->bad_raw = bad_raw, last->bad = bad;
    }
}

/// `exp(x)` of numbers just below 0, to 1e-13.
DEVICE double exp_near_0(double x) {
    double y = 1.0 / 720.0;
    y = y * x + 1.0 / 120.0;
    y = y * x + 1.0 / 24.0;
    y = y * x + 1.0 / 6.0;
    y = y * x + 0.5;
    y = y * x + 1.0;
    return y * x + 1.0;
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    sample_histogram(INPUTS, TABLES, const float *chunk_max, const Stats *stats, u64 *histogram,
                     const Selected *selected) {
    // Weights relative to the largest of their bucket, times 2^36, in two halves: 8192 of them do
    // not overflow 32 bits, and shared memory adds no more at a time.
    __shared__ u32 high[BUCKETS], low[BUCKETS];
    __shared__ Row row;
    __shared__ Stats all;
    __shared__ float threshold;
    int slice = blockIdx.x, slices = gridDim.x, at = blockIdx.y;
    int thread = threadIdx.x, first = slice * SLICE;
    pdl_wait();
    pdl_launch();
    if (selected[at].state != NEEDS_HISTOGRAM) return;
    // Under way while the slot is looked up.
    const elem *data = logits + at * stride;
    const i64 chunks = (vocab + CHUNK - 1) / CHUNK;
    Eight next[2];
    float top[2];
#pragma unroll
    for (int g = 0; g < 2; ++g) {
        const int token = first + g * (SLICE / 2) + thread * 8;
        next[g].load(data, token < vocab ? vocab : 0, aligned, token);
        top[g] = token < vocab ? chunk_max[at * chunks + token / CHUNK] : -INF;
    }
    if (!load_row(row, at, first, first + SLICE, row_slots, positions, slots, aux, tail, blocks,
                  max_slots)) {
        return;
    }
    if (thread < 32) {
        Stats s = row_stats(stats + (i64)at * slices, slices);
        float t = -INF;
        if (row_error(s) == 0 && row.slot.ln_min_p > -1e300) {
            t = min_p_threshold(s.max, (double)row.slot.temperature, row.slot.ln_min_p);
        }
        if (thread == 0) all = s, threshold = t;
    }
    for (int i = thread; i < BUCKETS; i += THREADS) high[i] = low[i] = 0;
    __syncthreads();
    if (row_error(all) != 0) return;
    Nucleus nucleus(all, threshold, row.slot.temperature);
    Edits edits(row, blocks, vocab);
    const bool edited = edits.any(row);
#pragma unroll
    for (int g = 0; g < 2; ++g) {
        int token = first + g * (SLICE / 2) + thread * 8;
        if (!(top[g] >= nucleus.floor)) continue;
        float x[8];
        next[g].get(x);
        if (edited) edits.apply(row, token, x);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (!(x[i] >= nucleus.floor) || token + i >= vocab) continue;
            const int bucket = nucleus.bucket(x[i]);
            const double rest = nucleus.exponent(x[i]) + (double)bucket * nucleus.width;
            const u64 weight = (u64)(exp_near_0(rest) * 68719476736.0 + 0.5);
            atomicAdd(&high[bucket], (u32)(weight >> 18));
            atomicAdd(&low[bucket], (u32)weight & 0x3ffffu);
        }
    }
    __syncthreads();
    for (int i = thread; i < BUCKETS; i += THREADS) {
        u64 sum = ((u64)high[i] << 18) + low[i];
        if (sum != 0) atomicAdd(&histogram[(i64)at * BUCKETS + i], sum);
    }
}
