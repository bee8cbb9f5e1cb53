// Log-probabilities of the raw logits: of the sampled token, its rank, and the most likely tokens.
//   sample_logprobs_scan  grid (slices, rows): sums, ranks and maxima of every 64 tokens;
//   sample_logprobs       grid (rows): the results, `2 + 2 width` words a row: log-probability, rank,
//                         then `width` tokens and their log-probabilities, as many as were asked for.
// Rows that did not ask, or have no token, are left alone.

/// A slice's share.
struct Share {
    double sum;
    float max;
    /// Logits that are at least the sampled token's.
    int rank;
};

DEVICE bool wants(const Slot *slots, int max_slots, int id, int token) {
    return id >= 0 && id < max_slots && token >= 0 && slots[id].live != 0 && slots[id].logprobs >= 0;
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    sample_logprobs_scan(INPUTS, TABLES, const int *tokens, float *chunk_max, Share *shares) {
    __shared__ float scratch[33];
    __shared__ double sums[THREADS / 32];
    __shared__ int rank;
    int slice = blockIdx.x, slices = gridDim.x, at = blockIdx.y;
    int thread = threadIdx.x, first = slice * SLICE;
    pdl_wait();
    pdl_launch();
    int chosen = tokens[at];
    if (chosen >= vocab || !wants(slots, max_slots, row_slots[at], chosen)) return;
    const elem *data = logits + at * stride;
    float bar = to_float(data[chosen]);
    i64 chunks = (vocab + CHUNK - 1) / CHUNK;
    if (thread == 0) rank = 0;
    float x[2][8], most = -INF;
    int count = 0;
#pragma unroll
    for (int g = 0; g < 2; ++g) {
        int token = first + g * (SLICE / 2) + thread * 8;
        float here = -INF;
#pragma unroll
        for (int i = 0; i < 8; ++i) x[g][i] = -INF;
        if (token < vocab) load8(data, vocab, aligned, token, x[g]);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            here = fmaxf(here, x[g][i]);
            count += token + i < vocab && x[g][i] >= bar;
        }
        most = fmaxf(most, here);
#pragma unroll
        for (int d = 1; d < 8; d *= 2) here = fmaxf(here, __shfl_xor_sync(FULL_WARP, here, d));
        if (thread % 8 == 0 && token < vocab) chunk_max[at * chunks + token / CHUNK] = here;
    }
    float max = block_max(most, scratch);
    double sum = 0.0;
    if (max > -INF) {
#pragma unroll
        for (int g = 0; g < 2; ++g) {
            for (int i = 0; i < 8; ++i) {
                if (x[g][i] > -INF) sum += exp((double)x[g][i] - (double)max);
            }
        }
    }
#pragma unroll
    for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, d);
    count = __reduce_add_sync(FULL_WARP, count);
    if (thread % 32 == 0) sums[thread / 32] = sum, atomicAdd(&rank, count);
    __syncthreads();
    if (thread == 0) {
        for (int i = 1; i < THREADS / 32; ++i) sum += sums[i];
        Share share;
        share.sum = sum, share.max = max, share.rank = rank;
        shares[(i64)at * slices + slice] = share;
    }
}

/// Chunks of the largest vocabulary.
static const int MOST_CHUNKS = 8192;

/// The key of a float; -0 comes after 0, as on the CPU.
DEVICE u32 total_key(float x) {
    u32 bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/// A logit and its token as one number: larger logits first, of equal ones lower tokens.
DEVICE u64 composite(float x, int token) { return (u64)total_key(x) << 32 | (u32)~token; }

DEVICE u64 warp_largest(u64 x) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) {
        u64 other = __shfl_xor_sync(FULL_WARP, x, d);
        x = other > x ? other : x;
    }
    return x;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    sample_logprobs(INPUTS, TABLES, int slices, const int *tokens, const float *chunk_max,
                    const Share *shares, int width, int *out) {
    /// By chunk the largest logit that was not listed.
    __shared__ u32 best[MOST_CHUNKS];
    __shared__ u64 parts[THREADS / 32];
    __shared__ u64 winner;
    __shared__ double log_sum;
    int at = blockIdx.x, thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    pdl_wait();
    pdl_launch();
    int chosen = tokens[at], id = row_slots[at];
    if (chosen >= vocab || !wants(slots, max_slots, id, chosen)) return;
    const elem *data = logits + at * stride;
    shares += (i64)at * slices;
    int chunks = (vocab + CHUNK - 1) / CHUNK;
    chunk_max += (i64)at * chunks;
    out += (i64)at * (2 + 2 * width);
    if (warp == 0) {
        float max = -INF;
        int rank = 0;
        for (int i = lane; i < slices; i += 32) max = fmaxf(max, shares[i].max), rank += shares[i].rank;
        max = warp_max(max);
        rank = __reduce_add_sync(FULL_WARP, rank);
        double sum = 0.0;
        for (int i = lane; i < slices; i += 32) {
            if (shares[i].max > -INF) sum += shares[i].sum * exp((double)shares[i].max - (double)max);
        }
#pragma unroll
        for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, d);
        if (lane == 0) {
            log_sum = (double)max + log(sum);
            out[0] = __float_as_int((float)((double)to_float(data[chosen]) - log_sum));
            out[1] = rank;
        }
    }
    for (int i = thread; i < chunks; i += THREADS) best[i] = total_key(chunk_max[i]);
    __syncthreads();
    int count = min(min(slots[id].logprobs, width), vocab);
    for (int n = 0; n < count; ++n) {
        u64 mine = 0;
        for (int i = thread; i < chunks; i += THREADS) {
            u64 c = (u64)best[i] << 32 | (u32)~i;
            mine = c > mine ? c : mine;
        }
        mine = warp_largest(mine);
        if (lane == 0) parts[warp] = mine;
        __syncthreads();
        if (warp == 0) {
            int chunk = (int)~(u32)warp_largest(lane < THREADS / 32 ? parts[lane] : 0);
            u64 limit = n == 0 ? ~0ull : winner, c[2];
            __syncwarp();
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                int token = chunk * CHUNK + 32 * j + lane;
                c[j] = token < vocab ? composite(to_float(data[token]), token) : 0;
                if (c[j] >= limit) c[j] = 0;
            }
            u64 taken = warp_largest(c[0] > c[1] ? c[0] : c[1]);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                if (c[j] >= taken) c[j] = 0;
            }
            u64 next = warp_largest(c[0] > c[1] ? c[0] : c[1]);
            if (lane == 0) {
                int token = (int)~(u32)taken;
                best[chunk] = (u32)(next >> 32);
                winner = taken;
                float logprob = (float)((double)to_float(data[token]) - log_sum);
                out[2 + n] = token;
                out[2 + width + n] = __float_as_int(logprob);
            }
        }
        __syncthreads();
    }
}
