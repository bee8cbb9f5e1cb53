// The C interface between the kernels and `src/cpu/ffi.rs`. The two files must agree field by field.
// Shapes, bounds and alignment are checked on the Rust side; kernels trust their arguments.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

// Rows [row, row + rows) of a packed matrix from row-major memory.
struct TePack {
    void* panels;
    int32_t dtype;
    size_t k;
    size_t row;
    size_t rows;
    const void* src;  // first element of the first row; need not be aligned
    int32_t src_dtype;
    size_t src_stride;  // elements from one row to the next
    int32_t threads;
};

// y = x W^T (+ bias), or y += that.
struct TeLinear {
    const void* panels;
    int32_t dtype;
    size_t n;
    size_t k;
    const float* x;  // [m, k]
    size_t m;
    const float* bias;  // [n] or null
    float* y;           // [m, n]
    int32_t accumulate;
    int32_t threads;
};

// Rows of a packed matrix as float32.
struct TeEmbedding {
    const void* panels;
    int32_t dtype;
    size_t k;
    const int64_t* ids;
    size_t t;
    float* y;  // [t, k]
    int32_t threads;
};

struct TeRmsNorm {
    float* residual;  // null, or += x first and normalise the sum
    const float* x;   // [rows, dim]
    const float* weight;
    float* y;
    size_t rows;
    size_t dim;
    float eps;
    int32_t threads;
};

struct TeSiluMul {
    const float* gate_up;  // [rows, 2 * dim]
    float* y;              // [rows, dim]
    size_t rows;
    size_t dim;
    int32_t threads;
};

struct TeRope {
    const float* qkv;     // [t, (hq + 2 hkv) * d]
    const float* q_norm;  // [d] or null
    const float* k_norm;  // [d] or null
    float eps;
    const float* cos;  // [max_pos, rotary / 2]
    const float* sin;
    size_t rotary;
    const int64_t* positions;  // [t]
    const int64_t* slots;      // [t], negative: do not store
    float* q;                  // [t, hq, d]
    void* k_cache;             // [blocks, hkv, block_size, d]
    void* v_cache;
    int32_t kv_dtype;
    size_t t;
    size_t hq;
    size_t hkv;
    size_t d;
    size_t block_size;
    int32_t threads;
};

// Queries [first, first + count) of one sequence; positions are absolute.
struct TeAttentionTask {
    uint32_t seq;
    uint32_t token;     // row of the first query in q and out
    uint32_t position;  // its position in the sequence
    uint32_t count;
};

struct TeAttention {
    const float* q;  // [t, hq, d]
    const void* k_cache;
    const void* v_cache;
    int32_t kv_dtype;
    const int32_t* block_tables;  // [seqs, max_blocks]
    size_t max_blocks;
    const TeAttentionTask* tasks;
    size_t num_tasks;
    size_t max_count;  // largest `count` among the tasks
    size_t hq;
    size_t hkv;
    size_t d;
    size_t block_size;
    float scale;
    size_t window;   // 0: none
    float soft_cap;  // 0: none
    float* out;      // [t, hq * d]
    float* scratch;  // threads * te_attention_scratch floats, 64-byte aligned
    size_t scratch_stride;
    int32_t threads;
};

struct TeKernels {
    void (*pack)(const TePack*);
    void (*linear)(const TeLinear*);
    void (*embedding)(const TeEmbedding*);
    void (*rms_norm)(const TeRmsNorm*);
    void (*silu_mul)(const TeSiluMul*);
    void (*rope)(const TeRope*);
    size_t (*attention_scratch)(size_t rows, size_t d);
    void (*attention)(const TeAttention*);
    void (*exp)(const float*, float*, size_t);
    // Sum of a buffer (the memory roof) and a chain of independent FMAs (the arithmetic roof).
    float (*roof_read)(const float*, size_t, int32_t);
    float (*roof_fma)(size_t, int32_t);
};
}
