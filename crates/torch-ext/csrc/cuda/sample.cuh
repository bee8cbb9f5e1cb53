// What the sampling kernels share: a sequence's parameters, the logits after its processors, the
// noise. This text is put in front of each `sample_*.cu` file before it is compiled.
//
// Everything follows crate `sampler`, whose CPU version the tokens must equal: processors in
// float32 by the same operations in the same order (hence no fused multiply-add here), and from
// temperature on float64 wherever it decides.
#include "common.cuh"

#if defined(T_FLOAT)
typedef float elem;
#endif

static const int THREADS = 512;
/// Tokens that a thread block works on: fixed, so that a row's result depends on nothing else.
static const int SLICE = 8192;
/// Tokens that share an entry of the table of maxima; eight threads of a warp have one.
static const int CHUNK = 64;
/// int32 entries of a slot for stop tokens and bad words.
static const int AUX = 1024;
/// Last tokens that are remembered of a slot's sequence, for bad words.
static const int TAIL = 64;
/// Dense rows in one allocation.
static const int ROWS_IN_BLOCK = 16;
/// Buckets of the top-p histogram.
static const int BUCKETS = 1024;
#define INF __int_as_float(0x7f800000)
static const int NO_TOKEN = 0x7fffffff;

/// Results that are not tokens. See `sample.rs`.
static const int PADDING = -1, ALL_MASKED = -2, EMPTY_SLOT = -3, NOT_FINITE = -16;

/// A sequence's parameters: 32 words, packed by `sample.rs`.
struct Slot {
    int live;
    u32 key[2];
    /// Dense rows: occurrences in the output (bit 31: in the prompt); what is added to the logits
    /// (-inf for tokens that can never come). -1 for none.
    int counts_row, bias_row;
    int num_prompt;
    /// Stop tokens are banned at positions before this one.
    int until;
    /// Whether there are stop tokens or bad words in `aux`.
    int has_aux;
    int top_k;
    float temperature, top_p, repetition, frequency, presence;
    /// Log-probabilities asked for; -1 for none.
    int logprobs;
    int pad0;
    double ln_min_p;
    int pad1[14];
};
static_assert(sizeof(Slot) == 128, "packed by sample.rs");

DEVICE bool filters_k(const Slot &slot, int vocab) { return slot.top_k > 0 && slot.top_k < vocab; }
DEVICE bool is_greedy(const Slot &slot) { return slot.temperature == 0.f; }
/// Whether there is top-p alone, for which `sample_select` asks for the sum of all weights.
DEVICE bool needs_sum(const Slot &slot, int vocab) {
    return !is_greedy(slot) && slot.top_p < 1.f && !filters_k(slot, vocab) && !(slot.ln_min_p > -1e300);
}

#define INPUTS                                                                                     \
    const elem *logits, i64 stride, int vocab, int aligned, const int *row_slots,                  \
        const int *positions
#define TABLES const Slot *slots, const int *aux, int *tail, const u64 *blocks, int max_slots

/// A row as a thread block sees it. In shared memory.
struct Row {
    Slot slot;
    int id, position;
    int num_bans;
    int bans[AUX];
};

DEVICE int *dense_row(const u64 *blocks, int row, int vocab) {
    i64 width = (vocab + 7) / 8 * 8;
    return (int *)blocks[row / ROWS_IN_BLOCK] + (row % ROWS_IN_BLOCK) * width;
}

/// Loads what is known of a row and the tokens in `first..last` that are banned at its position.
/// All threads call it. False if there is nothing to do: a padding row or an empty slot (then
/// `row.id`, which thread 0 may read at once, is the code).
DEVICE bool load_row(Row &row, int at, int first, int last, const int *row_slots,
                     const int *positions, TABLES) {
    int id = row_slots[at], position = positions[at];
    bool known = id >= 0 && id < max_slots;
    // One trip to memory: whether the slot is live is seen with the rest of it.
    if (known && threadIdx.x < 32) {
        ((int *)&row.slot)[threadIdx.x] = ((const int *)(slots + id))[threadIdx.x];
    }
    if (threadIdx.x == 0) {
        row.position = position;
        row.num_bans = 0;
    }
    __syncthreads();
    bool live = known && row.slot.live != 0;
    if (threadIdx.x == 0) row.id = live ? id : id < 0 ? PADDING : EMPTY_SLOT;
    if (!live) return false;
    if (row.slot.has_aux) {
        auto ban = [&](int token) {
            if (first <= token && token < last) row.bans[atomicAdd(&row.num_bans, 1)] = token;
        };
        const int *list = aux + (i64)id * AUX;
        const int *seen = tail + (i64)id * TAIL;
        int stops = list[0], words = list[1 + stops];
        if (position < row.slot.until) {
            for (int i = threadIdx.x; i < stops; i += blockDim.x) ban(list[1 + i]);
        }
        for (int i = threadIdx.x; i < words; i += blockDim.x) {
            const int *word = list + list[2 + stops + i];
            int before = word[0] - 1;
            bool match = position - before >= row.slot.num_prompt;
            for (int j = 0; j < before && match; ++j) {
                match = seen[(position - before + j) & (TAIL - 1)] == word[1 + j];
            }
            if (match) ban(word[1 + before]);
        }
        __syncthreads();
    }
    return true;
}

DEVICE float4 read4(const float *p) { return *(const float4 *)p; }

/// Logits `token..token + 8` of a row; -inf beyond the vocabulary.
DEVICE void load8(const elem *row, int vocab, int aligned, int token, float (&x)[8]) {
    if (aligned && token + 8 <= vocab) {
#if defined(T_FLOAT)
        float4 a = read4(row + token), b = read4(row + token + 4);
        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
        x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
#else
        unpack8<elem>(load16(row + token), x);
#endif
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = token + i < vocab ? to_float(row[token + i]) : -INF;
}

/// Eight logits on their way from memory, in as few registers as they need.
struct Eight {
#if defined(T_FLOAT)
    float x[8];
    DEVICE void load(const elem *row, int vocab, int aligned, int token) { load8(row, vocab, aligned, token, x); }
    /// All eight are there, and aligned.
    DEVICE void load(const elem *from) {
        float4 a = read4(from), b = read4(from + 4);
        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
        x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    }
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
    DEVICE void load(const elem *from) { x = load16(from); }
    DEVICE void get(float (&to)[8]) const { unpack8<elem>(x, to); }
#endif
};

/// The first of eight logits that is NaN or +inf.
DEVICE int first_bad(const float (&x)[8], int token) {
    int bad = NO_TOKEN;
#pragma unroll
    for (int i = 7; i >= 0; --i) {
        if (!(x[i] < INF)) bad = token + i;
    }
    return bad;
}

/// The processors of a row.
struct Edits {
    const float *bias;
    int *counts;

    DEVICE Edits(const Row &row, const u64 *blocks, int vocab) {
        const Slot &slot = row.slot;
        bias = slot.bias_row < 0 ? nullptr : (const float *)dense_row(blocks, slot.bias_row, vocab);
        counts = slot.counts_row < 0 ? nullptr : dense_row(blocks, slot.counts_row, vocab);
    }

    DEVICE bool any(const Row &row) const { return bias || counts || row.num_bans > 0; }

    /// Allowed tokens, bans, bias, then repetition, frequency and presence penalty.
    DEVICE void apply(const Row &row, int token, float (&x)[8]) const {
        if (bias) {
            float4 a = read4(bias + token), b = read4(bias + token + 4);
            x[0] += a.x, x[1] += a.y, x[2] += a.z, x[3] += a.w;
            x[4] += b.x, x[5] += b.y, x[6] += b.z, x[7] += b.w;
        }
        for (int b = 0; b < row.num_bans; ++b) {
            int at = row.bans[b] - token;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (at == i) x[i] = -INF;
            }
        }
        if (counts) {
            int4 a = *(const int4 *)(counts + token), b = *(const int4 *)(counts + token + 4);
            const int seen[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (seen[i] == 0) continue;
                float r = row.slot.repetition, logit = x[i];
                logit = logit > 0.f ? __fdiv_rn(logit, r) : __fmul_rn(logit, r);
                int count = seen[i] & 0x7fffffff;
                if (count > 0) {
                    logit = __fsub_rn(logit, __fmul_rn(row.slot.frequency, (float)count));
                    logit = __fsub_rn(logit, row.slot.presence);
                }
                x[i] = logit;
            }
        }
    }
};

/// Philox4x32-10 (Salmon et al., SC'11): the words of tokens (domain 0) or groups of 64 (domain 1)
/// `4 counter .. 4 counter + 4`.
DEVICE void philox(u32 counter, u32 position, u32 domain, u32 key0, u32 key1, u32 (&out)[4]) {
    u32 x0 = counter, x1 = position, x2 = domain, x3 = 0;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        u64 a = (u64)0xD2511F53u * x0, b = (u64)0xCD9E8D57u * x2;
        x0 = (u32)(b >> 32) ^ x1 ^ key0;
        x1 = (u32)b;
        x2 = (u32)(a >> 32) ^ x3 ^ key1;
        x3 = (u32)a;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    out[0] = x0, out[1] = x1, out[2] = x2, out[3] = x3;
}

/// The Gumbel noise of a word, exactly: `1 - u` is a double without rounding.
DEVICE double gumbel(u32 word) {
    double rest = (4294967295.5 - (double)word) / 4294967296.0;
    return -log(-log(rest));
}

/// Floats in order as integers in order; -0 is 0.
DEVICE u32 key_of(float x) {
    u32 bits = __float_as_uint(x + 0.f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
DEVICE float float_of(u32 key) {
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

/// Over a thread block of whole warps; every thread gets the result. `scratch` is for 33 floats.
DEVICE float block_max(float x, float *scratch) {
    x = warp_max(x);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    if (warp == 0) {
        x = warp_max(lane < warps ? scratch[lane] : -INF);
        if (lane == 0) scratch[32] = x;
    }
    __syncthreads();
    return scratch[32];
}

/// What a slice of a row is like, after processors.
struct Stats {
    float max, min;
    /// First raw and first processed logit that is NaN or +inf.
    int bad_raw, bad;
    /// Of `exp((x - max) / temperature)` in float32, if the row needs it.
    float sum;
};

/// The same of the whole row, but for the sum; in all lanes of the warp that calls it.
DEVICE Stats row_stats(const Stats *stats, int slices) {
    Stats out = {-INF, INF, NO_TOKEN, NO_TOKEN, 0.f};
    for (int i = threadIdx.x % 32; i < slices; i += 32) {
        Stats s = stats[i];
        out.max = fmaxf(out.max, s.max), out.min = fminf(out.min, s.min);
        out.bad_raw = min(out.bad_raw, s.bad_raw), out.bad = min(out.bad, s.bad);
    }
    out.max = warp_max(out.max), out.min = -warp_max(-out.min);
    out.bad_raw = __reduce_min_sync(FULL_WARP, out.bad_raw);
    out.bad = __reduce_min_sync(FULL_WARP, out.bad);
    return out;
}

/// What `sample_select` found of a row.
struct Selected {
    float max, threshold;
    int state, pad;
};
/// The logits from `threshold` on are to race; the row has its result; the threshold needs the
/// histogram.
static const int RACES = 0, DONE = 1, NEEDS_HISTOGRAM = 2;

/// The code of a row that cannot be sampled, or 0.
DEVICE int row_error(const Stats &s) {
    if (s.bad_raw != NO_TOKEN) return NOT_FINITE - s.bad_raw;
    if (s.bad != NO_TOKEN) return NOT_FINITE - s.bad;
    return s.max == -INF ? ALL_MASKED : 0;
}

/// A row's token is that of its sequence from now on. One thread calls it.
DEVICE void keep_token(const Row &row, int token, const u64 *blocks, int *tail, int vocab) {
    if (row.slot.counts_row >= 0) dense_row(blocks, row.slot.counts_row, vocab)[token] += 1;
    tail[(i64)row.id * TAIL + (row.position & (TAIL - 1))] = token;
}

/// The smallest float with `(x - max) / temperature >= ln_min_p`. A whole warp calls it: its lanes
/// try neighbours of the float that it must be near.
DEVICE float min_p_threshold(float max, double temperature, double ln_min_p) {
    int lane = threadIdx.x % 32;
    u32 top = key_of(max), lowest = key_of(-INF);
    u32 start = key_of((float)((double)max + temperature * ln_min_p));
    start = start < lowest + 16 ? lowest : start - 16;
    for (;;) {
        u32 key = start + lane < top ? start + lane : top;
        bool holds = ((double)float_of(key) - (double)max) / temperature >= ln_min_p;
        u32 who = __ballot_sync(FULL_WARP, holds);
        if (who == 0) {
            start += 32;
        } else if ((who & 1) && start > lowest) {
            start = start < lowest + 31 ? lowest : start - 31;
        } else {
            int first = __ffs((int)who) - 1;
            u32 found = start + first;
            return float_of(found < top ? found : top);
        }
    }
}

/// How the logits that may be in a nucleus are divided into buckets: 0 for the largest.
struct Nucleus {
    float max, floor, scale;
    /// What a bucket is wide, as an exponent, and 1 / temperature.
    double width, inverse;

    DEVICE Nucleus(const Stats &row, float threshold, float temperature) {
        // exp(-40) is neither in a nucleus nor does it count.
        float deepest = (float)((double)row.max - 40.0 * (double)temperature);
        max = row.max;
        floor = fmaxf(threshold, fmaxf(row.min, deepest));
        scale = (float)(BUCKETS - 1) / fmaxf(max - floor, 1e-30f);
        inverse = 1.0 / (double)temperature;
        width = inverse / (double)scale;
    }

    /// Of a logit that is at least `floor`. Monotone.
    DEVICE int bucket(float x) const {
        int b = (int)((max - x) * scale);
        return b < BUCKETS - 1 ? b : BUCKETS - 1;
    }

    DEVICE double exponent(float x) const { return ((double)x - (double)max) * inverse; }
};
