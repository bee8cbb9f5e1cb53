// The race (see crate `sampler`, noise.rs): of a row's groups of 64 tokens the one with the largest
// `ln(sum of exp((logit - max) / temperature)) + gumbel`, and of its tokens the one with the largest
// `(logit - max) / temperature + gumbel`.
//
// One pass over the logits finds the largest of each group. A group's sum is at least its largest
// weight and at most 64 times that, so with the group's random word its score has two bounds in
// float32, and a group whose upper one is below another's lower one has lost: of thousands some 64
// are left. Those are added up in float32, and what is still within rounding of the best, mostly
// one group, in float64.
//
// RACE=0: every row is greedy. RACE=1: rows are greedy or race without filters. RACE=2: logits
// below a threshold that `sample_select` found take no part, and `sample_scan` knows the groups'
// largest logits. Rows that `sample_select` could sample itself are done.
// Grid (any number, rows): a row's slices are shared among its thread blocks, and the last of them
// compares the winners of all blocks.

static const int WARPS = THREADS / 32;
static const int SLICE_GROUPS = SLICE / CHUNK;
/// Of the largest vocabulary.
static const int MOST_GROUPS = 8192;
/// Groups that are listed at a time, of which few are left.
static const int WINDOW = 2048;
static const float LN_CHUNK = 4.1588831f;

/// A block's winner.
struct Winner {
    /// Logarithm of its group's sum relative to `max`, and noise.
    double score;
    float max;
    int token, bad_raw, bad;
    int pad[2];
};
static_assert(sizeof(Winner) == 32, "allocated by sample.rs");
static const int MOST_WINNERS = MOST_GROUPS / SLICE_GROUPS;

/// In one trip to memory.
DEVICE Winner load_winner(const Winner *from) {
    union {
        Winner winner;
        int4 half[2];
    } to;
    to.half[0] = __ldcg((const int4 *)from), to.half[1] = __ldcg((const int4 *)from + 1);
    return to.winner;
}

/// What the bar is lowered by, so that no winner stays below it: covers the rounding of all that is
/// float32 below.
DEVICE float slack(float score) { return 1e-3f + 1e-6f * fabsf(score); }

/// A word's noise to within 1e-4.
DEVICE float noise_about(u32 word) {
    float u = ((float)word + 0.5f) * 2.3283064365386963e-10f;
    float rest = ((float)~word + 0.5f) * 2.3283064365386963e-10f; // 1 - u
    // -ln(1 - u), by its series where the approximate logarithm of almost 1 has no digits left.
    float e = u < 0.0078125f ? fmaf(0.5f * u, u, u) : -__logf(rest);
    return -__logf(e);
}

struct Block {
    Row row;
    float scratch[33];
    int bad_raw, bad, group;
    /// Some group has at least this score, as a key.
    u32 bar;
    /// Groups that may still win, of a window.
    int num_left;
    u16 left[WINDOW];
    double scores[WARPS];
    int tokens[WARPS];
    /// Of each group of this block the largest logit, then an upper bound of its score.
    float tops[MOST_GROUPS];
};

/// The largest score of a warp, and of equal ones the lowest token; in all lanes.
DEVICE void warp_best(double &score, int &token) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) {
        double other = __shfl_xor_sync(FULL_WARP, score, d);
        int other_token = __shfl_xor_sync(FULL_WARP, token, d);
        if (other > score || (other == score && other_token < token)) score = other, token = other_token;
    }
}

/// The result of a row from its blocks' winners; one warp, when all are there.
DEVICE void finish(const Row &row, int at, const Winner *winners, int count, const u64 *blocks,
                   int *tail, int vocab, int *tokens) {
    int lane = threadIdx.x % 32;
    Winner mine[MOST_WINNERS / 32];
    Stats all = {-INF, INF, NO_TOKEN, NO_TOKEN, 0.f};
#pragma unroll
    for (int i = 0; i < MOST_WINNERS / 32; ++i) {
        mine[i] = {-INF, -INF, NO_TOKEN, NO_TOKEN, NO_TOKEN};
        if (i * 32 + lane < count) mine[i] = load_winner(winners + i * 32 + lane);
        all.max = fmaxf(all.max, mine[i].max);
        all.bad_raw = min(all.bad_raw, mine[i].bad_raw);
        all.bad = min(all.bad, mine[i].bad);
    }
    all.max = warp_max(all.max);
    all.bad_raw = __reduce_min_sync(FULL_WARP, all.bad_raw);
    all.bad = __reduce_min_sync(FULL_WARP, all.bad);
    double best = -INF;
    int who = NO_TOKEN;
#pragma unroll
    for (int i = 0; i < MOST_WINNERS / 32; ++i) {
        if (mine[i].token == NO_TOKEN) continue;
        double score = (double)mine[i].max;
        if (!is_greedy(row.slot)) {
            score = (score - (double)all.max) / (double)row.slot.temperature + mine[i].score;
        }
        if (score > best || (score == best && mine[i].token < who)) best = score, who = mine[i].token;
    }
    warp_best(best, who);
    if (lane != 0) return;
    int code = row_error(all);
    if (code == 0 && who == NO_TOKEN) code = ALL_MASKED;
    tokens[at] = code < 0 ? code : who;
    if (code < 0) return;
    keep_token(row, who, blocks, tail, vocab);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    sample_race(INPUTS, TABLES, int slices, const float *chunk_max, const Selected *selected,
                Winner *winners, u32 *counters, int *tokens) {
    __shared__ Block block;
    const int at = blockIdx.y, thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int each = (slices + gridDim.x - 1) / gridDim.x;
    const int begin = blockIdx.x * each, end = min(begin + each, slices); // this block's slices
    const int chunks = (vocab + CHUNK - 1) / CHUNK;
    const int first_group = begin * SLICE_GROUPS;
    const int groups = min(end * SLICE_GROUPS, chunks) - first_group;
    float *tops = block.tops;
    pdl_wait();
    pdl_launch();
    Row &row = block.row;
    if (thread == 0) block.bad_raw = block.bad = block.group = NO_TOKEN;
    const elem *data = logits + at * stride;
    float threshold = -INF;
    // What does not depend on the slot is under way while that is looked up, and the next slice's
    // logits while this one's are worked on.
    Eight next[2];
    auto fetch = [&](int slice) {
#pragma unroll
        for (int g = 0; g < 2; ++g) {
            int token = slice * SLICE + g * (SLICE / 2) + thread * 8;
            next[g].load(data, token < vocab ? vocab : 0, aligned, token);
        }
    };
    if (RACE < 2) {
        if (begin < end) fetch(begin);
    } else {
        if (selected[at].state == DONE) return;
        threshold = selected[at].threshold;
    }
    if (!load_row(row, at, begin * SLICE, end * SLICE, row_slots, positions, slots, aux, tail,
                  blocks, max_slots)) {
        if (blockIdx.x == 0 && thread == 0) tokens[at] = row.id;
        return;
    }
    Edits edits(row, blocks, vocab);
    const bool edited = edits.any(row), greedy = RACE == 0 || is_greedy(row.slot);
    const u32 key[2] = {row.slot.key[0], row.slot.key[1]}, position = (u32)row.position;

    float most = -INF; // of this thread's logits
    if (RACE < 2) {
#pragma unroll 1
        for (int slice = begin; slice < end; ++slice) {
            float x[2][8];
            next[0].get(x[0]), next[1].get(x[1]);
            if (slice + 1 < end) fetch(slice + 1);
#pragma unroll
            for (int g = 0; g < 2; ++g) {
                const int token = slice * SLICE + g * (SLICE / 2) + thread * 8;
                float here = -INF;
                if (token < vocab) {
                    auto check = [&](int *place) {
                        // Anything times 0 is 0, but for NaN and infinities.
                        float zero = 0.f;
#pragma unroll
                        for (int i = 0; i < 8; ++i) zero = fmaf(x[g][i], 0.f, zero);
                        if (zero == 0.f) return;
                        int bad = first_bad(x[g], token);
                        if (bad != NO_TOKEN) atomicMin(place, bad);
                    };
                    check(&block.bad_raw);
                    if (edited) {
                        edits.apply(row, token, x[g]);
                        check(&block.bad);
                    }
#pragma unroll
                    for (int i = 0; i < 8; ++i) here = fmaxf(here, x[g][i]);
                    most = fmaxf(most, here);
                }
#pragma unroll
                for (int d = 1; d < 8; d *= 2) here = fmaxf(here, __shfl_xor_sync(FULL_WARP, here, d));
                if (lane % 8 == 0 && token < vocab) tops[token / CHUNK - first_group] = here;
            }
        }
    } else {
        for (int i = thread; i < groups; i += THREADS) {
            float top = chunk_max[(i64)at * chunks + first_group + i];
            tops[i] = top >= threshold ? top : -INF;
            most = fmaxf(most, tops[i]);
        }
    }
    const float base = block_max(most, block.scratch);

    // Eight logits of a group; a group is eight lanes'.
    auto read = [&](int group, float (&x)[8]) {
        const int token = (first_group + group) * CHUNK + lane % 8 * 8;
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = -INF;
        if (token >= vocab) return;
        load8(data, vocab, aligned, token, x);
        if (edited) edits.apply(row, token, x);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (RACE == 2 && !(x[i] >= threshold)) x[i] = -INF;
        }
    };
    // Two logits of a group, which is a warp's, from token `first_of` on.
    auto first_of = [&](int group) { return (first_group + group) * CHUNK + lane % 8 * 8 + lane / 8 * 2; };
    auto read_two = [&](int group, float (&two)[2]) {
        float x[8];
        read(group, x);
        two[0] = x[0], two[1] = x[1];
#pragma unroll
        for (int i = 1; i < 4; ++i) {
            if (lane / 8 == i) two[0] = x[2 * i], two[1] = x[2 * i + 1];
        }
    };
    auto word_of_group = [&](int group) {
        u32 words[4], word;
        philox((u32)(first_group + group) / 4, position, 1, key[0], key[1], words);
        word = words[0];
#pragma unroll
        for (int i = 1; i < 4; ++i) {
            if (group % 4 == i) word = words[i];
        }
        return word;
    };
    const double temperature = greedy ? 1.0 : (double)row.slot.temperature;
    auto exponent = [&](float logit) { return ((double)logit - (double)base) / temperature; };

    double score = -INF;
    int token = NO_TOKEN;
    if (greedy) {
        int group = NO_TOKEN;
        for (int i = thread; i < groups; i += THREADS) {
            if (tops[i] == base && base > -INF) group = min(group, i);
        }
        group = __reduce_min_sync(FULL_WARP, group);
        if (lane == 0 && group != NO_TOKEN) atomicMin(&block.group, group);
        __syncthreads();
        group = block.group;
        if (warp == 0 && group != NO_TOKEN) {
            float two[2];
            read_two(group, two);
            const int first = first_of(group);
            token = __reduce_min_sync(FULL_WARP, two[0] == base   ? first
                                                 : two[1] == base ? first + 1
                                                                  : NO_TOKEN);
        }
    } else if (base > -INF) {
        const float inverse = 1.f / row.slot.temperature;
        float lower = -INF;
        for (int first = thread * 4; first < groups; first += THREADS * 4) {
            u32 words[4];
            philox((u32)(first_group + first) / 4, position, 1, key[0], key[1], words);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (first + i >= groups || tops[first + i] == -INF) continue;
                float least = (tops[first + i] - base) * inverse + noise_about(words[i]);
                lower = fmaxf(lower, least);
                tops[first + i] = least + LN_CHUNK + slack(least);
            }
        }
        lower = block_max(lower, block.scratch);
        if (thread == 0) block.bar = key_of(lower - slack(lower)), block.num_left = 0;
        __syncthreads();

#pragma unroll 1
        for (int window = 0; window < groups; window += WINDOW) {
            const int end = min(window + WINDOW, groups);
            // Listed, so that all warps have as much to do.
            float bar = float_of(block.bar);
#pragma unroll 1
            for (int i = window + thread; i - lane < end; i += THREADS) {
                const bool stays = i < end && tops[i] >= bar;
                const u32 who = __ballot_sync(FULL_WARP, stays);
                int to = 0;
                if (lane == 0 && who != 0) to = atomicAdd(&block.num_left, __popc(who));
                to = __shfl_sync(FULL_WARP, to, 0) + __popc(who & ((1u << lane) - 1));
                if (stays) block.left[to] = (u16)i;
            }
            __syncthreads();
            const int num_left = block.num_left;
            // Four at a time, by eight lanes each.
#pragma unroll 1
            for (int from = warp * 4; from < num_left; from += WARPS * 4) {
                const int mine = from + lane / 8 < num_left ? block.left[from + lane / 8] : -1;
                const float noise = noise_about(word_of_group(mine));
                float sum = 0.f;
                if (mine >= 0) {
                    float x[8];
                    read(mine, x);
#pragma unroll
                    for (int i = 0; i < 8; ++i) sum += exp2_fast((x[i] - base) * inverse * 1.4426950408889634f);
                }
#pragma unroll
                for (int d = 1; d < 8; d *= 2) sum += __shfl_xor_sync(FULL_WARP, sum, d);
                if (mine >= 0 && lane % 8 == 0) {
                    float about = __logf(sum) + noise;
                    tops[mine] = about + slack(about);
                    atomicMax(&block.bar, key_of(about - slack(about)));
                }
            }
            __syncthreads();
            if (thread == 0) block.num_left = 0;
            bar = float_of(block.bar);
#pragma unroll 1
            for (int i = warp; i < num_left; i += WARPS) {
                const int mine = block.left[i];
                if (!(tops[mine] >= bar)) continue;
                float two[2];
                read_two(mine, two);
                const double e[2] = {exponent(two[0]), exponent(two[1])};
                double sum = exp(e[0]) + exp(e[1]);
#pragma unroll
                for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, d);
                const double here = log(sum) + gumbel(word_of_group(mine));
                // Its token, at once: the one does not wait for the other.
                const int first = first_of(mine);
                u32 words[4];
                philox((u32)first / 4, position, 0, key[0], key[1], words);
                double best = -INF;
                int who = NO_TOKEN;
#pragma unroll
                for (int t = 0; t < 2; ++t) {
                    double of = e[t] + gumbel(first % 4 == 0 ? words[t] : words[2 + t]);
                    if (of > best) best = of, who = first + t;
                }
                warp_best(best, who);
                if (here > score || (here == score && who < token)) score = here, token = who;
            }
            __syncthreads();
        }
        if (lane == 0) block.scores[warp] = score, block.tokens[warp] = token;
        __syncthreads();
        score = lane < WARPS ? block.scores[lane] : -INF;
        token = lane < WARPS ? block.tokens[lane] : NO_TOKEN;
        warp_best(score, token);
    }
    if (warp != 0) return;

    u32 last = 0;
    if (lane == 0) {
        winners[(i64)at * slices + blockIdx.x] = {score, base, token, block.bad_raw, block.bad};
        last = add_acq_rel(&counters[at], 1u) == gridDim.x - 1;
    }
    last = __shfl_sync(FULL_WARP, last, 0);
    if (!last) return;
    __syncwarp();
    finish(row, at, winners + (i64)at * slices, gridDim.x, blocks, tail, vocab, tokens);
    if (lane == 0) counters[at] = 0;
}
