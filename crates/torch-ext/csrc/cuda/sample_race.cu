// The race (see crate `sampler`, race.rs): of a row's logits the one with the largest
// `(logit - max) / temperature + gumbel`, without computing the noise exactly for most.
//
// RACE=0: every row is greedy. RACE=1: rows are greedy or race without filters. RACE=2: logits
// below a threshold that `sample_select` found take no part.
// Grid (any number, rows): a row's slices are shared among its thread blocks, and the last of them
// compares the winners of all slices.

/// A slice's winner.
struct Winner {
    double noise;
    float max, logit;
    int token, bad_raw, bad;
    int pad;
};

/// Covers the rounding of everything that is float32 below (all terms are below 30).
static const float SLACK = 1e-3f;

/// An upper bound of a word's noise: g <= -ln(u), and a float's bits are a piecewise linear
/// logarithm that is never above the true one.
DEVICE float noise_bound(u32 word) {
    int bits = (int)__float_as_uint(__int2float_rz((int)(word >> 1)));
    return (float)(0x4F000000 - bits) * (0.693147180559945f / 8388608.f);
}

/// A word's noise in float32.
DEVICE float noise_about(u32 word) {
    float e = word < 0x80000000u ? -log1pf(-((float)word + 0.5f) * 2.3283064365386963e-10f)
                                 : -logf(((float)~word + 0.5f) * 2.3283064365386963e-10f);
    return -logf(e);
}

struct Block {
    Row row;
    float scratch[33];
    int token, bad_raw, bad;
    double scores[THREADS / 32];
    int tokens[THREADS / 32];
    float logit;
    double noise;
};

/// Winner of a slice by `scores`; in shared memory.
DEVICE void decide(Block &block, double score, int token, float logit, double noise) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    double best = score;
    int who = token;
#pragma unroll
    for (int d = 16; d > 0; d /= 2) {
        double other = __shfl_xor_sync(FULL_WARP, best, d);
        int other_who = __shfl_xor_sync(FULL_WARP, who, d);
        if (other > best || (other == best && other_who < who)) best = other, who = other_who;
    }
    if (lane == 0) block.scores[warp] = best, block.tokens[warp] = who;
    __syncthreads();
    best = block.scores[0], who = block.tokens[0];
    for (int i = 1; i < THREADS / 32; ++i) {
        double other = block.scores[i];
        int other_who = block.tokens[i];
        if (other > best || (other == best && other_who < who)) best = other, who = other_who;
    }
    if (token == who && token != NO_TOKEN) {
        block.token = token;
        block.logit = logit;
        block.noise = noise;
    }
    __syncthreads();
}

/// The result of a row from its slices' winners; one warp, when all are there.
DEVICE void finish(const Row &row, int at, const Winner *winners, int slices, const u64 *blocks,
                   int *tail, int vocab, int *tokens) {
    int lane = threadIdx.x % 32;
    Stats all = {-INF, INF, NO_TOKEN, NO_TOKEN};
    for (int i = lane; i < slices; i += 32) {
        all.max = fmaxf(all.max, __ldcg(&winners[i].max));
        all.bad_raw = min(all.bad_raw, __ldcg(&winners[i].bad_raw));
        all.bad = min(all.bad, __ldcg(&winners[i].bad));
    }
    all.max = warp_max(all.max);
    all.bad_raw = __reduce_min_sync(FULL_WARP, all.bad_raw);
    all.bad = __reduce_min_sync(FULL_WARP, all.bad);
    double best = -INF;
    int who = NO_TOKEN;
    for (int i = lane; i < slices; i += 32) {
        int token = __ldcg(&winners[i].token);
        if (token == NO_TOKEN) continue;
        double score = (double)__ldcg(&winners[i].logit);
        if (!is_greedy(row.slot)) {
            score = (score - (double)all.max) / (double)row.slot.temperature;
            score += __ldcg(&winners[i].noise);
        }
        if (score > best || (score == best && token < who)) best = score, who = token;
    }
#pragma unroll
    for (int d = 16; d > 0; d /= 2) {
        double other = __shfl_xor_sync(FULL_WARP, best, d);
        int other_who = __shfl_xor_sync(FULL_WARP, who, d);
        if (other > best || (other == best && other_who < who)) best = other, who = other_who;
    }
    if (lane != 0) return;
    int code = row_error(all);
    if (code == 0 && who == NO_TOKEN) code = ALL_MASKED;
    tokens[at] = code < 0 ? code : who;
    if (code < 0) return;
    // The token belongs to the sequence now.
    if (row.slot.counts_row >= 0) dense_row(blocks, row.slot.counts_row, vocab)[who] += 1;
    tail[(i64)row.id * TAIL + (row.position & (TAIL - 1))] = who;
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    sample_race(INPUTS, TABLES, int slices, const float *chunk_max, const Selected *selected,
                Winner *winners, u32 *counters, int *tokens) {
    __shared__ Block block;
    int at = blockIdx.y, thread = threadIdx.x;
    // This block's slices. Each has a winner of its own, so how many a block has changes nothing.
    int each = (slices + gridDim.x - 1) / gridDim.x;
    int slice = blockIdx.x * each, end = min(slice + each, slices);
    pdl_wait();
    pdl_launch();
    Row &row = block.row;
    if (thread == 0) block.bad_raw = block.bad = NO_TOKEN;
    const elem *data = logits + at * stride;
    float threshold = -INF;
    int code = 0;
    // What does not depend on the slot is under way while that is looked up, and the next slice's
    // logits while this one's are worked on.
    float next[2][8];
    auto fetch = [&](int slice) {
#pragma unroll
        for (int g = 0; g < 2; ++g) {
            int token = slice * SLICE + g * (SLICE / 2) + thread * 8;
#pragma unroll
            for (int i = 0; i < 8; ++i) next[g][i] = -INF;
            if (token >= vocab) continue;
            if (RACE == 2) {
                i64 chunks = (vocab + CHUNK - 1) / CHUNK;
                if (!(chunk_max[at * chunks + token / CHUNK] >= threshold)) continue;
            }
            load8(data, vocab, aligned, token, next[g]);
        }
    };
    if (RACE < 2) {
        if (slice < end) fetch(slice);
    } else {
        code = selected[at].code, threshold = selected[at].threshold;
    }
    if (!load_row(row, at, slice * SLICE, end * SLICE, row_slots, positions, slots, aux, tail,
                  blocks, max_slots)) {
        if (blockIdx.x == 0 && thread == 0) tokens[at] = row.id;
        return;
    }
    if (code < 0) {
        if (blockIdx.x == 0 && thread == 0) tokens[at] = code;
        return;
    }
    if (RACE == 2 && slice < end) fetch(slice);
    Edits edits(row, blocks, vocab);
    bool edited = edits.any(row);

    for (; slice < end; ++slice) {
        int first = slice * SLICE;
        float x[2][8];
#pragma unroll
        for (int g = 0; g < 2; ++g) {
#pragma unroll
            for (int i = 0; i < 8; ++i) x[g][i] = next[g][i];
        }
        if (slice + 1 < end) fetch(slice + 1);
        if (thread == 0) block.token = NO_TOKEN, block.logit = -INF, block.noise = 0.0;
        float most = -INF;
#pragma unroll
        for (int g = 0; g < 2; ++g) {
            int token = first + g * (SLICE / 2) + thread * 8;
            if (token >= vocab) continue;
            auto check = [&](int *place) {
                int bad = first_bad(x[g], token);
                if (bad != NO_TOKEN) atomicMin(place, bad);
            };
            if (RACE < 2) check(&block.bad_raw);
            if (edited) {
                edits.apply(row, token, x[g]);
                if (RACE < 2) check(&block.bad);
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (RACE == 2 && !(x[g][i] >= threshold)) x[g][i] = -INF;
                most = fmaxf(most, x[g][i]);
            }
        }
        float max = block_max(most, block.scratch);

        if (max > -INF && (RACE == 0 || is_greedy(row.slot))) {
            int mine = NO_TOKEN;
#pragma unroll
            for (int g = 1; g >= 0; --g) {
#pragma unroll
                for (int i = 7; i >= 0; --i) {
                    if (x[g][i] == max) mine = first + g * (SLICE / 2) + thread * 8 + i;
                }
            }
            mine = __reduce_min_sync(FULL_WARP, mine);
            if (thread % 32 == 0 && mine != NO_TOKEN) atomicMin(&block.token, mine);
            if (thread == 0) block.logit = max, block.noise = 0.0;
            __syncthreads();
        }
        if (RACE > 0 && max > -INF && !is_greedy(row.slot)) {
            u32 key0 = row.slot.key[0], key1 = row.slot.key[1], position = (u32)row.position;
            double temperature = (double)row.slot.temperature;
            float inverse = (float)(1.0 / temperature);
            // No noise is above 22.9 and none is below -3.2: what lies deeper loses to `max`.
            float hopeless = -26.2f * row.slot.temperature;
            float bounds[2][8], top = -INF, top_scaled = 0.f;
            u32 top_word = 0;
#pragma unroll
            for (int g = 0; g < 2; ++g) {
                int token = first + g * (SLICE / 2) + thread * 8;
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    float *part = &x[g][4 * h], *bound = &bounds[g][4 * h];
                    float best = fmaxf(fmaxf(part[0], part[1]), fmaxf(part[2], part[3]));
                    if (best - max >= hopeless) {
                        u32 words[4];
                        philox((u32)(token / 4 + h), position, key0, key1, words);
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            float scaled = (part[i] - max) * inverse;
                            bound[i] = scaled + noise_bound(words[i]);
                            if (bound[i] > top) {
                                top = bound[i], top_scaled = scaled, top_word = words[i];
                            }
                        }
                    } else {
#pragma unroll
                        for (int i = 0; i < 4; ++i) bound[i] = -INF;
                    }
                }
            }
            float about = top > -INF ? top_scaled + noise_about(top_word) : -INF;
            float bar = block_max(about, block.scratch) - SLACK;

            double score = -INF, noise = 0.0;
            int winner = NO_TOKEN;
            float logit = -INF;
            if (top >= bar) {
                u32 left = 0;
#pragma unroll
                for (int i = 0; i < 16; ++i) {
                    if (bounds[i / 8][i % 8] >= bar && bounds[i / 8][i % 8] > -INF) left |= 1u << i;
                }
                while (left) {
                    int j = __ffs((int)left) - 1;
                    left &= left - 1;
                    float value = 0.f;
#pragma unroll
                    for (int i = 0; i < 16; ++i) {
                        if (i == j) value = x[i / 8][i % 8];
                    }
                    int token = first + j / 8 * (SLICE / 2) + thread * 8 + j % 8;
                    u32 words[4];
                    philox((u32)token / 4, position, key0, key1, words);
                    u32 word = words[0];
#pragma unroll
                    for (int i = 1; i < 4; ++i) {
                        if (i == j % 4) word = words[i];
                    }
                    double n = gumbel(word);
                    double s = ((double)value - (double)max) / temperature + n;
                    if (s > score) score = s, winner = token, logit = value, noise = n;
                }
            }
            decide(block, score, winner, logit, noise);
        }

        if (thread == 0) {
            Winner *w = winners + (i64)at * slices + slice;
            w->noise = block.noise;
            w->max = max;
            w->logit = block.logit;
            w->token = block.token;
            w->bad_raw = w->bad = NO_TOKEN;
        }
    }

    __syncthreads();
    u32 last = 0;
    if (thread == 0) {
        // Of all this block's slices: only the row's first counts.
        if (block.bad_raw != NO_TOKEN || block.bad != NO_TOKEN) {
            Winner *w = winners + (i64)at * slices + end - 1;
            w->bad_raw = block.bad_raw, w->bad = block.bad;
        }
        __threadfence();
        last = atomicAdd(&counters[at], 1u) == gridDim.x - 1;
    }
    if (thread >= 32) return;
    last = __shfl_sync(FULL_WARP, last, 0);
    if (!last) return;
    __threadfence();
    finish(row, at, winners + (i64)at * slices, slices, blocks, tail, vocab, tokens);
    if (thread == 0) counters[at] = 0;
}
