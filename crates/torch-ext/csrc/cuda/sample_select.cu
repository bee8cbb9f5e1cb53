// min-p, top-k and top-p as one number a row: the smallest logit that is kept (see crate
// `sampler`, filter.rs). Nothing is sorted. Grid (rows).
//
// Logits are divided into buckets, and one of those is the border: the one in which the k-th
// largest maximum of a chunk lies. The few logits up to it are compared with each other, and the
// few that are kept race at once. Top-p without top-k is tried the same way, with a k of our own:
// it works if the nucleus is small and not in doubt for the rounding of the sum of all weights.
//
// Where it does not, `sample_histogram` adds up weights by bucket, and a second launch finds the
// border there. If the candidates are not so few they are searched in registers, and if they are
// many (equal ones, a large k) the whole row is, which takes longer.

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    sample_select(INPUTS, TABLES, int slices, const float *all_chunk_max, const Stats *stats,
                  const u64 *histogram, Selected *selected, int *tokens) {
    __shared__ Shared shared;
    const int at = blockIdx.x, thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    // Whether this is the second launch.
    const bool again = histogram != nullptr;
    pdl_wait();
    pdl_launch();
    if (again && selected[at].state != NEEDS_HISTOGRAM) return;
    // Under way while the slot is looked up.
    const int chunks = (vocab + CHUNK - 1) / CHUNK;
    float maxima[HELD];
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        if (i * THREADS >= chunks) break;
        int chunk = i * THREADS + thread;
        maxima[i] = chunk < chunks ? all_chunk_max[(i64)at * chunks + chunk] : -INF;
    }
    stats += (i64)at * slices;
    if (warp == 1) {
        Stats s = row_stats(stats, slices);
        if (lane == 0) shared.all = s;
    }
    if (thread == 0) {
        shared.found = shared.listed = 0, shared.least = 0xffffffffu, shared.most = 0;
        shared.bucket = BUCKETS, shared.above = 0.0, shared.unsure = 0;
    }
    for (int i = thread; i < BUCKETS; i += THREADS) shared.chunks[i] = 0;
    const bool live = load_row(shared.row, at, 0, vocab, row_slots, positions, slots, aux, tail,
                               blocks, max_slots);
    const Slot &slot = shared.row.slot;
    const int code = live ? row_error(shared.all) : row_slots[at] < 0 ? PADDING : EMPTY_SLOT;
    if (code < 0) {
        if (thread == 0) selected[at] = {-INF, -INF, DONE, 0}, tokens[at] = code;
        return;
    }
    const Stats all = shared.all;
    const bool filters_p = slot.top_p < 1.f, filters_min = slot.ln_min_p > -1e300;
    const bool by_k = filters_k(slot, vocab), tries = filters_p && !by_k && !again;
    if (is_greedy(slot) || (tries && filters_min)) {
        const int state = is_greedy(slot) ? RACES : NEEDS_HISTOGRAM;
        if (thread == 0) selected[at] = {all.max, all.max, state, 0};
        return;
    }
    float threshold = -INF;
    if (filters_min) {
        if (warp == 0) {
            float t = min_p_threshold(all.max, (double)slot.temperature, slot.ln_min_p);
            if (lane == 0) shared.threshold = t;
        }
        __syncthreads();
        threshold = shared.threshold;
    }
    if (!(by_k || filters_p)) {
        if (thread == 0) selected[at] = {all.max, threshold, RACES, 0};
        return;
    }

    const elem *data = logits + at * stride;
    const Edits edits(shared.row, blocks, vocab);
    const double inverse = 1.0 / (double)slot.temperature;
    auto weight = [&](u32 key) {
        return exp_far(((double)float_of(key) - (double)all.max) * inverse);
    };

    // The border: up to it all logits matter, or, of the histogram's, those in it.
    const Nucleus nucleus(all, threshold, slot.temperature);
    const int k = by_k ? slot.top_k : min(TRIED, chunks);
    int border = BUCKETS - 1;
    double target = (double)k;
    bool gathered = again || k <= chunks;
    if (gathered) {
        // A chunk holds a logit as large as its maximum, so k of them bound the k-th largest logit.
        if (!again) {
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
                if (i * THREADS >= chunks) break;
                if (maxima[i] >= nucleus.floor) atomicAdd(&shared.chunks[nucleus.bucket(maxima[i])], 1);
            }
            if (tries && warp == 1) {
                double sum = 0.0;
                for (int i = lane; i < slices; i += 32) {
                    sum += (double)stats[i].sum * weight(key_of(stats[i].max));
                }
                sum = warp_total(sum);
                if (lane == 0) shared.total = sum;
            }
            __syncthreads();
        }
        // Thread i has buckets 2i and 2i + 1.
        double sums[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            int bucket = 2 * thread + j;
            if (!again) {
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
        if (again) target = (double)slot.top_p * total;
        double first = before + (upto - (sums[0] + sums[1]));
        double second = first + sums[0];
        int mine = sums[0] > 0.0 && second >= target             ? 2 * thread
                   : sums[1] > 0.0 && second + sums[1] >= target ? 2 * thread + 1
                                                                 : BUCKETS;
        mine = __reduce_min_sync(FULL_WARP, mine);
        if (lane == 0 && mine < BUCKETS) atomicMin(&shared.bucket, mine);
        __syncthreads();
        if (!again) {
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
        // Candidates lie within `reach` of `middle`, whose rounding is allowed for.
        const float width = 1.f / nucleus.scale, low = all.max - (float)(border + 1) * width;
        const float high = again ? low + width : all.max;
        const float lowest = border < BUCKETS - 1 ? low : fminf(low, nucleus.floor);
        // In halves: the sum of two floats may not be one.
        const float middle = 0.5f * lowest + 0.5f * high;
        const float reach = 0.5f * high - 0.5f * lowest + 4e-6f * (fabsf(all.max) + all.max - lowest);
        list(shared, maxima, chunks,
             [&](float max) { return max >= nucleus.floor && nucleus.bucket(max) <= border; });
        visit(shared, data, vocab, aligned, edits, [&](int token, const float(&x)[8]) {
            // Few are candidates: whether any of the eight is near is all that is asked of most.
            float nearest = INF;
#pragma unroll
            for (int i = 0; i < 8; ++i) nearest = fminf(nearest, fabsf(x[i] - middle));
            if (nearest > reach) return;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int bucket = nucleus.bucket(x[i]);
                if (!(x[i] >= nucleus.floor) || (again ? bucket != border : bucket > border)) continue;
                const int place = atomicAdd(&shared.found, 1);
                if (place < MOST) shared.keys[place] = key_of(x[i]);
                if (place < FEW) shared.tokens[place] = token + i;
            }
        });
        __syncthreads();
        found = shared.found;
        gathered = found <= MOST;
    }
    if (tries && !(gathered && found <= FEW)) {
        if (thread == 0) selected[at] = {all.max, threshold, NEEDS_HISTOGRAM, 0};
        return;
    }
    if (gathered && found <= FEW) {
        u32 key = thread < found ? shared.keys[thread] : 0;
        double w = thread < found ? weight(key) : 0.0;
        if (thread < FEW) shared.weights[thread] = w;
        if (found <= thread && thread < FEW) shared.keys[thread] = 0;
        __syncthreads();
        int larger = 0;
        double above = 0.0;
        if (thread < found) {
#pragma unroll 4
            for (int i = 0; i < found; ++i) {
                bool is_larger = shared.keys[i] > key;
                larger += is_larger;
                above += is_larger ? shared.weights[i] : 0.0;
            }
        }
        bool keeps = thread < found && (!by_k || larger < k);
        if (filters_p && !again) {
            double part = warp_total(keeps ? w : 0.0), total = 0.0;
            if (lane == 0) shared.scan[warp] = part;
            __syncthreads();
#pragma unroll
            for (int i = 0; i < FEW / 32; ++i) total += shared.scan[i];
            target = (double)slot.top_p * (tries ? shared.total : total);
            // Of all candidates together more than the target, and none of them in doubt?
            if (tries) {
                const double doubt = UNSURE * target;
                bool unsure = larger > 0 && fabs(above - target) <= doubt && thread < found;
                if (unsure || total <= target + doubt) shared.unsure = 1;
            }
        }
        if (filters_p) keeps = keeps && (above < target || larger == 0);
        u32 least = __reduce_min_sync(FULL_WARP, keeps ? key : 0xffffffffu);
        if (lane == 0 && warp * 32 < found) atomicMin(&shared.least, least);
        __syncthreads();
        if (!again) {
            if (shared.unsure) {
                if (thread == 0) selected[at] = {all.max, threshold, NEEDS_HISTOGRAM, 0};
                return;
            }
            const int token = race_few(shared, found, key, key >= shared.least ? w : 0.0);
            if (thread == 0) {
                // Never without one, since the largest logit is a candidate; but what follows writes there.
                const bool drawn = token != NO_TOKEN;
                selected[at] = {all.max, threshold, DONE, 0}, tokens[at] = drawn ? token : ALL_MASKED;
                if (drawn) keep_token(shared.row, token, blocks, tail, vocab);
            }
            return;
        }
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
        if (filters_p) {
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
            if (!(weighted ? filters_p : by_k)) continue;
            u32 low = key_of(fmaxf(threshold, nucleus.floor)), high = key_of(all.max);
            bool known = !weighted;
            target = (double)k;
#pragma unroll 1
            while (!known || low < high) {
                u32 key[3] = {low, low, low};
                if (known) divide(low, high, key);
                const float from[3] = {float_of(key[0]), float_of(key[1]), float_of(key[2])};
                double sum[3] = {0.0, 0.0, 0.0};
                int count[3] = {0, 0, 0};
                __syncthreads();
                if (thread == 0) shared.listed = 0;
                __syncthreads();
                list(shared, maxima, chunks, [&](float max) { return max >= from[0]; });
                if (weighted) {
                    visit(shared, data, vocab, aligned, edits, [&](int, const float(&x)[8]) {
                        float y[8];
#pragma unroll
                        for (int i = 0; i < 8; ++i) y[i] = x[i];
                        add_far((double)all.max, inverse, key, y, sum);
                    });
                } else {
                    visit(shared, data, vocab, aligned, edits, [&](int, const float(&x)[8]) {
#pragma unroll
                        for (int i = 0; i < 8; ++i) {
#pragma unroll
                            for (int j = 0; j < 3; ++j) count[j] += x[i] >= from[j];
                        }
                    });
#pragma unroll
                    for (int j = 0; j < 3; ++j) sum[j] = (double)count[j];
                }
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
    if (thread == 0) selected[at] = {all.max, threshold, RACES, 0};
}
