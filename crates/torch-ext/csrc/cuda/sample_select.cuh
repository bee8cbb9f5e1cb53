// Rooms of `sample_select.cu`: what it holds in shared memory, and the ways to search it.

/// Candidates that are searched in registers, and how many a thread has.
static const int MOST = 4096, EACH = MOST / THREADS;
/// Candidates that are compared with each other.
static const int FEW = 256;
/// Chunks whose maxima bound what is looked at for top-p alone, and how far the sum of all weights
/// may be off in float32, in parts of it.
static const int TRIED = 128;
static const double UNSURE = 2e-5;
/// Loads of a thread that are under way at a time.
static const int TOGETHER = 4;
/// Chunks of the largest vocabulary, and how many a thread has.
static const int MOST_CHUNKS = 8192, HELD = MOST_CHUNKS / THREADS;

/// The best of some candidates: its group's score, and among its group's its own.
struct Best {
    double score, own;
    int token;

    DEVICE void meet(const Best &other) {
        bool better = other.score > score ||
                      (other.score == score &&
                       (other.own > own || (other.own == own && other.token < token)));
        if (better) *this = other;
    }
};

struct Shared {
    Row row;
    Stats all;
    float threshold;
    int found, listed;
    u32 least, most;
    u32 keys[MOST];
    /// Of the first of them.
    int tokens[FEW];
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
    /// The sum of all weights, to within `UNSURE`, and whether that is not enough.
    double total;
    int unsure;
    int bucket;
    Best best[FEW / 32];
};

// This kernel is one block's work from start to end, so its time is latency, and code that was not
// run before has to be fetched: what is long and not hot is called rather than inlined.
__device__ __noinline__ double exp_far(double x) { return exp(x); }
__device__ __noinline__ void read_far(const elem *data, int vocab, int aligned, int token,
                                      const Edits &edits, const Row &row, float (&x)[8]) {
    load8(data, vocab, aligned, token, x);
    if (edits.any(row)) edits.apply(row, token, x);
}
/// The score of a group (domain 1) with this sum of weights, or of a token (domain 0) with this exponent.
__device__ __noinline__ double score_far(double sum, const Row &row, int at, u32 domain) {
    u32 words[4], word;
    philox((u32)at / 4, (u32)row.position, domain, row.slot.key[0], row.slot.key[1], words);
    word = words[0];
#pragma unroll
    for (int i = 1; i < 4; ++i) {
        if (at % 4 == i) word = words[i];
    }
    return (domain == 1 ? log(sum) : sum) + gumbel(word);
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

/// Calls `f(token, logits)` with every eight processed logits of the listed chunks. Short code: all
/// warps run through all of it again and again.
template <typename F>
DEVICE void visit(const Shared &shared, const elem *data, int vocab, int aligned, const Edits &edits,
                  const F &f) {
    const int thread = threadIdx.x, groups = shared.listed * 8;
    const bool plain = aligned && vocab % 8 == 0 && !edits.any(shared.row);
    // Loads of several groups before the first is looked at: a trip to memory for all of them.
#pragma unroll 1
    for (int first = thread; first < groups; first += TOGETHER * THREADS) {
        Eight loaded[TOGETHER];
        int token[TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
            const int group = first + i * THREADS;
            token[i] = vocab;
            if (group < groups) token[i] = shared.list[group / 8] * CHUNK + group % 8 * 8;
            if (plain && token[i] < vocab) loaded[i].load(data + token[i]);
        }
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
            if (token[i] >= vocab) continue;
            float x[8];
            if (plain) {
                loaded[i].get(x);
            } else {
                float y[8];
                read_far(data, vocab, aligned, token[i], edits, shared.row, y);
#pragma unroll
                for (int j = 0; j < 8; ++j) x[j] = y[j];
            }
            f(token[i], x);
        }
    }
}

/// Adds the weights of the logits whose keys are at least each of three.
__device__ __noinline__ void add_far(double max, double inverse, const u32 (&key)[3],
                                     const float (&x)[8], double (&sum)[3]) {
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {
        const u32 here = key_of(x[i]);
        if (here < key[0]) continue;
        const double weight = exp(((double)x[i] - max) * inverse);
#pragma unroll
        for (int j = 0; j < 3; ++j) sum[j] += here >= key[j] ? weight : 0.0;
    }
}

/// The race of few candidates: this thread's has `key` and `weight`, which is 0 if it is not kept.
/// All threads call it; thread 0 gets the token.
DEVICE int race_few(Shared &shared, int found, u32 key, double weight) {
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    if (thread < FEW) shared.weights[thread] = weight;
    __syncthreads();
    Best best = {-INF, -INF, NO_TOKEN};
    if (weight > 0.0) {
        const int token = shared.tokens[thread], group = token / CHUNK;
        double sum = 0.0;
#pragma unroll 4
        for (int i = 0; i < found; ++i) {
            sum += shared.tokens[i] / CHUNK == group ? shared.weights[i] : 0.0;
        }
        const double max = (double)shared.all.max, t = (double)shared.row.slot.temperature;
        best.score = score_far(sum, shared.row, group, 1);
        best.own = score_far(((double)float_of(key) - max) / t, shared.row, token, 0);
        best.token = token;
    }
    if (warp * 32 < found) {
#pragma unroll
        for (int d = 16; d > 0; d /= 2) {
            best.meet({__shfl_xor_sync(FULL_WARP, best.score, d),
                       __shfl_xor_sync(FULL_WARP, best.own, d),
                       __shfl_xor_sync(FULL_WARP, best.token, d)});
        }
        if (lane == 0) shared.best[warp] = best;
    }
    __syncthreads();
    for (int i = 1; thread == 0 && i * 32 < found; ++i) best.meet(shared.best[i]);
    return best.token;
}
