// The race (see crate `sampler`, race.rs): of a row's logits the one with the largest
// `(logit - max) / temperature + gumbel`, without computing the noise exactly for most.
//
// A word `w` of the generator is uniform, u = (w + 0.5) / 2^32, and its noise at most -ln(u). So a
// logit can only beat a score `bar` if its word is below a limit that four logits get with one
// exponential, from the largest of them; then what a logit costs is its word. Few pass. Those are
// compared in float32, raise the bar, and are put on a list; at the end those on it that are not
// below the bar are compared exactly. Threads do not wait for one another meanwhile.
//
// RACE=0: every row is greedy. RACE=1: rows are greedy or race without filters. RACE=2: logits
// below a threshold that `sample_select` found take no part.
// Grid (any number, rows): a row's slices are shared among its thread blocks, and the last of them
// compares the winners of all blocks. LIST: how many candidates of a block are remembered.
#ifndef LIST
#define LIST 1024
#endif

/// A block's winner.
struct Winner {
    double noise;
    float max, logit;
    int token, bad_raw, bad;
    int pad;
};

/// What the bar is lowered by, so that no winner stays below it: covers the rounding of all that is
/// float32 below.
DEVICE float slack(float score) { return 1e-3f + 1e-6f * fabsf(score); }

/// A word's noise in float32.
DEVICE float noise_about(u32 word) {
    float e = word < 0x80000000u ? -log1pf(-((float)word + 0.5f) * 2.3283064365386963e-10f)
                                 : -logf(((float)~word + 0.5f) * 2.3283064365386963e-10f);
    return -logf(e);
}

/// Words above this have less noise than `noise`.
DEVICE u32 word_limit(float noise) {
    float u = exp2_fast(fmaf(noise, -1.4426950408889634f, 32.f));
    return __float2uint_ru(u * 1.0001f); // saturates
}

struct Block {
    Row row;
    float scratch[33];
    int token, bad_raw, bad;
    double scores[THREADS / 32];
    int tokens[THREADS / 32];
    float logit;
    double noise;
    /// The bar as a key, and candidates.
    u32 bar;
    int found;
    int listed[LIST];
    float logits[LIST];
};

/// Winner of a block by `scores`; in shared memory.
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

/// The result of a row from its blocks' winners; one warp, when all are there.
DEVICE void finish(const Row &row, int at, const Winner *winners, int count, const u64 *blocks,
                   int *tail, int vocab, int *tokens) {
    int lane = threadIdx.x % 32;
    Stats all = {-INF, INF, NO_TOKEN, NO_TOKEN};
    for (int i = lane; i < count; i += 32) {
        all.max = fmaxf(all.max, __ldcg(&winners[i].max));
        all.bad_raw = min(all.bad_raw, __ldcg(&winners[i].bad_raw));
        all.bad = min(all.bad, __ldcg(&winners[i].bad));
    }
    all.max = warp_max(all.max);
    all.bad_raw = __reduce_min_sync(FULL_WARP, all.bad_raw);
    all.bad = __reduce_min_sync(FULL_WARP, all.bad);
    double best = -INF;
    int who = NO_TOKEN;
    for (int i = lane; i < count; i += 32) {
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

/// The word of one token.
DEVICE u32 word_of(int token, u32 position, const u32 (&key)[2]) {
    u32 words[4];
    philox((u32)token / 4, position, key[0], key[1], words);
    u32 word = words[0];
#pragma unroll
    for (int i = 1; i < 4; ++i) {
        if (i == token % 4) word = words[i];
    }
    return word;
}

/// Eight logits on their way from memory, in as few registers as they need.
struct Eight {
#if defined(T_FLOAT)
    float x[8];
    DEVICE void load(const elem *row, int vocab, int aligned, int token) { load8(row, vocab, aligned, token, x); }
    DEVICE void get(float (&to)[8]) const {
#pragma unroll
        for (int i = 0; i < 8; ++i) to[i] = x[i];
    }
#else
    Vec16 x;
    DEVICE void load(const elem *row, int vocab, int aligned, int token) {
        if (aligned && token + 8 <= vocab) {
            x = load16(row + token);
        } else {
            float wide[8];
            load8(row, vocab, 0, token, wide);
            x = pack8<elem>(wide);
        }
    }
    DEVICE void get(float (&to)[8]) const { unpack8<elem>(x, to); }
#endif
};

/// A thread has four quads of a slice: their first tokens, and their logits.
DEVICE int token_of(int first, int quad) { return first + quad / 2 * (SLICE / 2) + quad % 2 * 4; }
DEVICE void pick(const float (&x)[2][8], int quad, float (&four)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        four[i] = x[0][i];
#pragma unroll
        for (int q = 1; q < 4; ++q) {
            if (quad == q) four[i] = x[q / 2][q % 2 * 4 + i];
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    sample_race(INPUTS, TABLES, int slices, const float *chunk_max, const Selected *selected,
                Winner *winners, u32 *counters, int *tokens) {
    __shared__ Block block;
    const int at = blockIdx.y, thread = threadIdx.x, lane = thread % 32;
    const int each = (slices + gridDim.x - 1) / gridDim.x;
    const int begin = blockIdx.x * each, end = min(begin + each, slices); // this block's slices
    pdl_wait();
    pdl_launch();
    Row &row = block.row;
    if (thread == 0) {
        block.bad_raw = block.bad = block.token = NO_TOKEN;
        block.logit = -INF, block.noise = 0.0;
        block.bar = key_of(-INF), block.found = 0;
    }
    const elem *data = logits + at * stride;
    float threshold = -INF;
    int code = 0;
    // What does not depend on the slot is under way while that is looked up, and the next slice's
    // logits while this one's are worked on.
    Eight next[2];
    auto fetch = [&](int slice) {
#pragma unroll
        for (int g = 0; g < 2; ++g) {
            int token = slice * SLICE + g * (SLICE / 2) + thread * 8;
            bool wanted = token < vocab;
            if (RACE == 2) {
                i64 chunks = (vocab + CHUNK - 1) / CHUNK;
                wanted = wanted && chunk_max[at * chunks + token / CHUNK] >= threshold;
            }
            next[g].load(data, wanted ? vocab : 0, aligned, token);
        }
    };
    // The largest logit that may take part, or one that is not far below it; -inf: none was seen.
    float base = -INF;
    if (RACE < 2) {
        if (begin < end) fetch(begin);
    } else {
        code = selected[at].code, threshold = selected[at].threshold, base = selected[at].max;
    }
    if (!load_row(row, at, begin * SLICE, end * SLICE, row_slots, positions, slots, aux, tail,
                  blocks, max_slots)) {
        if (blockIdx.x == 0 && thread == 0) tokens[at] = row.id;
        return;
    }
    if (code < 0) {
        if (blockIdx.x == 0 && thread == 0) tokens[at] = code;
        return;
    }
    if (RACE == 2 && begin < end) fetch(begin);
    Edits edits(row, blocks, vocab);
    const bool edited = edits.any(row), greedy = RACE == 0 || is_greedy(row.slot);
    const u32 key[2] = {row.slot.key[0], row.slot.key[1]}, position = (u32)row.position;
    const float inverse = greedy ? 1.f : (float)(1.0 / (double)row.slot.temperature);

    float most = -INF; // of this thread's logits, and the first token that has it
    int first_most = NO_TOKEN;
    float bar = -INF;  // some token has at least this score
    bool warm = false; // whether it is above -inf

    // If the list overflows, once more with the bar as it is then: few are within its slack.
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
        if (pass == 1 && begin < end) fetch(begin);
#pragma unroll 1
        for (int slice = begin; slice < end; ++slice) {
            const int first = slice * SLICE + thread * 8;
            float x[2][8], quads[4]; // the largest of every four
            next[0].get(x[0]), next[1].get(x[1]);
            if (slice + 1 < end) fetch(slice + 1);
#pragma unroll
            for (int g = 0; g < 2; ++g) {
                const int token = first + g * (SLICE / 2);
                quads[2 * g] = quads[2 * g + 1] = -INF;
                if (token >= vocab) continue;
                auto check = [&](int *place) {
                    // Anything times 0 is 0, but for NaN and infinities.
                    float zero = 0.f;
#pragma unroll
                    for (int i = 0; i < 8; ++i) zero = fmaf(x[g][i], 0.f, zero);
                    if (zero == 0.f) return;
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
                    if (greedy) {
                        if (x[g][i] > most) most = x[g][i], first_most = token + i;
                    } else {
                        quads[2 * g + i / 4] = fmaxf(quads[2 * g + i / 4], x[g][i]);
                    }
                }
            }
            if (RACE == 0 || greedy) continue;
            float here = fmaxf(fmaxf(quads[0], quads[1]), fmaxf(quads[2], quads[3]));
            most = fmaxf(most, here);

            // All threads together until there is something to compare with.
            if (base == -INF) {
                base = block_max(here, block.scratch);
                if (base == -INF) continue;
            }
            u32 bar_key = 0;
            if (lane == 0) bar_key = atomicMax(&block.bar, 0u);
            bar = fmaxf(bar, float_of(__shfl_sync(FULL_WARP, bar_key, 0)));
            if (!warm) {
                // Its best four each.
                float about = -INF;
                if (here > -INF) {
                    int group = 3;
#pragma unroll
                    for (int q = 2; q >= 0; --q) {
                        if (quads[q] == here) group = q;
                    }
                    float four[4];
                    pick(x, group, four);
                    u32 words[4];
                    philox((u32)token_of(first, group) / 4, position, key[0], key[1], words);
#pragma unroll
                    for (int i = 0; i < 4; ++i) about = fmaxf(about, (four[i] - base) * inverse + noise_about(words[i]));
                }
                about = block_max(about, block.scratch);
                bar = about - slack(about);
                warm = about > -INF;
                if (thread == 0 && warm) atomicMax(&block.bar, key_of(bar));
            }
            // No noise is above 22.9 and none is below -3.2: what lies deeper loses to `base`.
            const float least = fmaxf(-26.2f, bar - 23.f);
            u32 left = 0; // quads of which one may win
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                const float best = (quads[q] - base) * inverse;
                if (!(best >= least)) continue;
                u32 words[4];
                philox((u32)token_of(first, q) / 4, position, key[0], key[1], words);
                u32 lowest = min(min(words[0], words[1]), min(words[2], words[3]));
                if (lowest <= word_limit(bar - best)) left |= 1u << q;
            }
#pragma unroll 1
            for (; left != 0; left &= left - 1) {
                const int q = __ffs((int)left) - 1, token = token_of(first, q);
                float four[4];
                pick(x, q, four);
                u32 words[4];
                philox((u32)token / 4, position, key[0], key[1], words);
#pragma unroll 1
                for (int i = 0; i < 4; ++i) {
                    float logit = four[0];
                    u32 word = words[0];
#pragma unroll
                    for (int j = 1; j < 4; ++j) {
                        if (i == j) logit = four[j], word = words[j];
                    }
                    float about = (logit - base) * inverse + noise_about(word);
                    if (!(about >= bar) || about == -INF) continue;
                    int place = atomicAdd(&block.found, 1);
                    if (place < LIST) block.listed[place] = token + i, block.logits[place] = logit;
                    float higher = about - slack(about);
                    if (higher > bar) {
                        bar = higher;
                        atomicMax(&block.bar, key_of(bar));
                    }
                }
            }
        }
        __syncthreads();
        if (RACE == 0 || block.found <= LIST || pass == 1) break;
        __syncthreads();
        if (thread == 0) block.found = 0;
        __syncthreads();
    }

    float max = block_max(most, block.scratch);
    if (RACE == 0 || greedy) {
        int mine = most == max && max > -INF ? first_most : NO_TOKEN;
        mine = __reduce_min_sync(FULL_WARP, mine);
        if (lane == 0 && mine != NO_TOKEN) atomicMin(&block.token, mine);
        if (thread == 0) block.logit = max;
        __syncthreads();
    } else {
        const double temperature = (double)row.slot.temperature;
        const int count = min(block.found, LIST);
        double score = -INF, noise = 0.0;
        int winner = NO_TOKEN;
        float winner_logit = -INF;
#pragma unroll 1
        for (int i = thread; i < count; i += THREADS) {
            const int token = block.listed[i];
            const float logit = block.logits[i];
            double n = gumbel(word_of(token, position, key));
            double s = ((double)logit - (double)base) / temperature + n;
            if (s > score || (s == score && token < winner)) {
                score = s, winner = token, winner_logit = logit, noise = n;
            }
        }
        decide(block, score, winner, winner_logit, noise);
    }

    u32 last = 0;
    if (thread == 0) {
        Winner *w = winners + (i64)at * slices + blockIdx.x;
        w->noise = block.noise;
        w->max = max;
        w->logit = block.logit;
        w->token = block.token;
        w->bad_raw = block.bad_raw, w->bad = block.bad;
        __threadfence();
        last = atomicAdd(&counters[at], 1u) == gridDim.x - 1;
    }
    if (thread >= 32) return;
    last = __shfl_sync(FULL_WARP, last, 0);
    if (!last) return;
    __threadfence();
    finish(row, at, winners + (i64)at * slices, gridDim.x, blocks, tail, vocab, tokens);
    if (thread == 0) counters[at] = 0;
}
