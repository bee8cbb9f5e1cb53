// min-p, top-k and top-p as one number a row: the smallest logit that is kept (see crate
// `sampler`, filter.rs). Nothing is sorted. Grid (rows). What `sample_scan.cu` found bounds the
// threshold: maxima bound top-k, the histogram bounds top-p; the few logits at the border are
// searched in registers, and if they are not few (many equal ones, a large k) the whole row, which
// takes a few times longer.

/// Candidates that are searched in registers, and how many a thread has.
static const int MOST = 4096, EACH = MOST / THREADS;
/// Chunks of the largest vocabulary.
static const int MOST_CHUNKS = 8192;

struct Shared {
    Row row;
    Stats all;
    float threshold;
    int found, listed;
    u32 least, most;
    u32 keys[MOST];
    u16 list[MOST_CHUNKS];
    int counts[THREADS / 32][3];
    double sums[THREADS / 32][3], sum[3];
    /// Read as one vector: it must not share its 16 bytes with what another warp already writes.
    /// Nothing would go wrong (that word is not used), but racecheck reports it.
    alignas(16) int count[4];
    double scan[THREADS / 32];
    double above;
    int bucket;
};

// This kernel is one block's work from start to end, so its time is latency, and code that was not
// run before has to be fetched: what is long and not hot is called rather than inlined.
__device__ __noinline__ double exp_far(double x) { return exp(x); }
__device__ __noinline__ void apply_far(const Edits &edits, const Row &row, int token,
                                       float (&x)[8]) {
    edits.apply(row, token, x);
}

DEVICE double warp_total(double x) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(FULL_WARP, x, d);
    return x;
}
DEVICE int warp_total(int x) { return __reduce_add_sync(FULL_WARP, x); }

/// Three sums over the thread block, in a fixed order. Warps that are not `active` have zeros.
template <typename T> DEVICE void block_total(T (&x)[3], T (*parts)[3], T *total, bool active) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int j = 0; j < 3; ++j) {
        if (active) x[j] = warp_total(x[j]);
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

/// Three keys that divide `low + 1..=high`, and what is left of it when sums are known: the largest
/// key from which on the sum of all keys is at least `target` lies in `low..=high`.
DEVICE void divide(u32 low, u32 high, u32 (&key)[3]) {
    u32 span = high - low;
#pragma unroll
    for (u32 j = 0; j < 3; ++j) {
        u32 step = (u32)(((u64)span * (j + 1) + 3) / 4);
        key[j] = low + (step > 0 ? step : 1);
    }
}
template <typename T>
DEVICE void narrow(u32 &low, u32 &high, const u32 (&key)[3], const T (&sum)[3], T target) {
    u32 last = high;
    high = key[0] - 1;
#pragma unroll
    for (int j = 0; j < 3; ++j) {
        if (sum[j] >= target) low = key[j], high = j < 2 ? key[j + 1] - 1 : last;
    }
}

/// The largest key in `low..=high` for which the sum over all keys from it on is at least `target`
/// (that of `low` is). `sums(keys, out)` gives the sums for three keys at once.
template <typename T, typename Sums>
DEVICE u32 search(u32 low, u32 high, T target, const Sums &sums) {
#pragma unroll 1
    while (low < high) {
        u32 key[3];
        divide(low, high, key);
        T sum[3] = {0, 0, 0};
        sums(key, sum);
        narrow(low, high, key, sum, target);
    }
    return low;
}

/// Calls `f(logits)` with every eight processed logits of the chunks of which `wanted(maximum)`.
template <typename Wanted, typename F>
DEVICE void visit(Shared &shared, const elem *data, int vocab, int aligned, const float *chunk_max,
                  const Edits &edits, bool edited, const Wanted &wanted, const F &f) {
    int thread = threadIdx.x, chunks = (vocab + CHUNK - 1) / CHUNK;
    __syncthreads();
    if (thread == 0) shared.listed = 0;
    __syncthreads();
#pragma unroll 4
    for (int chunk = thread; chunk < chunks; chunk += THREADS) {
        if (wanted(chunk_max[chunk])) shared.list[atomicAdd(&shared.listed, 1)] = (u16)chunk;
    }
    __syncthreads();
    int groups = shared.listed * 8;
    auto token_of = [&](int group) { return shared.list[group / 8] * CHUNK + group % 8 * 8; };
    float next[8];
    if (thread < groups) load8(data, vocab, aligned, token_of(thread), next);
#pragma unroll 1
    for (int group = thread; group < groups; group += THREADS) {
        float x[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = next[i];
        int token = token_of(group);
        if (group + THREADS < groups) {
            load8(data, vocab, aligned, token_of(group + THREADS), next);
        }
        if (token >= vocab) continue;
        if (edited) {
            float y[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) y[i] = x[i];
            apply_far(edits, shared.row, token, y);
#pragma unroll
            for (int i = 0; i < 8; ++i) x[i] = y[i];
        }
        f(x);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    sample_select(INPUTS, TABLES, int slices, const float *all_chunk_max, const Stats *stats,
                  const u64 *histogram, Selected *selected) {
    __shared__ Shared shared;
    int at = blockIdx.x, thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    pdl_wait();
    pdl_launch();
    if (!load_row(shared.row, at, 0, vocab, row_slots, positions, slots, aux, tail, blocks,
                  max_slots)) {
        return;
    }
    const Slot &slot = shared.row.slot;
    if (warp == 0) {
        Stats s = row_stats(stats + (i64)at * slices, slices);
        float t = -INF;
        if (row_error(s) == 0 && !is_greedy(slot) && slot.ln_min_p > -1e300) {
            t = min_p_threshold(s.max, (double)slot.temperature, slot.ln_min_p);
        }
        if (lane == 0) {
            shared.all = s, shared.threshold = t;
            shared.found = 0, shared.least = 0xffffffffu, shared.most = 0;
            shared.bucket = BUCKETS, shared.above = 0.0;
        }
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
    Edits edits(shared.row, blocks, vocab);
    bool edited = edits.any(shared.row);
    int chunks = (vocab + CHUNK - 1) / CHUNK, k = slot.top_k;
    const float *chunk_max = all_chunk_max + (i64)at * chunks;
    const u32 top = key_of(all.max);
    const double inverse = 1.0 / (double)slot.temperature;
    auto weight = [&](u32 key) {
        return exp_far(((double)float_of(key) - (double)all.max) * inverse);
    };

    // Which logits decide: those from `from` on, or those in bucket `border`.
    float from = threshold;
    u32 bound = key_of(-INF);
    int border = -1;
    double target = 0.0;
    bool gathered = by_k ? k <= chunks : true;
    Nucleus nucleus(all, threshold, slot.temperature);
    if (by_k && gathered) {
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
            block_total(sum, shared.counts, shared.count, true);
        });
        from = fmaxf(float_of(bound), threshold);
    } else if (!by_k) {
        // Thread i has buckets 2i and 2i + 1.
        double weights[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            int bucket = 2 * thread + j;
            double sum = (double)histogram[(i64)at * BUCKETS + bucket] / 68719476736.0;
            weights[j] = sum > 0.0 ? sum * exp_far(-(double)bucket * nucleus.width) : 0.0;
        }
        double upto = weights[0] + weights[1];
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            double other = __shfl_up_sync(FULL_WARP, upto, d);
            if (lane >= d) upto += other;
        }
        if (lane == 31) shared.scan[warp] = upto;
        __syncthreads();
        double before = 0.0, total = 0.0;
        for (int i = 0; i < THREADS / 32; ++i) {
            if (i < warp) before += shared.scan[i];
            total += shared.scan[i];
        }
        target = (double)slot.top_p * total;
        double first = before + (upto - (weights[0] + weights[1]));
        double second = first + weights[0];
        int mine = weights[0] > 0.0 && second >= target                ? 2 * thread
                   : weights[1] > 0.0 && second + weights[1] >= target ? 2 * thread + 1
                                                                       : BUCKETS;
        mine = __reduce_min_sync(FULL_WARP, mine);
        if (lane == 0 && mine < BUCKETS) atomicMin(&shared.bucket, mine);
        __syncthreads();
        // What comes before the border must be one number for all threads: its owner's.
        if (shared.bucket / 2 == thread) shared.above = shared.bucket % 2 ? second : first;
        __syncthreads();
        border = shared.bucket;
        target -= shared.above;
        gathered = border < BUCKETS;
    }

    u32 keys[EACH];
    int found = 0;
    if (gathered) {
        visit(shared, data, vocab, aligned, chunk_max, edits, edited,
              [&](float max) {
                  return border < 0 ? max >= from
                                    : max >= nucleus.floor && nucleus.bucket(max) <= border;
              },
              [&](const float(&x)[8]) {
#pragma unroll
                  for (int i = 0; i < 8; ++i) {
                      if (border < 0 ? !(x[i] >= from)
                                     : !(x[i] >= nucleus.floor) || nucleus.bucket(x[i]) != border) {
                          continue;
                      }
                      int place = atomicAdd(&shared.found, 1);
                      if (place < MOST) shared.keys[place] = key_of(x[i]);
                  }
              });
        __syncthreads();
        found = shared.found;
        gathered = found <= MOST;
    }
    if (gathered) {
        bool active = warp * 32 < found;
        u32 least = 0xffffffffu, most = 0;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            int place = i * THREADS + thread;
            keys[i] = place < found ? shared.keys[place] : 0;
            if (keys[i] != 0) least = min(least, keys[i]), most = max(most, keys[i]);
        }
        least = __reduce_min_sync(FULL_WARP, least), most = __reduce_max_sync(FULL_WARP, most);
        if (lane == 0) atomicMin(&shared.least, least), atomicMax(&shared.most, most);
        __syncthreads();
        least = shared.least, most = shared.most;
        if (by_k && found >= k) {
            u32 key = search(least, most, k, [&](const u32(&key)[3], int(&sum)[3]) {
#pragma unroll
                for (int i = 0; i < EACH; ++i) {
#pragma unroll
                    for (int j = 0; j < 3; ++j) sum[j] += keys[i] >= key[j];
                }
                block_total(sum, shared.counts, shared.count, active);
            });
            threshold = fmaxf(threshold, float_of(key));
        }
        if (by_p) {
            u32 low = border < 0 ? key_of(threshold) : 0;
            double w[EACH], total[3] = {0.0, 0.0, 0.0};
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                w[i] = keys[i] != 0 && keys[i] >= low ? weight(keys[i]) : 0.0;
                total[0] += w[i];
            }
            if (border < 0) {
                block_total(total, shared.sums, shared.sum, active);
                target = (double)slot.top_p * total[0];
            }
            low = max(low, least);
            u32 key = search(low, most, target, [&](const u32(&key)[3], double(&sum)[3]) {
#pragma unroll
                for (int i = 0; i < EACH; ++i) {
#pragma unroll
                    for (int j = 0; j < 3; ++j) sum[j] += keys[i] >= key[j] ? w[i] : 0.0;
                }
                block_total(sum, shared.sums, shared.sum, active);
            });
            threshold = fmaxf(threshold, float_of(key));
        }
    } else {
        // The whole row at each step: first for top-k, then for top-p.
#pragma unroll 1
        for (int weighted = 0; weighted < 2; ++weighted) {
            if (!(weighted ? by_p : by_k)) continue;
            u32 low = bound, high = top;
            if (weighted) low = by_k ? key_of(threshold) : key_of(nucleus.floor);
            bool known = !weighted;
            target = (double)k;
#pragma unroll 1
            while (!known || low < high) {
                u32 key[3] = {low, low, low};
                if (known) divide(low, high, key);
                float lowest = float_of(key[0]);
                double sum[3] = {0.0, 0.0, 0.0};
                visit(shared, data, vocab, aligned, chunk_max, edits, edited,
                      [&](float max) { return max >= lowest; },
                      [&](const float(&x)[8]) {
#pragma unroll
                          for (int i = 0; i < 8; ++i) {
                              if (!(x[i] >= lowest)) continue;
                              u32 here = key_of(x[i]);
                              double w = weighted ? weight(here) : 1.0;
#pragma unroll
                              for (int j = 0; j < 3; ++j) sum[j] += here >= key[j] ? w : 0.0;
                          }
                      });
                block_total(sum, shared.sums, shared.sum, true);
                if (known) {
                    narrow(low, high, key, sum, target);
                } else {
                    target = (double)slot.top_p * sum[0], known = true;
                }
            }
            threshold = fmaxf(threshold, float_of(low));
        }
    }
    if (thread == 0) selected[at] = {all.max, threshold, 0, 0};
}
