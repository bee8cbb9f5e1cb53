// Decode attention against a reference in float64: `attention SEED BATCHES` runs so many random batches, or up to the
// first with a wrong head. Defines: those of the kernel.
#define BLOCK (WARPS * 32)
#include "tensor.h"

static float2 load_cg(const float2 *p) { return *p; }
static float4 load_cg(const float4 *p) { return *p; }
#include "attention_decode.h"

static std::mt19937 rng;
static int below(int n) { return (int)(rng() % n); }
static float normal() {
    static std::normal_distribution<float> draw;
    return draw(rng);
}
static std::vector<elem> normals(size_t n) {
    std::vector<elem> all(n);
    for (elem &x : all) x = rounded(normal());
    return all;
}
typedef std::vector<double> Head;

static const int DIM = HEAD_DIM, PARTS = 4096;
static const float SCALE = 0.1f, CAP = 20.f, EPS = 1e-6f;

/// Sequences with one query each, as the kernel takes them.
struct Batch {
    // Few, or as many as a launch may have, and then of short contexts.
    int n = below(4) ? 1 + below(below(3) ? 6 : 40) : 41 + below(216), longest;
    int kv_heads = 1 + below(3), ratio = WIDE ? 9 + below(12) : 1 + below(8), heads = kv_heads * ratio;
    int groups = (ratio + 15) / 16, rows = (ratio + groups - 1) / groups;
    int block_size = ANY_BLOCK ? 1 + below(50) : 16 << below(3), width, blocks;
    // About as long as one another, and about as many KV heads as thread blocks, or twice, or three times.
    bool alike = n <= 40 && !below(3);
    int window = below(3) ? 0 : 1 + below(300), even = below(2) ? 0 : below(2) ? 1 : 144, grid;
    std::vector<int> contexts, query_start, table, seqs;
    std::vector<elem> k, v, q, out, q_norm = normals(DIM), k_norm = normals(DIM);
    std::vector<float> cos, sin;
    std::vector<i64> rope_index;

    Batch() {
        const int lengths[] = {10, 60, 300, 700};
        longest = alike ? 500 : lengths[below(n <= 40 ? 4 : 2)];
        if (alike) window = 0, even = 1;
        width = (longest + block_size - 1) / block_size + below(3), blocks = n * width + 5;
        std::vector<int> order(blocks);
        for (int i = 0; i < blocks; ++i) order[i] = i;
        std::shuffle(order.begin(), order.end(), rng);
        table.assign(order.begin(), order.begin() + n * width);
        // What no context has is NaN, and with FUSED its newest token, too.
        k.assign((size_t)blocks * kv_heads * block_size * DIM, NOT_A_NUMBER), v = k;
        int live = 0;
        for (int i = 0; i < n; ++i) {
            contexts.push_back(!below(8) ? 0 : alike ? longest - below(40) : 1 + below(longest));
            live += contexts[i] > 0;
            query_start.push_back(i), seqs.push_back(i), rope_index.push_back(max(0, contexts[i] - 1));
            for (int at = 0; at < (contexts[i] - FUSED) * kv_heads * DIM; ++at) {
                size_t to = place(i, at / DIM % kv_heads, at / DIM / kv_heads) + at % DIM;
                k[to] = rounded(normal()), v[to] = rounded(normal());
            }
        }
        grid = alike ? live * kv_heads * groups / (1 + below(3)) + 1 : 1 + below(below(2) ? 20 : 200);
        q = normals((size_t)n * q_heads() * DIM);
        out.assign((size_t)n * heads * DIM, NOT_A_NUMBER);
        for (int i = 0; i < longest * DIM / 2; ++i) {
            double angle = 3 * normal();
            cos.push_back((float)std::cos(angle)), sin.push_back((float)std::sin(angle));
        }
    }
    int q_heads() const { return heads + (FUSED ? 2 * kv_heads : 0); }
    const elem *q_head(int seq, int head) const { return &q[((size_t)seq * q_heads() + head) * DIM]; }
    /// Where a token's key and value begin in the cache.
    size_t place(int seq, int kv_head, int token) const {
        size_t block = table[seq * width + token / block_size];
        return ((block * kv_heads + kv_head) * block_size + token % block_size) * DIM;
    }

    /// By a grid of a random size; whether nothing is left behind.
    bool run() {
        static std::vector<float> part;
        static std::vector<float2> part_ml;
        int lists = kv_heads * groups, max_splits = max(8, 256 / lists);
        part.resize(PARTS * (size_t)rows * DIM), part_ml.resize(PARTS * rows);
        std::vector<u32> counters(n * lists);
        memset(dynamic_shared, 0xff, sizeof dynamic_shared);
        bool arrived = true;
        run_grid(grid, 1, [&] {
            attention_decode(q.data(), k.data(), v.data(), table.data(), query_start.data(), contexts.data(), seqs.data(),
                             out.data(), part.data(), part_ml.data(), counters.data(), n, n, n, heads, kv_heads, groups,
                             rows, width, blocks, block_size, longest, window, max_splits, even, SCALE, CAP, 1, 0, 0
#if FUSED
                             ,
                             k.data(), v.data(), q_norm.data(), k_norm.data(), EPS, cos.data(), sin.data(),
                             rope_index.data(), longest
#endif
            );
        }, [&] { arrived &= all_arrived(); });
        return arrived && std::count(counters.begin(), counters.end(), 0u) == (long)counters.size();
    }

    Head plain(const elem *from) const {
        Head head(DIM);
        for (int d = 0; d < DIM; ++d) head[d] = to_float(from[d]);
        return head;
    }
    /// A query or a key as it takes part: with FUSED normalized and rotated, rounded where the models' own code rounds.
    Head turned(const elem *from, const std::vector<elem> &norm, int position) const {
        Head x = plain(from), y(DIM);
        auto round = [](double x) { return (double)to_float(rounded((float)x)); };
        double squares = 0;
        for (double e : x) squares += e * e;
        double inv = 1 / std::sqrt(squares / DIM + EPS);
        for (int d = 0; QK_NORM && d < DIM; ++d) x[d] = round(round(x[d] * inv) * to_float(norm[d]));
        for (int d = 0, half = DIM / 2; d < half; ++d) {
            double c = cos[position * half + d], s = sin[position * half + d];
            y[d] = round(x[d] * c - x[d + half] * s), y[d + half] = round(x[d + half] * c + x[d] * s);
        }
        return y;
    }

    /// Attention of one head.
    Head expected(int seq, int head) const {
        int context = contexts[seq], kv_head = head / ratio;
        int first = window > 0 ? max(0, context - window) : 0;
        Head sum(DIM), query = plain(q_head(seq, head));
        if (FUSED && context > 0) query = turned(q_head(seq, head), q_norm, context - 1);
        double total = 0, most = -INFINITY;
        for (int token = first; token < context; ++token) {
            Head key = plain(&k[place(seq, kv_head, token)]), value = plain(&v[place(seq, kv_head, token)]);
            double score = 0;
            for (int d = 0; d < DIM; ++d) score += key[d] * query[d] * SCALE;
            if (SOFT_CAP) score = CAP * std::tanh(score / CAP);
            double now = std::max(most, score), fade = std::exp(most - now), weight = std::exp(score - now);
            most = now, total = total * fade + weight;
            for (int d = 0; d < DIM; ++d) sum[d] = sum[d] * fade + weight * value[d];
        }
        for (double &x : sum) x = context > 0 ? x / total : 0;
        return sum;
    }
    /// Whether the newest key and value are in the cache, as they should be.
    bool is_written(int seq, int kv_head) const {
        size_t at = place(seq, kv_head, contexts[seq] - 1);
        Head key = turned(q_head(seq, heads + kv_head), k_norm, contexts[seq] - 1), got = plain(&k[at]);
        bool same = memcmp(&v[at], q_head(seq, heads + kv_heads + kv_head), 2 * DIM) == 0;
        for (int d = 0; d < DIM; ++d) same &= std::abs(got[d] - key[d]) <= 0.02 * (1 + std::abs(key[d]));
        return same;
    }
};

/// |got - want| / |want|; a small want counts for more.
static double distance(const Head &got, const Head &want) {
    double error = 0, size = 1e-6;
    for (int d = 0; d < DIM; ++d) error += (got[d] - want[d]) * (got[d] - want[d]), size += want[d] * want[d];
    return std::sqrt(error / size);
}

int main(int, char **arguments) {
    rng.seed(atoi(arguments[1])), turns.seed(atoi(arguments[1]));
    int batches = atoi(arguments[2]);
    double worst = 0;
    for (int i = 0; i < batches; ++i) {
        Batch batch;
        bool clean = batch.run();
        auto wrong = [&](const char *what, int seq, int head) {
            printf("batch %d: %s of head %d of sequence %d of %d, context %d; %d KV heads for %d, blocks of %d, window %d, even %d\n",
                   i, what, head, seq, batch.n, batch.contexts[seq], batch.kv_heads, batch.heads, batch.block_size,
                   batch.window, batch.even);
            return 1;
        };
        if (!clean) return printf("batch %d leaves copies or counters behind\n", i), 1;
        for (int seq = 0; seq < batch.n; ++seq) {
            for (int head = 0; FUSED && batch.contexts[seq] > 0 && head < batch.kv_heads; ++head)
                if (!batch.is_written(seq, head)) return wrong("newest key or value", seq, head);
            for (int head = 0; head < batch.heads; ++head) {
                Head got = batch.plain(&batch.out[((size_t)seq * batch.heads + head) * DIM]);
                double off = distance(got, batch.expected(seq, head));
                worst = std::max(worst, off);
                // NaN is not close.
                if (!(off <= 0.02)) return wrong("result", seq, head);
            }
        }
    }
    printf("%d batches, at most %.2g off\n", batches, worst);
}
