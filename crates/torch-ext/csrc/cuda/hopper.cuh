// What Hopper (sm_90a) has and several kernels use: warpgroup products (wgmma), barriers in shared
// memory, the tensor memory accelerator (TMA) and clusters. This text is put in front of the files
// that need it before they are compiled; for other architectures it defines nothing but HOPPER.
//
// Shared memory is in panels of 64 elements: rows of 128 bytes, eight rows from a multiple of 1024
// on are one pattern, and the 16-byte chunk c of row r is at chunk c ^ (r & 7) of its row. That is
// the 128-byte swizzle of the product's descriptors and of TMA.
#include "common.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#define HOPPER 1
#else
#define HOPPER 0
#endif

/// A description of a matrix in global memory for TMA, made by the driver: a kernel argument.
struct alignas(128) TensorMap {
    u64 opaque[16];
};

#if HOPPER
// ---- warpgroup products ---------------------------------------------------------------------------------------------

/// Of a matrix in shared memory: where it begins; bytes from one panel to the next (if its rows run along the panels),
/// and from 8 rows to the next 8; the 128-byte swizzle.
DEVICE u64 descriptor(u32 address, u32 panel_bytes, u32 group_bytes = 1024) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)(panel_bytes >> 4) << 16 | (u64)(group_bytes >> 4) << 32 | (u64)1 << 62;
}
/// The same matrix `bytes` further on in shared memory (a multiple of 16): one addition, where a descriptor made anew takes
/// a dozen instructions in front of each product.
DEVICE u64 descriptor_on(u64 d, u32 bytes) { return d + (bytes >> 4); }
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

/// Keeps the compiler from touching a product's result before the wait above.
template <int N> DEVICE void settled(float (&c)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

// ---- barriers in shared memory ----------------------------------------------------------------------------------------

DEVICE void barrier_init(u32 barrier, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
/// Arrives when the copies that this thread has started are complete.
DEVICE void barrier_arrive_copies(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
/// Until the phase of this parity is complete.
DEVICE void barrier_wait(u32 barrier, u32 parity) {
    asm volatile("{\n.reg .pred p;\nAGAIN:\nmbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n@p bra DONE;\nbra AGAIN;\n"
                 "DONE:\n}\n" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}
/// What this thread sees in shared memory is also seen by the warpgroup products that it starts.
DEVICE void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// After `barrier_init`: the whole cluster, and copies that arrive at it, see the barrier.
DEVICE void barrier_init_done() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    proxy_fence();
}
/// Arrives, and says how many bytes of copies belong to this phase.
DEVICE void barrier_arrive_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
/// Arrives at the barrier that has this address in block `rank` of the cluster, when this thread's reads of shared memory
/// are done. Without `.release.cluster`, which would put a fence of the whole GPU in front: what follows at the other end
/// writes through the barrier's own block.
DEVICE void barrier_arrive_remote(u32 barrier, u32 rank) {
    asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n" ::"r"(barrier),
                 "r"(rank)
                 : "memory");
}

// ---- clusters ---------------------------------------------------------------------------------------------------------

/// All threads of all blocks of the cluster, whole warps together. Orders no memory accesses between blocks (that would
/// cost a fence of the whole GPU).
DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
/// Writes to the place in block `rank`'s shared memory that is `address` in this block's, and counts its 16 bytes at the
/// barrier there.
DEVICE void store_cluster(u32 address, u32 barrier, u32 rank, float4 v) {
    asm volatile("{\n.reg .b32 to, at;\nmapa.shared::cluster.u32 to, %0, %2;\nmapa.shared::cluster.u32 at, %1, %2;\n"
                 "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [to], {%3, %4, %5, %6}, [at];\n}\n" ::"r"(
                     address),
                 "r"(barrier), "r"(rank), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
                 : "memory");
}

// ---- TMA --------------------------------------------------------------------------------------------------------------

/// Copies a box, whose first element is (row, column), to shared memory; its bytes count at
/// `barrier`. What lies outside of the matrix arrives as zeros, and counts.
DEVICE void copy_box(u32 to, const TensorMap *map, int column, int row, u32 barrier, u64 policy) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
                 "l"(map), "r"(column), "r"(row), "r"(barrier), "l"(policy)
                 : "memory");
}
/// The same from four dimensions, of which the second and third begin at 0.
DEVICE void copy_box4(u32 to, const TensorMap *map, int column, int group, u32 barrier, u64 policy) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%2, %3, %3, %4}], [%5], %6;" ::"r"(to),
                 "l"(map), "r"(column), "r"(0), "r"(group), "r"(barrier), "l"(policy)
                 : "memory");
}
/// The same as `copy_box`, to this address and barrier of every block of the cluster in `mask`.
DEVICE void copy_box_to(u16 mask, u32 to, const TensorMap *map, int column, int row, u32 barrier, u64 policy) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(to),
                 "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(mask), "l"(policy)
                 : "memory");
}
/// The same as `copy_box4`, to every block of the cluster in `mask`.
DEVICE void copy_box4_to(u16 mask, u32 to, const TensorMap *map, int column, int group, u32 barrier, u64 policy) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3, %3, %4}], [%5], %6, %7;" ::"r"(to),
                 "l"(map), "r"(column), "r"(0), "r"(group), "r"(barrier), "h"(mask), "l"(policy)
                 : "memory");
}
/// Starts copying a box from shared memory, after `proxy_fence`; what lies outside of the matrix is left out.
DEVICE void store_box(const TensorMap *map, int column, int row, u32 from) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(column),
                 "r"(row), "r"(from)
                 : "memory");
}
/// Ends a group of this thread's `store_box`.
DEVICE void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
/// Until all of this thread's groups but the `N` newest have read what they store.
template <int N> DEVICE void store_wait_read() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory"); }
/// Until all are complete.
DEVICE void store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
/// Four 8x8 matrices of 2-byte elements, of which a lane holds what it does after `ldmatrix_x4`; lane i gives the address of
/// row i % 8 of matrix i / 8.
DEVICE void store_matrix_x4(u32 address, const u32 (&v)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]),
                 "r"(v[2]), "r"(v[3])
                 : "memory");
}
#endif
