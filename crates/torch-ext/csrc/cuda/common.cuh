// What every kernel of this folder shares. It is all that a kernel may include: NVRTC compiles the
// kernels on machines that have no CUDA headers, so whatever `cuda_bf16.h` and friends would offer
// is spelled out here.
//
// Programmatic dependent launch, in short. A kernel launched with it may start while the kernel
// before it still runs:
//   - before `pdl_wait()` touch nothing that an earlier kernel of the step writes: weights only;
//   - every thread block calls `pdl_wait()` before it ends, even if it has nothing to do:
//     the chain "the one before has finished, so has everything before that" rests on it;
//   - after it, read activations with plain loads: never `__ldg`, `ld.global.nc` or a
//     `const T *__restrict__`, whose lines may be older than the wait;
//   - `pdl_launch()` lets the next kernel start. Early is fine, since it waits as well.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE __device__ __forceinline__

static const u32 FULL_WARP = 0xffffffffu;

// ---- element types --------------------------------------------------------------------------

struct bf16 {
    u16 bits;
};
struct half {
    u16 bits;
};

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
DEVICE float to_float(half x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

/// Round to nearest even.
template <typename T> DEVICE T from_float(float x);
template <> DEVICE float from_float<float>(float x) { return x; }
template <> DEVICE bf16 from_float<bf16>(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
template <> DEVICE half from_float<half>(float x) {
    half y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

/// Two elements in one register; `lo` is the one at the lower address.
template <typename T> DEVICE u32 pack2(float lo, float hi);
template <> DEVICE u32 pack2<bf16>(float lo, float hi) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}
template <> DEVICE u32 pack2<half>(float lo, float hi) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}
template <typename T> DEVICE float2 unpack2(u32 x);
template <> DEVICE float2 unpack2<bf16>(u32 x) {
    return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
}
template <> DEVICE float2 unpack2<half>(u32 x) {
    half lo = {(u16)(x & 0xffffu)}, hi = {(u16)(x >> 16)};
    return make_float2(to_float(lo), to_float(hi));
}

// The element type that a file is compiled for: -DT_BF16=1 or -DT_HALF=1 (none: it takes no type).
#if defined(T_BF16)
typedef bf16 elem;
#elif defined(T_HALF)
typedef half elem;
#endif

// ---- memory ---------------------------------------------------------------------------------

/// Eight 2-byte elements, or 16 bytes of anything.
union Vec16 {
    uint4 raw;
    u32 word[4];
};

/// Eight elements as floats.
template <typename T> DEVICE void unpack8(Vec16 v, float (&out)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float2 pair = unpack2<T>(v.word[i]);
        out[2 * i] = pair.x;
        out[2 * i + 1] = pair.y;
    }
}
template <typename T> DEVICE Vec16 pack8(const float (&in)[8]) {
    Vec16 v;
#pragma unroll
    for (int i = 0; i < 4; ++i) v.word[i] = pack2<T>(in[2 * i], in[2 * i + 1]);
    return v;
}

/// A plain 16-byte load or store (16-byte aligned).
DEVICE Vec16 load16(const void *p) {
    Vec16 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(p)
                 : "memory");
    return v;
}
DEVICE void store16(void *p, Vec16 v) { *(uint4 *)p = v.raw; }
/// Adds to a counter in memory and gives what it was. Writes of this thread, and those that it has
/// seen, come before; who finds the addition in the counter sees them. That is what two
/// `__threadfence` around an `atomicAdd` would do, which wait for longer.
DEVICE u32 add_acq_rel(u32 *counter, u32 value) {
    u32 before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(counter), "r"(value)
                 : "memory");
    return before;
}
/// For data that nothing writes while the kernel runs and that is used once (weights).
DEVICE Vec16 load16_stream(const void *p) {
    Vec16 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(p));
    return v;
}

/// The address of shared memory, as PTX takes it.
DEVICE u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

DEVICE Vec16 load_shared16(u32 address) {
    Vec16 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "r"(address)
                 : "memory");
    return v;
}
DEVICE void store_shared16(u32 address, Vec16 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.word[0]),
                 "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
                 : "memory");
}

/// Starts copying 16 bytes from global to shared memory; zeros arrive if not `valid`, and then
/// nothing is read (the address must still be one that could be).
DEVICE void cp_async16(u32 shared, const void *global, bool valid = true) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared),
                 "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}
/// What L2 should do with lines that are read once: give them up before others.
DEVICE u64 policy_read_once() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
/// What L2 should do with lines that others will read: keep them longest.
DEVICE u64 policy_keep() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
/// What L2 does without a policy.
DEVICE u64 policy_usual() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
/// As `cp_async16`, with what L2 should do with the lines. Where the compiler splits `shared` into a part of the thread and one
/// that the warp has in common (`LDGSTS [R + UR], desc[UR]` in the machine code, seen where the common part was of a loop's
/// counter), CUDA 13.0's assembler makes an illegal instruction of this. The tests on a GPU run into it.
DEVICE void cp_async16(u32 shared, const void *global, bool valid, u64 policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(shared),
                 "l"(global), "r"(valid ? 16 : 0), "l"(policy)
                 : "memory");
}
/// Ends the group of copies started since the last one.
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most the `N` newest groups of this thread are in flight.
template <int N> DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- tensor cores ---------------------------------------------------------------------------

/// Four 8x8 matrices of 2-byte elements; lane i gives the address of row i % 8 of matrix i / 8.
DEVICE void ldmatrix_x4(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
DEVICE void ldmatrix_x4_trans(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
DEVICE void ldmatrix_x2(u32 (&r)[2], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
}
DEVICE void ldmatrix_x2_trans(u32 (&r)[2], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
}

/// c += a b with a [16, 16] (row-major), b [16, 8] (column-major), c [16, 8] in float32.
/// With g = lane / 4 and t = lane % 4, a lane holds
///   a: (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..), two columns each;
///   b: (2t.., g), (2t + 8.., g), two rows each;
///   c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
template <typename T>
DEVICE void mma16816(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1);
template <>
DEVICE void mma16816<bf16>(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <>
DEVICE void mma16816<half>(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// ---- reductions -----------------------------------------------------------------------------

/// Over the warp; every lane gets the result.
DEVICE float warp_sum(float x) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(FULL_WARP, x, d);
    return x;
}
DEVICE float warp_max(float x) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, d));
    return x;
}

/// 2^x to within 2 units in the last place; denormals are 0.
DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/// x / (1 + e^-x) to within a few units in the last place of float32.
DEVICE float silu_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.f + exp2_fast(-1.4426950408889634f * x)));
    return x * y;
}

/// silu(gate) * up of two neighbours, rounded where separate operations would round.
template <typename T> DEVICE u32 silu_mul2(float2 gate, float2 up) {
    gate = unpack2<T>(pack2<T>(gate.x, gate.y)), up = unpack2<T>(pack2<T>(up.x, up.y));
    float2 silu = unpack2<T>(pack2<T>(silu_fast(gate.x), silu_fast(gate.y)));
    return pack2<T>(silu.x * up.x, silu.y * up.y);
}

/// Over the thread block; every thread gets the result. `scratch` is shared memory for 33 floats,
/// not used for anything else; all threads call it, in a block of whole warps.
DEVICE float block_sum(float x, float *scratch) {
    x = warp_sum(x);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    if (warp == 0) {
        x = warp_sum(lane < warps ? scratch[lane] : 0.f);
        if (lane == 0) scratch[32] = x;
    }
    __syncthreads();
    return scratch[32];
}

// ---- programmatic dependent launch ----------------------------------------------------------

/// Until the kernels before this one have finished and their writes can be seen.
DEVICE void pdl_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
/// The next kernel may start, as soon as every thread block said so or ended.
DEVICE void pdl_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
