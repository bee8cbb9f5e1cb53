// What `grid.h` lacks for kernels with tensor cores and asynchronous copies: bfloat16, copies that arrive as late as
// the kernel allows or at once, and instructions of a whole warp, which happen when its last lane is there.
#pragma once
#include "grid.h"

#undef __launch_bounds__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct int2 {
    int x, y;
};
struct float2 {
    float x, y;
};
struct uint2 {
    u32 x, y;
};
struct uint4 {
    u32 x, y, z, w;
};
static int2 make_int2(int x, int y) { return {x, y}; }
static float2 make_float2(float x, float y) { return {x, y}; }
static uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static float rsqrtf(float x) { return 1.f / sqrtf(x); }
static int __clz(int x) { return x == 0 ? 32 : __builtin_clz(x); }

// ---- bfloat16 -------------------------------------------------------------------------------

struct bf16 {
    u16 bits;
};
typedef bf16 elem;
static const elem NOT_A_NUMBER = {0x7fc0};

static float to_float(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
static bf16 rounded(float x) {
    u32 bits = __float_as_uint(x);
    bool finite = (bits & 0x7f800000) != 0x7f800000;
    return {(u16)((finite ? bits + 0x7fff + (bits >> 16 & 1) : bits) >> 16)};
}
template <typename T> static T from_float(float x) { return rounded(x); }
template <typename T> static u32 pack2(float lo, float hi) { return rounded(lo).bits | (u32)rounded(hi).bits << 16; }
template <typename T> static float2 unpack2(u32 x) {
    return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)};
}

// ---- a block and its warps ------------------------------------------------------------------

static int __syncthreads_count(bool vote) {
    static int votes;
    votes += vote;
    __syncthreads();
    int all = votes;
    __syncthreads();
    votes -= vote;
    return all;
}

static bool __any_sync(u32, bool vote) { return __ballot_sync(FULL_WARP, vote) != 0; }
static float warp_sum(float x) {
    for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(FULL_WARP, x, d);
    return x;
}

// ---- shared memory and copies to it ---------------------------------------------------------

alignas(128) static u8 dynamic_shared[232448];

static u32 shared_address(const void *p) { return (u32)((const u8 *)p - dynamic_shared); }
static u64 policy_read_once() { return 1; }
static u64 policy_usual() { return 0; }

struct Copy {
    u32 to;
    const void *from;
    bool valid;
};
/// Of a thread: the group that it fills, and those that are under way, the oldest first.
struct Copies {
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
};
static Copies copies[BLOCK];

static void arrive(const Copy &copy) {
    if (copy.valid) memcpy(dynamic_shared + copy.to, copy.from, 16);
    else memset(dynamic_shared + copy.to, 0, 16);
}
static void cp_async16(u32 to, const void *from, bool valid, u64) {
    if (to % 16 != 0 || to + 16 > sizeof dynamic_shared) printf("a copy to %u\n", to), exit(1);
    memset(dynamic_shared + to, 0xff, 16); // NaN until it is there
    if (turns() % 2) arrive({to, from, valid});
    else copies[current].open.push_back({to, from, valid});
}
static void cp_async_commit() {
    Copies &mine = copies[current];
    mine.groups.push_back(mine.open), mine.open.clear();
}
template <int N> static void cp_async_wait() {
    auto &groups = copies[current].groups;
    for (; (int)groups.size() > N; groups.erase(groups.begin()))
        for (const Copy &copy : groups.front()) arrive(copy);
}
/// After a block: whether none of its copies is left, under way or not even that.
static bool all_arrived() {
    bool all = true;
    for (Copies &of : copies) {
        for (auto &group : of.groups) all &= group.empty();
        all &= of.open.empty();
        of.groups.clear(), of.open.clear();
    }
    return all;
}

// ---- tensor cores ---------------------------------------------------------------------------

struct Words {
    u32 word[4];
};
static u32 two_at(u32 low, u32 high) {
    u16 x, y;
    memcpy(&x, dynamic_shared + low, 2), memcpy(&y, dynamic_shared + high, 2);
    return x | (u32)y << 16;
}
static void ldmatrix_x4(u32 (&r)[4], u32 address) {
    Words words = together<Words>(address, [](const u32 *rows, Words *out) {
        for (int i = 0; i < 128; ++i) {
            u32 at = rows[i / 32 * 8 + i % 32 / 4] + i % 4 * 4;
            out[i % 32].word[i / 32] = two_at(at, at + 2);
        }
    });
    memcpy(r, words.word, sizeof r);
}
static void ldmatrix_x4_trans(u32 (&r)[4], u32 address) {
    Words words = together<Words>(address, [](const u32 *rows, Words *out) {
        for (int i = 0; i < 128; ++i) {
            const u32 *row = rows + i / 32 * 8 + i % 4 * 2;
            u32 column = i % 32 / 4 * 2;
            out[i % 32].word[i / 32] = two_at(row[0] + column, row[1] + column);
        }
    });
    memcpy(r, words.word, sizeof r);
}

struct Operands {
    float c[4];
    u32 a[4], b[2];
};
struct Sums {
    float c[4];
};
/// As `common.cuh` says where elements are.
template <typename T> static void mma16816(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    Operands mine = {{c[0], c[1], c[2], c[3]}, {a0, a1, a2, a3}, {b0, b1}};
    Sums sums = together<Sums>(mine, [](const Operands *in, Sums *out) {
        float a[16][16], b[16][8];
        for (int lane = 0; lane < 32; ++lane) {
            int g = lane / 4, t = lane % 4 * 2;
            for (int i = 0; i < 4; ++i) {
                float2 x = unpack2<T>(in[lane].a[i]);
                float *to = &a[g + i % 2 * 8][t + i / 2 * 8];
                to[0] = x.x, to[1] = x.y;
            }
            for (int i = 0; i < 2; ++i) {
                float2 x = unpack2<T>(in[lane].b[i]);
                b[t + i * 8][g] = x.x, b[t + i * 8 + 1][g] = x.y;
            }
        }
        for (int i = 0; i < 128; ++i) {
            int lane = i / 4, row = lane / 4 + i % 4 / 2 * 8, column = lane % 4 * 2 + i % 2;
            double sum = in[lane].c[i % 4];
            for (int k = 0; k < 16; ++k) sum += (double)a[row][k] * b[k][column];
            out[lane].c[i % 4] = (float)sum;
        }
    });
    memcpy(c, sums.c, sizeof c);
}
