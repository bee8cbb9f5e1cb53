// The sampling kernels against a reference in float64: `sampling SEED BATCHES` runs so many random
// batches, or up to the first with a wrong row.
// Crate `sampler` says what they compute; its own tests compare them with it, on a GPU.
#include "grid.h"

namespace scan {
#include "sample_scan.h"
}
namespace choose {
#include "sample_select.h"
}
namespace greedy {
#define RACE 0
#include "sample_race.h"
#undef RACE
}
namespace race {
#define RACE 1
#include "sample_race.h"
#undef RACE
}
namespace filtered {
#define RACE 2
#include "sample_race.h"
#undef RACE
}
using race::Slot;

static std::mt19937 rng;
static double uniform(double low, double high) {
    return std::uniform_real_distribution<double>(low, high)(rng);
}
static int below(int n) { return (int)(rng() % n); }
template <typename T, size_t N> static T one_of(const T (&values)[N]) { return values[below(N)]; }
static bool once_in(int n) { return below(n) == 0; }

static const int AUX = race::AUX, TAIL = race::TAIL;
static const int BIAS_ROW = 3, COUNTS_ROW = 5;

/// A batch as the kernels take it, and what each row's logits are after its processors.
struct Batch {
    int vocab, rows, slices, chunks, aligned = 0;
    i64 stride;
    std::vector<float> store, dense;
    float *logits;
    std::vector<Slot> slots;
    std::vector<int> aux, tail, row_slots, positions;
    std::vector<u64> blocks;
    std::vector<std::vector<float>> processed;
    /// Whether a row has filters, and whether one is drawn.
    bool filters = false, draws = false;

    float *dense_row(int row) { return (float *)blocks[0] + (i64)row * ((vocab + 7) / 8 * 8); }
};

static float *aligned_to_16(std::vector<float> &store) {
    return (float *)(((u64)store.data() + 15) / 16 * 16);
}

/// Logits of some kind: rounded (so that some are equal), flat, mostly masked, with a few far above.
static void fill(float *row, int vocab) {
    std::normal_distribution<float> normal;
    const int kind = below(6);
    const float scale = kind == 0 ? 0.02f : (float)uniform(0.5, 4);
    const float steps = kind == 1 ? 2.f : kind == 2 ? 16384.f : 64.f;
    for (int i = 0; i < vocab; ++i) {
        row[i] = kind == 3 && !once_in(3) ? once_in(2) ? -INFINITY : 1.f
                                          : roundf(normal(rng) * scale * steps) / steps;
    }
    for (int i = 0; kind == 4 && i < min(vocab, 20); ++i) row[below(vocab)] = 20.f + (float)below(8);
    row[below(vocab)] = 1.f;
    if (once_in(40)) std::fill(row, row + vocab, -INFINITY);
    if (once_in(20)) {
        // As a repetition penalty leaves them, the largest positive or negative.
        std::fill(row, row + vocab, -INFINITY);
        const float huge = one_of({-2e38f, -3.3e38f, 3e38f, -1e30f, 1e30f});
        for (int i = 0; i < 300; ++i) row[below(vocab)] = huge * (1.f + 1e-3f * (float)below(30));
    }
    if (once_in(40)) row[below(vocab)] = once_in(2) ? NAN : INFINITY;
}

static Slot parameters(bool plain) {
    Slot slot{};
    slot.live = 1, slot.key[0] = rng(), slot.key[1] = rng();
    slot.counts_row = slot.bias_row = slot.logprobs = -1;
    slot.top_p = 1.f, slot.ln_min_p = -INFINITY, slot.repetition = 1.f;
    if (once_in(8)) return slot;
    // High ones above all: where tokens are about as likely, one too many is drawn soon.
    slot.temperature = (float)(once_in(6) ? uniform(0.01, 0.1) : uniform(0.3, 5));
    if (plain) return slot;
    if (!once_in(3)) slot.top_k = one_of({1, 2, 2, 3, 3, 5, 20, 50, 64, 200, 257, 1000, 3000, 20000});
    if (once_in(2)) slot.top_p = (float)(once_in(3) ? uniform(0.001, 0.999999) : uniform(0.5, 0.99));
    if (once_in(4)) slot.ln_min_p = uniform(-12, -0.1);
    return slot;
}

static Batch random_batch() {
    Batch b;
    b.vocab = one_of({1, 5, 63, 64, 65, 700, 1000, 4000, 8191, 8192, 8193, 20011, 50257, 50264, 151936});
    b.rows = 1 + below(4);
    b.slices = (b.vocab + race::SLICE - 1) / race::SLICE, b.chunks = (b.vocab + race::CHUNK - 1) / race::CHUNK;
    b.stride = b.vocab + below(3) * 4;
    if (once_in(2)) b.stride = (b.stride + 3) / 4 * 4;
    b.aligned = b.stride % 4 == 0;
    b.store.resize(b.rows * b.stride + 4);
    b.logits = aligned_to_16(b.store);
    b.dense.resize((b.vocab + 7) / 8 * 8 * race::ROWS_IN_BLOCK + 4);
    b.blocks = {(u64)aligned_to_16(b.dense)};
    b.slots.resize(b.rows + 2), b.aux.resize((b.rows + 2) * AUX), b.tail.resize((b.rows + 2) * TAIL);
    const bool plain = once_in(3);
    for (int r = 0; r < b.rows; ++r) {
        float *row = b.logits + r * b.stride;
        fill(row, b.vocab);
        std::vector<float> x(row, row + b.vocab);
        Slot slot = parameters(plain);
        if (r == 0 && once_in(2)) {
            slot.bias_row = BIAS_ROW;
            float *bias = b.dense_row(BIAS_ROW);
            for (int i = 0; i < b.vocab; ++i) bias[i] = once_in(4) ? -INFINITY : once_in(7) ? 0.5f : 0.f;
            bias[below(b.vocab)] = 0.f;
            for (int i = 0; i < b.vocab; ++i) x[i] += bias[i];
        } else if (r == 0) {
            slot.counts_row = COUNTS_ROW;
            slot.repetition = 1.3f, slot.frequency = 0.2f, slot.presence = 0.4f;
            int *counts = (int *)b.dense_row(COUNTS_ROW);
            for (int i = 0; i < b.vocab; ++i) {
                if (!once_in(10)) continue;
                const int output = below(3);
                counts[i] = output | (once_in(2) ? (int)0x80000000 : 0);
                if (counts[i] == 0) continue;
                x[i] = x[i] > 0.f ? x[i] / slot.repetition : x[i] * slot.repetition;
                if (output > 0) x[i] = x[i] - slot.frequency * (float)output, x[i] = x[i] - slot.presence;
            }
        }
        b.filters |= slot.temperature > 0.f &&
                     (slot.top_k > 0 || slot.top_p < 1.f || slot.ln_min_p > -1e300);
        b.draws |= slot.temperature > 0.f;
        b.processed.push_back(x), b.slots[r + 1] = slot;
        b.row_slots.push_back(r + 1), b.positions.push_back(below(5000));
    }
    if (b.rows > 2) b.row_slots[b.rows - 1] = -1;             // padding
    if (b.rows > 3) b.slots[b.row_slots[b.rows - 2]].live = 0; // holds nothing
    return b;
}

/// The smallest logit that min-p, top-k and top-p keep.
static float threshold_of(const Slot &slot, const std::vector<float> &x) {
    std::vector<float> y = x;
    std::sort(y.rbegin(), y.rend());
    const double t = slot.temperature, largest = y[0];
    auto weight = [&](float v) { return exp(((double)v - largest) / t); };
    float threshold = -INFINITY;
    for (float v : y) {
        if (slot.ln_min_p > -1e300 && ((double)v - largest) / t >= slot.ln_min_p) threshold = v;
    }
    if (slot.top_k > 0 && slot.top_k < (int)y.size()) threshold = max(threshold, y[slot.top_k - 1]);
    if (!(slot.top_p < 1.f)) return threshold;
    double total = 0, larger = 0;
    for (float v : y) total += v >= threshold ? weight(v) : 0;
    float least = y[0];
    for (size_t i = 0; i < y.size() && y[i] >= threshold;) {
        if (i > 0 && !(larger < (double)slot.top_p * total)) break;
        least = y[i];
        size_t first = i;
        for (; i < y.size() && y[i] == y[first]; ++i) larger += weight(y[i]);
    }
    return least;
}

/// A row's token, or why it has none.
static int expected(const Batch &b, int row) {
    const int id = b.row_slots[row];
    if (id < 0) return race::PADDING;
    const Slot &slot = b.slots[id];
    if (!slot.live) return race::EMPTY_SLOT;
    std::vector<float> x = b.processed[row];
    for (int i = 0; i < b.vocab; ++i) {
        if (!(b.logits[row * b.stride + i] < INFINITY)) return race::NOT_FINITE - i;
    }
    const auto largest = std::max_element(x.begin(), x.end());
    if (*largest == -INFINITY) return race::ALL_MASKED;
    if (slot.temperature == 0.f) return (int)(largest - x.begin());
    const float threshold = threshold_of(slot, x);
    const double t = slot.temperature, top = *largest;
    auto exponent = [&](int i) { return x[i] >= threshold ? ((double)x[i] - top) / t : -INFINITY; };
    auto noise = [&](int i, u32 domain) {
        u32 words[4];
        race::philox((u32)i / 4, (u32)b.positions[row], domain, slot.key[0], slot.key[1], words);
        return race::gumbel(words[i % 4]);
    };
    double best = -INFINITY;
    int group = 0, token = 0;
    for (int g = 0; g < b.chunks; ++g) {
        double sum = 0;
        for (int i = g * 64; i < min(b.vocab, g * 64 + 64); ++i) sum += exp(exponent(i));
        const double score = log(sum) + noise(g, 1);
        if (score > best) best = score, group = g;
    }
    best = -INFINITY;
    for (int i = group * 64; i < min(b.vocab, group * 64 + 64); ++i) {
        const double score = exponent(i) + noise(i, 0);
        if (score > best) best = score, token = i;
    }
    return token;
}

enum Mode { GREEDY, RACE_ALL, FILTER };

/// Samples a copy of the batch as `sample.rs` launches it, and counts rows that are wrong.
static int check(const Batch &batch, Mode mode) {
    Batch b = batch;
    b.logits = aligned_to_16(b.store), b.blocks = {(u64)aligned_to_16(b.dense)};
    std::copy(batch.logits, batch.logits + b.rows * b.stride - (b.stride - b.vocab), b.logits);
    std::copy((float *)batch.blocks[0], (float *)batch.blocks[0] + b.dense.size() - 4, (float *)b.blocks[0]);
    const int rows = b.rows, slots = rows + 2, slices = b.slices;
    std::vector<float> maxima(rows * b.chunks, -77.f);
    std::vector<scan::Stats> stats(rows * slices);
    std::vector<u64> histogram(rows * race::BUCKETS, 12345);
    std::vector<choose::Selected> selected(rows);
    std::vector<race::Winner> winners(rows * slices);
    std::vector<u32> counters(rows, 0);
    std::vector<int> tokens(rows, -99);
    // As many blocks as have the same number of slices each, but the last.
    auto blocks_for_slices = [&] {
        const int each = 1 + below(slices);
        return (slices + each - 1) / each;
    };
#define BATCH(space)                                                                                         \
    b.logits, b.stride, b.vocab, b.aligned, b.row_slots.data(), b.positions.data(),                          \
        (space::Slot *)b.slots.data(), b.aux.data(), b.tail.data(), b.blocks.data(), slots
    if (mode == FILTER) {
        run_grid(blocks_for_slices(), rows, [&] {
            scan::sample_scan(BATCH(scan), slices, maxima.data(), stats.data(), histogram.data());
        });
        auto choose_rows = [&](u64 *sums) {
            run_grid(rows, 1, [&] {
                choose::sample_select(BATCH(choose), slices, maxima.data(), (choose::Stats *)stats.data(), sums,
                                      selected.data(), tokens.data());
            });
        };
        choose_rows(nullptr);
        run_grid(slices, rows, [&] {
            scan::sample_histogram(BATCH(scan), maxima.data(), stats.data(), histogram.data(),
                                   (scan::Selected *)selected.data());
        });
        choose_rows(histogram.data());
    }
    run_grid(blocks_for_slices(), rows, [&] {
#define ARGS(space)                                                                                          \
    BATCH(space), slices, maxima.data(), (space::Selected *)selected.data(), (space::Winner *)winners.data(), \
        counters.data(), tokens.data()
        if (mode == GREEDY) greedy::sample_race(ARGS(greedy));
        if (mode == RACE_ALL) race::sample_race(ARGS(race));
        if (mode == FILTER) filtered::sample_race(ARGS(filtered));
    });
    int wrong = 0;
    for (int r = 0; r < rows; ++r) {
        const int want = expected(batch, r), id = b.row_slots[r];
        bool right = tokens[r] == want && counters[r] == 0;
        if (want >= 0) {
            right &= b.tail[id * TAIL + (b.positions[r] & (TAIL - 1))] == want;
            const int row = b.slots[id].counts_row;
            Batch &before = const_cast<Batch &>(batch);
            right &= row < 0 || ((int *)b.dense_row(row))[want] == ((int *)before.dense_row(row))[want] + 1;
        }
        if (right) continue;
        ++wrong;
        const Slot &s = b.slots[max(id, 0)];
        printf("mode %d, row %d of %d, vocab %d: %d, expected %d (temperature %g, top-k %d, top-p %g, min-p %g)\n",
               mode, r, rows, b.vocab, tokens[r], want, s.temperature, s.top_k, s.top_p, exp(s.ln_min_p));
    }
    return wrong;
}

int main(int, char **args) {
    rng.seed(atoi(args[1]));
    int wrong = 0, rows = 0;
    for (int i = atoi(args[2]); i > 0 && wrong == 0; --i) {
        Batch batch = random_batch();
        rows += batch.rows;
        wrong += check(batch, FILTER);
        if (!batch.filters) wrong += check(batch, RACE_ALL);
        if (!batch.draws) wrong += check(batch, GREEDY);
    }
    printf("%d rows, %d wrong\n", rows, wrong);
    return wrong != 0;
}
