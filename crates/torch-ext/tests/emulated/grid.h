// Runs CUDA kernels on a CPU, to see whether they are right: a thread is a fiber, and the fibers of a
// block take turns in random order, from one barrier or exchange between a warp's lanes to the next.
// What a kernel forgets to wait for shows as a wrong result; caches and memory's order do not.
//
// Stands in for `common.cuh`, with `tensor.h` for kernels that use tensor cores. Logits are float32. What is approximate
// on a GPU is off by as much here. BLOCK is the number of threads of a block.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>
#include <ucontext.h>

using std::max;
using std::min;
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define T_FLOAT 1
#define DEVICE inline
#define __device__ static
#define __global__ static
#define __noinline__
#define __shared__ static
#define __launch_bounds__(...)
static const u32 FULL_WARP = 0xffffffffu;

struct float4 {
    float x, y, z, w;
};
struct int4 {
    int x, y, z, w;
};
struct Size {
    unsigned x, y, z;
};
static Size blockIdx, gridDim, blockDim;

// ---- fibers ---------------------------------------------------------------------------------

#ifndef BLOCK
#define BLOCK 512
#endif
static const size_t STACK = 131072;
static int current;
static ucontext_t scheduler, fibers[BLOCK];
static bool ended[BLOCK];
static std::mt19937 turns(1);

struct ThreadIndex {
    operator int() const { return current; }
};
static struct {
    ThreadIndex x;
} threadIdx;

static void pause() { swapcontext(&fibers[current], &scheduler); }

// A barrier is passed when all threads that have not ended have reached it.
static int alive, at_barrier;
static u32 barriers;
static void __syncthreads() {
    u32 mine = barriers;
    if (++at_barrier == alive) at_barrier = 0, ++barriers;
    while (barriers == mine) pause();
}

/// Runs a block of `BLOCK` threads, each of which calls `kernel()`.
template <typename Kernel> static void run_block(const Kernel &kernel) {
    static std::vector<char> stacks(BLOCK * STACK);
    static const Kernel *body;
    body = &kernel, alive = BLOCK, at_barrier = 0;
    void (*start)() = [] { (*body)(), ended[current] = true, --alive; };
    std::vector<int> order(BLOCK);
    for (int t = 0; t < BLOCK; ++t) {
        order[t] = t, ended[t] = false;
        getcontext(&fibers[t]);
        fibers[t].uc_stack.ss_sp = &stacks[t * STACK], fibers[t].uc_stack.ss_size = STACK;
        fibers[t].uc_link = &scheduler;
        makecontext(&fibers[t], start, 0);
    }
    // Now and then a warp sleeps while the others go on, as far as they can without it.
    int asleep = 0, nap = 0;
    while (alive > 0) {
        std::shuffle(order.begin(), order.end(), turns);
        if (--nap < 0) asleep = (int)(turns() % (BLOCK / 8)), nap = (int)(turns() % 50);
        for (int t : order) {
            current = t;
            if (!ended[t] && t / 32 != asleep) swapcontext(&scheduler, &fibers[t]);
            // Those that wait may be all that are left.
            if (alive > 0 && at_barrier == alive) at_barrier = 0, ++barriers;
        }
    }
}

/// Runs a grid of `x` by `y` blocks, one after the other in random order, and `after` behind each.
template <typename Kernel, typename After> static void run_grid(int x, int y, const Kernel &kernel, const After &after) {
    gridDim = {(unsigned)x, (unsigned)y, 1}, blockDim = {BLOCK, 1, 1};
    std::vector<int> order(x * y);
    for (int i = 0; i < x * y; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), turns);
    for (int i : order) {
        blockIdx = {(unsigned)(i % x), (unsigned)(i / x), 0};
        run_block(kernel);
        after();
    }
}
template <typename Kernel> static void run_grid(int x, int y, const Kernel &kernel) { run_grid(x, y, kernel, [] {}); }

// ---- a warp's lanes -------------------------------------------------------------------------

/// `all_of(in, out)` for the 32 lanes of a warp, once the last of them is here; each gets its own.
template <typename Out, typename In, typename F> static Out together(In in, const F &all_of) {
    static In ins[BLOCK / 32][32];
    static Out outs[BLOCK / 32][2][32];
    static int arrived[BLOCK / 32];
    static u32 rounds[BLOCK / 32];
    int warp = current / 32, lane = current % 32;
    u32 round = rounds[warp];
    ins[warp][lane] = in;
    if (++arrived[warp] == 32) arrived[warp] = 0, all_of(ins[warp], outs[warp][round & 1]), ++rounds[warp];
    while (rounds[warp] == round) pause();
    return outs[warp][round & 1][lane];
}
/// Every lane gets what all 32 have.
template <typename T> static void exchange(T value, T (&all)[32]) {
    struct Lanes {
        T of[32];
    };
    Lanes lanes = together<Lanes>(value, [](const T *in, Lanes *out) {
        for (int lane = 0; lane < 32; ++lane) std::copy(in, in + 32, out[lane].of);
    });
    std::copy(lanes.of, lanes.of + 32, all);
}
static void __syncwarp() {
    char all[32];
    exchange('\0', all);
}
template <typename T> static T __shfl_xor_sync(u32, T value, int mask) {
    T all[32];
    exchange(value, all);
    return all[current % 32 ^ mask];
}
template <typename T> static T __shfl_up_sync(u32, T value, int by) {
    T all[32];
    exchange(value, all);
    return current % 32 >= by ? all[current % 32 - by] : value;
}
template <typename T> static T __shfl_sync(u32, T value, int from) {
    T all[32];
    exchange(value, all);
    return all[from];
}
static u32 __ballot_sync(u32, bool vote) {
    int all[32];
    exchange((int)vote, all);
    u32 bits = 0;
    for (int i = 0; i < 32; ++i) bits |= (u32)all[i] << i;
    return bits;
}
template <typename T> static T __reduce_min_sync(u32, T value) {
    T all[32];
    exchange(value, all);
    return *std::min_element(all, all + 32);
}
template <typename T> static T __reduce_max_sync(u32, T value) {
    T all[32];
    exchange(value, all);
    return *std::max_element(all, all + 32);
}
template <typename T> static T __reduce_add_sync(u32, T value) {
    T all[32], sum = 0;
    exchange(value, all);
    for (T one : all) sum += one;
    return sum;
}
static float warp_max(float x) { return __reduce_max_sync(FULL_WARP, x); }
static float block_sum(float x, float *) {
    static float all[BLOCK];
    __syncthreads();
    all[current] = x;
    __syncthreads();
    float sum = 0;
    for (float one : all) sum += one;
    __syncthreads();
    return sum * (1 + 1e-6f);
}

// ---- memory and numbers ---------------------------------------------------------------------

template <typename T, typename U> static T atomicAdd(T *at, U value) {
    T before = *at;
    *at += (T)value;
    return before;
}
template <typename T, typename U> static T atomicMin(T *at, U value) {
    T before = *at;
    *at = min(before, (T)value);
    return before;
}
template <typename T, typename U> static T atomicMax(T *at, U value) {
    T before = *at;
    *at = max(before, (T)value);
    return before;
}
static u32 add_acq_rel(u32 *at, u32 value) { return atomicAdd(at, value); }
template <typename T> static T __ldcg(const T *at) { return *at; }
static void pdl_wait() {}
static void pdl_launch() {}

static int __ffs(int x) { return __builtin_ffs(x); }
static int __popc(u32 x) { return __builtin_popcount(x); }
template <typename To, typename From> static To bits_of(From x) {
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}
static float __int_as_float(int x) { return bits_of<float>(x); }
static float __uint_as_float(u32 x) { return bits_of<float>(x); }
static u32 __float_as_uint(float x) { return bits_of<u32>(x); }
static float __fdiv_rn(float a, float b) { return a / b; }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fsub_rn(float a, float b) { return a - b; }
static float __fdividef(float a, float b) { return a / b * (1 + 1e-7f); }
static float to_float(float x) { return x; }
static float exp2_fast(float x) { return exp2f(x) * (1 + 2e-7f); }
/// Off by 2^-21.4 between 0.5 and 2, and elsewhere by a few units in the last place, up or down.
static float log_about(float x) {
    static std::minstd_rand sign(1);
    if (x < 1.2e-38f) return -INFINITY;
    float exact = logf(x), off = x > 0.5f && x < 2.f ? 3.6e-7f : fabsf(exact) * 3e-7f;
    return sign() & 64 ? exact + off : exact - off;
}
#define __logf log_about
