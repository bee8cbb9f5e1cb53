// Exchanges between ranks whose memory all of them can read: GPUs of one process that NVLink
// connects, or streams of one GPU. A rank writes its part to a buffer of its own (stages it), tells
// the others, waits until they have told it, and reads theirs: one trip, for short messages.
//
// A thread block is a channel. Channel c of a rank meets channel c of the others and nobody else:
// it has its own part of the buffer, its own flags, and its own count of exchanges, the epoch.
//
//   buffer of a rank: CHANNELS x 2 halves x CHUNK bytes   what it has staged
//                     WORLD x CHANNELS u32                flags: the last epoch that rank w has staged
//                     CHANNELS u32                        epochs: exchanges that are over
//
// Why two halves do: in epoch e a rank writes half e % 2. It writes that half again in e + 2, after
// it has seen everybody's flag e + 1, and whoever staged e + 1 had read all of e.
//
// Epochs are in memory, not arguments, so a captured graph may be replayed. All ranks launch the
// same exchanges with the same grids in the same order. Every block of every rank must be resident:
// CHANNELS is small, and no block lets the next kernel start (`pdl_launch`) before all of the
// others' flags came: on one GPU it could take the room that another rank's blocks still need.
//
// A wait ends after `patience` nanoseconds, or when `alarm` (in host memory) is not zero: then the
// results mean nothing, `alarm` says which rank was late, and nobody waits for it any more.
#include "common.cuh"

/// -DWORLD: ranks. -DT_FLOAT=1 beside T_BF16 and T_HALF: sums of float32.
#if defined(T_FLOAT)
typedef float elem;
#endif
#ifndef WORLD
#error "WORLD is not defined"
#endif

static const int CHANNELS = 32, CHUNK = 32768, THREADS = 512;
/// Elements of 16 bytes.
static const int LANES = 16 / sizeof(elem);

DEVICE void unpack(Vec16 v, float (&out)[LANES]) {
#if defined(T_FLOAT)
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = __uint_as_float(v.word[i]);
#else
    unpack8<elem>(v, out);
#endif
}
DEVICE Vec16 pack(const float (&in)[LANES]) {
#if defined(T_FLOAT)
    Vec16 v;
#pragma unroll
    for (int i = 0; i < 4; ++i) v.word[i] = __float_as_uint(in[i]);
    return v;
#else
    return pack8<elem>(in);
#endif
}

DEVICE void store_release(u32 *p, u32 value) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
DEVICE u32 load_acquire(const u32 *p) {
    u32 value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
    return value;
}
DEVICE u32 load_relaxed(const u32 *p) {
    u32 value;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
    return value;
}
DEVICE u64 nanoseconds() {
    u64 time;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time));
    return time;
}

/// This block's place in an exchange.
struct Channel {
    /// Buffers of all ranks.
    u8 *buffer[WORLD];
    u32 *alarm;
    u64 patience;
    int rank;
    u32 epoch;

    DEVICE Channel(const u64 *buffers, int rank, u32 *alarm, u64 patience)
        : alarm(alarm), patience(patience), rank(rank) {
#pragma unroll
        for (int w = 0; w < WORLD; ++w) buffer[w] = (u8 *)buffers[w];
        epoch = *epochs();
    }

    DEVICE u32 *flags(u8 *of) const { return (u32 *)(of + (i64)CHANNELS * 2 * CHUNK); }
    DEVICE u32 *epochs() const {
        return flags((u8 *)buffer_of(rank)) + WORLD * CHANNELS + blockIdx.x;
    }
    /// Without an index into registers that is not known at compile time.
    DEVICE u8 *buffer_of(int which) const {
        u8 *found = buffer[0];
#pragma unroll
        for (int w = 1; w < WORLD; ++w)
            if (w == which) found = buffer[w];
        return found;
    }
    /// Where rank `w` stages in this epoch.
    DEVICE u8 *stage(int w) const {
        return buffer_of(w) + ((i64)blockIdx.x * 2 + (epoch & 1)) * CHUNK;
    }

    DEVICE void begin() { ++epoch; }

    /// What this block has staged can be read by the others, and theirs by this block.
    DEVICE void meet() {
        __syncthreads();
        if (threadIdx.x < 32) {
            int w = threadIdx.x;
            bool other = w < WORLD && w != rank;
            if (other)
                store_release(flags(buffer_of(w)) + rank * CHANNELS + blockIdx.x, epoch);
            __syncwarp();
            if (other) wait(w);
        }
        __syncthreads();
    }

    DEVICE void wait(int w) const {
        const u32 *flag = flags(buffer_of(rank)) + w * CHANNELS + blockIdx.x;
        u64 start = 0;
        for (u32 turn = 1; (int)(load_acquire(flag) - epoch) < 0; ++turn) {
            // The host's memory is far away, and a rank that is late may be so by milliseconds.
            if (turn % 256 != 0) continue;
            if (load_relaxed(alarm) != 0) return;
            u64 now = nanoseconds();
            if (start == 0) start = now;
            if (now - start > patience) {
                store_release(alarm, 1u + (u32)w);
                return;
            }
        }
    }

    /// The next exchange of this channel begins where this one ended. All threads call it.
    DEVICE void end() {
        if (threadIdx.x == 0) *epochs() = epoch;
    }
};

/// out = the sum of all ranks' x, in float32, rank 0's first: the same bits on every rank. `vectors`
/// of 16 bytes; `slice` of them a block.
extern "C" __global__ void __launch_bounds__(THREADS)
    all_reduce(elem *out, const elem *x, i64 vectors, i64 slice, const u64 *buffers, u32 *alarm,
               u64 patience, int rank) {
    pdl_wait();
    Channel channel(buffers, rank, alarm, patience);
    const int FULL = CHUNK / 16;
    i64 first = blockIdx.x * slice, last = min(first + slice, vectors);
    // Blocks whose slice is empty take no part in any rank.
    for (i64 at = first; at < last; at += FULL) {
        int count = (int)min((i64)FULL, last - at);
        channel.begin();
        u8 *mine = channel.stage(rank);
        for (int i = threadIdx.x; i < count; i += THREADS)
            store16(mine + i * 16, load16((const u8 *)x + (at + i) * 16));
        channel.meet();
        if (at + FULL >= last) pdl_launch();
        for (int i = threadIdx.x; i < count; i += THREADS) {
            Vec16 part[WORLD];
#pragma unroll
            for (int w = 0; w < WORLD; ++w) part[w] = load16(channel.stage(w) + i * 16);
            float sum[LANES], more[LANES];
            unpack(part[0], sum);
#pragma unroll
            for (int w = 1; w < WORLD; ++w) {
                unpack(part[w], more);
#pragma unroll
                for (int e = 0; e < LANES; ++e) sum[e] += more[e];
            }
            store16((u8 *)out + (at + i) * 16, pack(sum));
        }
    }
    channel.end();
}

/// out [ranks of `from`] x `stride` vectors: what ranks `from` to `to` (not included) have in `x`
/// (`bytes` bytes, 16-byte aligned). Ranks not in `readers` (bits) get nothing, but take part.
extern "C" __global__ void __launch_bounds__(THREADS)
    exchange(u8 *out, const u8 *x, i64 bytes, i64 stride, i64 slice, int from, int to, u32 readers,
             const u64 *buffers, u32 *alarm, u64 patience, int rank) {
    pdl_wait();
    Channel channel(buffers, rank, alarm, patience);
    const int FULL = CHUNK / 16;
    bool gives = from <= rank && rank < to, reads = (readers >> rank) & 1;
    i64 vectors = (bytes + 15) / 16;
    i64 first = blockIdx.x * slice, last = min(first + slice, vectors);
    for (i64 at = first; at < last; at += FULL) {
        int count = (int)min((i64)FULL, last - at);
        channel.begin();
        u8 *mine = channel.stage(rank);
        for (int i = threadIdx.x; gives && i < count; i += THREADS) {
            i64 place = (at + i) * 16;
            if (place + 16 <= bytes) {
                store16(mine + i * 16, load16(x + place));
            } else {
                for (int b = 0; place + b < bytes; ++b) mine[i * 16 + b] = x[place + b];
            }
        }
        channel.meet();
        if (at + FULL >= last) pdl_launch();
        for (int w = from; reads && w < to; ++w) {
            const u8 *theirs = channel.stage(w);
            u8 *place = out + ((w - from) * stride + at) * 16;
            for (int i = threadIdx.x; i < count; i += THREADS)
                store16(place + i * 16, load16(theirs + i * 16));
        }
    }
    channel.end();
}

#if !defined(T_FLOAT)
/// residual += the sum of all ranks' x; out = the RMS norm of that, times weight. Rounds as
/// `all_reduce` and `rms_norm` after one another: after the sum over ranks, after the addition,
/// after the normalization. `slice` rows a block; width % 8 == 0, and a row fits a chunk.
extern "C" __global__ void __launch_bounds__(THREADS)
    all_reduce_norm(elem *out, const elem *x, elem *residual, const elem *weight, float eps,
                    int width, int rows, int slice, const u64 *buffers, u32 *alarm, u64 patience,
                    int rank) {
    __shared__ float scratch[33];
    const int MOST = CHUNK / 16 / THREADS;
    pdl_wait();
    Channel channel(buffers, rank, alarm, patience);
    int vectors = width / 8;
    int fit = CHUNK / 16 / vectors;
    int first = blockIdx.x * slice, last = min(first + slice, rows);
    for (int at = first; at < last; at += fit) {
        int count = min(fit, last - at);
        channel.begin();
        u8 *mine = channel.stage(rank);
        for (int i = threadIdx.x; i < count * vectors; i += THREADS)
            store16(mine + i * 16, load16((const u8 *)x + ((i64)at * vectors + i) * 16));
        channel.meet();
        if (at + fit >= last) pdl_launch();
        for (int row = 0; row < count; ++row) {
            i64 base = (i64)(at + row) * vectors;
            float value[MOST][8], squares = 0.f;
#pragma unroll
            for (int v = 0; v < MOST; ++v) {
                int i = v * THREADS + threadIdx.x;
                if (i >= vectors) continue;
                int staged = (row * vectors + i) * 16;
                float sum[8], more[8];
                unpack8<elem>(load16(channel.stage(0) + staged), sum);
#pragma unroll
                for (int w = 1; w < WORLD; ++w) {
                    unpack8<elem>(load16(channel.stage(w) + staged), more);
#pragma unroll
                    for (int e = 0; e < 8; ++e) sum[e] += more[e];
                }
                unpack8<elem>(pack8<elem>(sum), sum);
                unpack8<elem>(load16((const u8 *)residual + (base + i) * 16), more);
#pragma unroll
                for (int e = 0; e < 8; ++e) sum[e] += more[e];
                Vec16 rounded = pack8<elem>(sum);
                store16((u8 *)residual + (base + i) * 16, rounded);
                unpack8<elem>(rounded, value[v]);
#pragma unroll
                for (int e = 0; e < 8; ++e) squares += value[v][e] * value[v][e];
            }
            float scale = rsqrtf(block_sum(squares, scratch) / (float)width + eps);
#pragma unroll
            for (int v = 0; v < MOST; ++v) {
                int i = v * THREADS + threadIdx.x;
                if (i >= vectors) continue;
                float g[8];
                Vec16 w;
                w.raw = __ldg((const uint4 *)weight + i);
                unpack8<elem>(w, g);
#pragma unroll
                for (int e = 0; e < 8; ++e)
                    g[e] *= to_float(from_float<elem>(value[v][e] * scale));
                store16((u8 *)out + (base + i) * 16, pack8<elem>(g));
            }
            // `scratch` is used again by the next row.
            __syncthreads();
        }
    }
    channel.end();
}
#endif
