// min-p, top-k and top-p as one number a row: the smallest logit that is kept (see crate
// `sampler`, filter.rs). Nothing is sorted. Three kernels:
//   sample_scan       grid (slices, rows): the largest logit of every 64 tokens, and of slices;
//   sample_histogram  grid (slices, rows): for top-p without top-k, sums of exp((x - max) / t) by
//                     bucket of x, in fixed point (so their order does not matter);
//   sample_select     grid (rows): the threshold. Maxima bound top-k, the histogram bounds top-p;
//                     the few logits at the border are searched in registers, and if they are not
//                     few (many equal ones, a large k) the whole row, which takes a few times longer.

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    sample_scan(INPUTS, TABLES, float *chunk_max, Stats *stats, u64 *histogram) {
    __shared__ Row row;
    __shared__ float scratch[33];
    __shared__ int bad_raw, bad;
    int slice = blockIdx.x, slices = gridDim.x, at = blockIdx.y;
    int thread = threadIdx.x, first = slice * SLICE;
    pdl_wait();
    pdl_launch();
    if (thread == 0) bad_raw = bad = NO_TOKEN;
    const elem *data = logits + at * stride;
    i64 chunks = (vocab + CHUNK - 1) / CHUNK;
    float x[2][8], most = -INF, least = INF;
    // Under way while the slot is looked up.
#pragma unroll
    for (int g = 0; g < 2; ++g) {
        int token = first + g * (SLICE / 2) + thread * 8;
#pragma unroll
        for (int i = 0; i < 8; ++i) x[g][i] = -INF;
        if (token < vocab) load8(data, vocab, aligned, token, x[g]);
    }
    if (!load_row(row, at, first, first + SLICE, row_slots, positions, slots, aux, tail, blocks,
                  max_slots)) {
        return;
    }
    for (int i = slice * THREADS + thread; i < BUCKETS; i += slices * THREADS) {
        histogram[(i64)at * BUCKETS + i] = 0;
    }
    Edits edits(row, blocks, vocab);
    bool edited = edits.any(row);
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
    if (thread == 0) stats[(i64)at * slices + slice] = {most, least, bad_raw, bad};
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
    sample_histogram(INPUTS, TABLES, const float *chunk_max, const Stats *stats, u64 *histogram) {
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
    if (!load_row(row, at, first, first + SLICE, row_slots, positions, slots, aux, tail, blocks,
                  max_slots) ||
        !needs_histogram(row.slot, vocab)) {
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
    const elem *data = logits + at * stride;
    Edits edits(row, blocks, vocab);
    i64 chunks = (vocab + CHUNK - 1) / CHUNK;
#pragma unroll
    for (int g = 0; g < 2; ++g) {
        int token = first + g * (SLICE / 2) + thread * 8;
        if (token >= vocab || !(chunk_max[at * chunks + token / CHUNK] >= nucleus.floor)) continue;
        float x[8];
        load8(data, vocab, aligned, token, x);
        edits.apply(row, token, x);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (!(x[i] >= nucleus.floor) || token + i >= vocab) continue;
            int bucket = nucleus.bucket(x[i]);
            double rest = nucleus.exponent(x[i]) + (double)bucket * nucleus.width;
            u64 weight = (u64)(exp_near_0(rest) * 68719476736.0 + 0.5);
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

struct Selected {
    float max, threshold;
    /// 0, or why the row cannot be sampled.
    int code, pad;
};

/// Candidates that are searched in registers, and how many a thread has.
static const int MOST = 4096, EACH = MOST / THREADS;
/// Chunks of the largest vocabulary.
static const int MOST_CHUNKS = 8192;

struct Shared {
    Row row;
    Stats all;
    float threshold;
    int found;
    u32 keys[MOST];
    int counts[THREADS / 32][3], count[3];
    double sums[THREADS / 32][3], sum[3];
    double scan[THREADS / 32];
    double above, target;
    int bucket;
};

DEVICE double warp_total(double x) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(FULL_WARP, x, d);
    return x;
}
DEVICE int warp_total(int x) { return __reduce_add_sync(FULL_WARP, x); }

/// Three sums over the thread block, in a fixed order.
template <typename T> DEVICE void block_total(T (&x)[3], T (*parts)[3], T *total) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int j = 0; j < 3; ++j) {
        x[j] = warp_total(x[j]);
        if (lane == 0) parts[warp][j] = x[j];
    }
    __syncthreads();
    if (warp == 0) {
#pragma unroll
        for (int j = 0; j < 3; ++j) {
            T sum = warp_total(lane < THREADS / 32 ? parts[lane][j] : (T)0);
            if (lane == 0) total[j] = sum;
        }
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 3; ++j) x[j] = total[j];
}

/// The largest key in `low..=high` for which the sum over all keys from it on is at least `target`
/// (that of `low` is). `sums(keys, out)` gives the sums for three keys at once.
template <typename T, typename Sums>
DEVICE u32 search(u32 low, u32 high, T target, const Sums &sums) {
    while (low < high) {
        u32 span = high - low, key[3];
#pragma unroll
        for (u32 j = 0; j < 3; ++j) {
            u32 step = (u32)(((u64)span * (j + 1) + 3) / 4);
            key[j] = low + (step > 0 ? step : 1);
        }
        T sum[3] = {0, 0, 0};
        sums(key, sum);
        u32 next_low = low, next_high = key[0] - 1;
#pragma unroll
        for (int j = 0; j < 3; ++j) {
            if (sum[j] >= target) next_low = key[j], next_high = j < 2 ? key[j + 1] - 1 : high;
        }
        low = next_low, high = next_high;
    }
    return low;
}

/// Calls `f(logits)` with every eight processed logits of chunks of which `wanted(maximum)`.
template <typename Wanted, typename F>
DEVICE void for_each8(const elem *data, int vocab, int aligned, const float *chunk_max,
                      const Row &row, const Edits &edits, const Wanted &wanted, const F &f) {
    const int AT_ONCE = 4;
    for (int base = threadIdx.x * 8; base < vocab; base += AT_ONCE * THREADS * 8) {
        float x[AT_ONCE][8];
        bool live[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            int token = base + j * THREADS * 8;
            live[j] = token < vocab && wanted(chunk_max[token / CHUNK]);
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            if (live[j]) load8(data, vocab, aligned, base + j * THREADS * 8, x[j]);
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            if (!live[j]) continue;
            edits.apply(row, base + j * THREADS * 8, x[j]);
            f(x[j]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    sample_select(INPUTS, TABLES, int slices, const float *all_chunk_max, const Stats *stats,
                  const u64 *histogram, Selected *selected) {
    __shared__ Shared shared;
    int at = blockIdx.x, thread = threadIdx.x;
    pdl_wait();
    pdl_launch();
    Row &row = shared.row;
    if (!load_row(row, at, 0, vocab, row_slots, positions, slots, aux, tail, blocks, max_slots)) {
        return;
    }
    const Slot &slot = row.slot;
    if (thread < 32) {
        Stats s = row_stats(stats + (i64)at * slices, slices);
        float t = -INF;
        if (row_error(s) == 0 && !is_greedy(slot) && slot.ln_min_p > -1e300) {
            t = min_p_threshold(s.max, (double)slot.temperature, slot.ln_min_p);
        }
        if (thread == 0) shared.all = s, shared.threshold = t, shared.found = 0;
    }
    __syncthreads();
    const Stats all = shared.all;
    float threshold = shared.threshold;
    int code = row_error(all);
    bool by_k = filters_k(slot, vocab), by_p = slot.top_p < 1.f;
    if (code != 0 || is_greedy(slot) || !(by_k || by_p)) {
        if (is_greedy(slot)) threshold = all.max;
        if (thread == 0) selected[at] = {all.max, threshold, code, 0};
        return;
    }

    const elem *data = logits + at * stride;
    Edits edits(row, blocks, vocab);
    int chunks = (vocab + CHUNK - 1) / CHUNK;
    const float *chunk_max = all_chunk_max + (i64)at * chunks;
    const u32 top = key_of(all.max);
    const double inverse = 1.0 / (double)slot.temperature;
    auto weight = [&](u32 key) {
        return exp(((double)float_of(key) - (double)all.max) * inverse);
    };
    u32 keys[EACH];
    /// Whether `keys` are all logits from `threshold` on. A key of 0 is none.
    bool gathered = false;
    auto gather = [&](auto wanted_chunk, auto wanted) {
        for_each8(data, vocab, aligned, chunk_max, row, edits, wanted_chunk,
                  [&](const float(&x)[8]) {
#pragma unroll
                      for (int i = 0; i < 8; ++i) {
                          if (!wanted(x[i])) continue;
                          int place = atomicAdd(&shared.found, 1);
                          if (place < MOST) shared.keys[place] = key_of(x[i]);
                      }
                  });
        __syncthreads();
        int found = shared.found;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            int place = i * THREADS + thread;
            keys[i] = place < found && place < MOST ? shared.keys[place] : 0;
        }
        return found;
    };
    auto count_keys = [&](const u32(&key)[3], int(&sum)[3]) {
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
#pragma unroll
            for (int j = 0; j < 3; ++j) sum[j] += keys[i] >= key[j];
        }
        block_total(sum, shared.counts, shared.count);
    };
    auto count_row = [&](const u32(&key)[3], int(&sum)[3]) {
        float lowest = float_of(key[0]);
        for_each8(data, vocab, aligned, chunk_max, row, edits,
                  [&](float max) { return max >= lowest; },
                  [&](const float(&x)[8]) {
#pragma unroll
                      for (int i = 0; i < 8; ++i) {
                          u32 k = key_of(x[i]);
#pragma unroll
                          for (int j = 0; j < 3; ++j) sum[j] += k >= key[j];
                      }
                  });
        block_total(sum, shared.counts, shared.count);
    };
    auto weigh_row = [&](const u32(&key)[3], double(&sum)[3]) {
        float lowest = float_of(key[0]);
        for_each8(data, vocab, aligned, chunk_max, row, edits,
                  [&](float max) { return max >= lowest; },
                  [&](const float(&x)[8]) {
                      for (int i = 0; i < 8; ++i) {
                          u32 k = key_of(x[i]);
                          double w = k >= key[0] ? weight(k) : 0.0;
#pragma unroll
                          for (int j = 0; j < 3; ++j) sum[j] += k >= key[j] ? w : 0.0;
                      }
                  });
        block_total(sum, shared.sums, shared.sum);
    };

    if (by_k) {
        int k = slot.top_k;
        u32 bound = key_of(-INF);
        if (k <= chunks) {
            // k chunks hold at least one logit of at least this each, so no others matter.
            u32 maxima[MOST_CHUNKS / THREADS];
#pragma unroll
            for (int i = 0; i < MOST_CHUNKS / THREADS; ++i) {
                int chunk = i * THREADS + thread;
                maxima[i] = chunk < chunks ? key_of(chunk_max[chunk]) : 0;
            }
            bound = search(bound, top, k, [&](const u32(&key)[3], int(&sum)[3]) {
#pragma unroll
                for (int i = 0; i < MOST_CHUNKS / THREADS; ++i) {
                    if (i * THREADS >= chunks) break;
#pragma unroll
                    for (int j = 0; j < 3; ++j) sum[j] += maxima[i] >= key[j];
                }
                block_total(sum, shared.counts, shared.count);
            });
        }
        float from = fmaxf(float_of(bound), threshold);
        int found = MOST + 1;
        if (k <= chunks) {
            auto wanted = [&](float x) { return x >= from; };
            found = gather(wanted, wanted);
        }
        gathered = found <= MOST;
        if (!gathered) {
            threshold = fmaxf(threshold, float_of(search(bound, top, k, count_row)));
        } else if (found >= k) {
            threshold = fmaxf(threshold, float_of(search(key_of(from), top, k, count_keys)));
        }
    }
    if (by_p) {
        u32 low = key_of(threshold);
        double above = 0.0, target = 0.0;
        if (!by_k) {
            // Thread i has buckets 2i and 2i + 1.
            Nucleus nucleus(all, threshold, slot.temperature);
            double weights[2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                int bucket = 2 * thread + j;
                double sum = (double)histogram[(i64)at * BUCKETS + bucket] / 68719476736.0;
                weights[j] = sum > 0.0 ? sum * exp(-(double)bucket * nucleus.width) : 0.0;
            }
            int lane = thread % 32, warp = thread / 32;
            double upto = weights[0] + weights[1];
#pragma unroll
            for (int d = 1; d < 32; d *= 2) {
                double other = __shfl_up_sync(FULL_WARP, upto, d);
                if (lane >= d) upto += other;
            }
            if (lane == 31) shared.scan[warp] = upto;
            if (thread == 0) shared.bucket = BUCKETS;
            __syncthreads();
            double before = 0.0, total = 0.0;
            for (int i = 0; i < THREADS / 32; ++i) {
                if (i < warp) before += shared.scan[i];
                total += shared.scan[i];
            }
            // What comes before a bucket must be one number for all threads, so the owner of the
            // first bucket that reaches the target writes it down.
            target = (double)slot.top_p * total;
            double first = before + (upto - (weights[0] + weights[1]));
            double second = first + weights[0];
            int mine = weights[0] > 0.0 && second >= target                ? 2 * thread
                       : weights[1] > 0.0 && second + weights[1] >= target ? 2 * thread + 1
                                                                           : BUCKETS;
            mine = __reduce_min_sync(FULL_WARP, mine);
            if (lane == 0 && mine < BUCKETS) atomicMin(&shared.bucket, mine);
            __syncthreads();
            if (shared.bucket / 2 == thread) shared.above = shared.bucket % 2 ? second : first;
            __syncthreads();
            int border = shared.bucket;
            above = shared.above;
            int found = MOST + 1;
            if (border < BUCKETS) {
                found = gather(
                    [&](float max) { return max >= nucleus.floor && nucleus.bucket(max) <= border; },
                    [&](float x) { return x >= nucleus.floor && nucleus.bucket(x) == border; });
            }
            gathered = found <= MOST;
            low = key_of(nucleus.floor);
        }
        double w[EACH];
        if (gathered) {
            double total[3] = {0.0, 0.0, 0.0};
            u32 least = 0xffffffffu;
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                bool in = keys[i] != 0 && keys[i] >= low;
                keys[i] = in ? keys[i] : 0;
                w[i] = in ? weight(keys[i]) : 0.0;
                total[0] += w[i];
                least = in && keys[i] < least ? keys[i] : least;
            }
            least = __reduce_min_sync(FULL_WARP, least);
            if (thread == 0) shared.found = (int)0xffffffffu;
            __syncthreads();
            if (thread % 32 == 0) atomicMin((u32 *)&shared.found, least);
            if (by_k) {
                block_total(total, shared.sums, shared.sum);
                target = (double)slot.top_p * total[0];
            } else {
                __syncthreads();
            }
            least = (u32)shared.found;
            u32 key = search(least, top, target - above, [&](const u32(&key)[3], double(&sum)[3]) {
#pragma unroll
                for (int i = 0; i < EACH; ++i) {
#pragma unroll
                    for (int j = 0; j < 3; ++j) sum[j] += keys[i] >= key[j] ? w[i] : 0.0;
                }
                block_total(sum, shared.sums, shared.sum);
            });
            threshold = fmaxf(threshold, float_of(key));
        } else {
            const u32 everything[3] = {low, low, low};
            double total[3] = {0.0, 0.0, 0.0};
            weigh_row(everything, total);
            u32 key = search(low, top, (double)slot.top_p * total[0], weigh_row);
            threshold = fmaxf(threshold, float_of(key));
        }
    }
    if (thread == 0) selected[at] = {all.max, threshold, 0, 0};
}
