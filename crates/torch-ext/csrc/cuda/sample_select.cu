// min-p, top-k and top-p as one number a row: the smallest logit that is kept (see crate
// `sampler`, filter.rs). Nothing is sorted. Grid (rows).
//
// Logits are divided into buckets, and one of those is the border: for top-k the one in which the
// k-th largest maximum of a chunk lies, for top-p that in which the sum is reached. The few logits
// at the border are compared with each other; if they are not so few they are searched in
// registers, and if they are many (equal ones, a large k) the whole row is, which takes longer.

/// Candidates that are searched in registers, and how many a thread has.
static const int MOST = 4096, EACH = MOST / THREADS;
/// Candidates that are compared with each other.
static const int FEW = 256;
/// Chunks of the largest vocabulary, and how many a thread has.
static const int MOST_CHUNKS = 8192, HELD = MOST_CHUNKS / THREADS;

struct Shared {
    Row row;
    Stats all;
    float threshold;
    int found, listed;
    u32 least, most;
    alignas(16) u32 keys[MOST];
    double weights[FEW];
    u16 list[MOST_CHUNKS];
    /// Chunks by the bucket of their largest logit.
    int chunks[BUCKETS];
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

/// Lists the chunks of which `wanted(maximum)`; `maxima` are those of this thread. `listed` is 0
/// before.
template <typename Wanted>
DEVICE void list(Shared &shared, const float (&maxima)[HELD], int chunks, const Wanted &wanted) {
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        if (i * THREADS >= chunks) break;
        int chunk = i * THREADS + threadIdx.x;
        if (chunk < chunks && wanted(maxima[i])) shared.list[atomicAdd(&shared.listed, 1)] = (u16)chunk;
    }
    __syncthreads();
}

/// Calls `f(logits)` with every eight processed logits of the listed chunks.
template <typename F>
DEVICE void visit(const Shared &shared, const elem *data, int vocab, int aligned, const Edits &edits,
                  bool edited, const F &f) {
    int thread = threadIdx.x, groups = shared.listed * 8;
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
    // Under way while the slot is looked up.
    const int chunks = (vocab + CHUNK - 1) / CHUNK;
    float maxima[HELD];
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        if (i * THREADS >= chunks) break;
        int chunk = i * THREADS + thread;
        maxima[i] = chunk < chunks ? all_chunk_max[(i64)at * chunks + chunk] : -INF;
    }
    if (warp == 1) {
        Stats s = row_stats(stats + (i64)at * slices, slices);
        if (lane == 0) shared.all = s;
    }
    if (thread == 0) {
        shared.found = shared.listed = 0, shared.least = 0xffffffffu, shared.most = 0;
        shared.bucket = BUCKETS, shared.above = 0.0;
    }
    for (int i = thread; i < BUCKETS; i += THREADS) shared.chunks[i] = 0;
    if (!load_row(shared.row, at, 0, vocab, row_slots, positions, slots, aux, tail, blocks,
                  max_slots)) {
        return;
    }
    const Slot &slot = shared.row.slot;
    const Stats all = shared.all;
    int code = row_error(all);
    float threshold = -INF;
    if (code == 0 && !is_greedy(slot) && slot.ln_min_p > -1e300) {
        if (warp == 0) {
            float t = min_p_threshold(all.max, (double)slot.temperature, slot.ln_min_p);
            if (lane == 0) shared.threshold = t;
        }
        __syncthreads();
        threshold = shared.threshold;
    }
    bool by_k = filters_k(slot, vocab), by_p = slot.top_p < 1.f;
    if (code != 0 || is_greedy(slot) || !(by_k || by_p)) {
        if (is_greedy(slot)) threshold = all.max;
        if (thread == 0) selected[at] = {all.max, threshold, code, 0};
        return;
    }

    const elem *data = logits + at * stride;
    Edits edits(shared.row, blocks, vocab);
    bool edited = edits.any(shared.row);
    const int k = slot.top_k;
    const double inverse = 1.0 / (double)slot.temperature;
    auto weight = [&](u32 key) {
        return exp_far(((double)float_of(key) - (double)all.max) * inverse);
    };

    // The border: of top-k all logits up to it matter, of top-p those in it.
    const Nucleus nucleus(all, threshold, slot.temperature);
    int border = BUCKETS - 1;
    double target = (double)k;
    bool gathered = !by_k || k <= chunks;
    if (gathered) {
        // A chunk holds a logit as large as its maximum, so k of them bound the k-th largest logit.
        if (by_k) {
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
                if (i * THREADS >= chunks) break;
                if (maxima[i] >= nucleus.floor) atomicAdd(&shared.chunks[nucleus.bucket(maxima[i])], 1);
            }
            __syncthreads();
        }
        // Thread i has buckets 2i and 2i + 1.
        double sums[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            int bucket = 2 * thread + j;
            if (by_k) {
                sums[j] = (double)shared.chunks[bucket];
            } else {
                double sum = (double)histogram[(i64)at * BUCKETS + bucket] / 68719476736.0;
                sums[j] = sum > 0.0 ? sum * exp_far(-(double)bucket * nucleus.width) : 0.0;
            }
        }
        double upto = sums[0] + sums[1];
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
        if (!by_k) target = (double)slot.top_p * total;
        double first = before + (upto - (sums[0] + sums[1]));
        double second = first + sums[0];
        int mine = sums[0] > 0.0 && second >= target           ? 2 * thread
                   : sums[1] > 0.0 && second + sums[1] >= target ? 2 * thread + 1
                                                               : BUCKETS;
        mine = __reduce_min_sync(FULL_WARP, mine);
        if (lane == 0 && mine < BUCKETS) atomicMin(&shared.bucket, mine);
        __syncthreads();
        if (by_k) {
            // Fewer than k chunks may reach above the floor, below which nothing counts.
            border = min(shared.bucket, BUCKETS - 1);
        } else {
            // What comes before the border must be one number for all threads: its owner's.
            if (shared.bucket / 2 == thread) shared.above = shared.bucket % 2 ? second : first;
            __syncthreads();
            border = shared.bucket;
            target -= shared.above;
            gathered = border < BUCKETS;
        }
    }

    int found = 0;
    if (gathered) {
        list(shared, maxima, chunks,
             [&](float max) { return max >= nucleus.floor && nucleus.bucket(max) <= border; });
        visit(shared, data, vocab, aligned, edits, edited, [&](const float(&x)[8]) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (!(x[i] >= nucleus.floor)) continue;
                int bucket = nucleus.bucket(x[i]);
                if (by_k ? bucket > border : bucket != border) continue;
                int place = atomicAdd(&shared.found, 1);
                if (place < MOST) shared.keys[place] = key_of(x[i]);
            }
        });
        __syncthreads();
        found = shared.found;
        gathered = found <= MOST;
    }
    if (gathered && found <= FEW) {
        u32 key = thread < found ? shared.keys[thread] : 0;
        double w = by_p && thread < found ? weight(key) : 0.0;
        if (thread < FEW) shared.weights[thread] = w;
        if (found <= thread && thread < FEW) shared.keys[thread] = 0;
        __syncthreads();
        int larger = 0;
        double above = 0.0;
        if (thread < found) {
#pragma unroll 1
            for (int i = 0; i < found; i += 4) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    bool is_larger = shared.keys[i + j] > key;
                    larger += is_larger;
                    above += is_larger ? shared.weights[i + j] : 0.0;
                }
            }
        }
        bool keeps = thread < found && (!by_k || larger < k);
        if (by_k && by_p) {
            double part = warp_total(keeps ? w : 0.0), total = 0.0;
            if (lane == 0) shared.scan[warp] = part;
            __syncthreads();
#pragma unroll
            for (int i = 0; i < FEW / 32; ++i) total += shared.scan[i];
            target = (double)slot.top_p * total;
        }
        if (by_p) keeps = keeps && (above < target || larger == 0);
        u32 least = __reduce_min_sync(FULL_WARP, keeps ? key : 0xffffffffu);
        if (lane == 0 && warp * 32 < found) atomicMin(&shared.least, least);
        __syncthreads();
        threshold = fmaxf(threshold, float_of(shared.least));
    } else if (gathered) {
        u32 keys[EACH];
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
            u32 low = by_k ? key_of(threshold) : 0;
            double w[EACH], total[3] = {0.0, 0.0, 0.0};
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                w[i] = keys[i] != 0 && keys[i] >= low ? weight(keys[i]) : 0.0;
                total[0] += w[i];
            }
            if (by_k) {
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
            u32 low = key_of(fmaxf(threshold, nucleus.floor)), high = key_of(all.max);
            bool known = !weighted;
            target = (double)k;
#pragma unroll 1
            while (!known || low < high) {
                u32 key[3] = {low, low, low};
                if (known) divide(low, high, key);
                float lowest = float_of(key[0]);
                double sum[3] = {0.0, 0.0, 0.0};
                __syncthreads();
                if (thread == 0) shared.listed = 0;
                __syncthreads();
                list(shared, maxima, chunks, [&](float max) { return max >= lowest; });
                visit(shared, data, vocab, aligned, edits, edited, [&](const float(&x)[8]) {
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
