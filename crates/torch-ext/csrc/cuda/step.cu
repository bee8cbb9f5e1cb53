// Turns what the host says of a step into the tensors that the model reads, and hands sampled tokens on to the next
// step, so that the host never waits for a token in between.
#include "common.cuh"

// A row of the step: a range of one sequence's tokens. As the host packs it, five integers.
struct Row {
    int slot;    // which sequence; negative: padding, one token that leads nowhere
    int start;   // position of the first token
    int len;     // number of tokens
    int source;  // where in `tokens` they stand; negative: the token that was sampled last, one row
    int first;   // index of the first token in the flat batch
};

// Block tables by slot. segments: [count][4] of (slot, at, offset, len): entries at.. of the slot's table become
// blocks[offset..offset + len]. Grid: one block a segment.
extern "C" __global__ void apply_tables(const int* __restrict__ segments, const int* __restrict__ blocks,
                                        int* __restrict__ tables, int width) {
    const int* segment = segments + 4 * blockIdx.x;
    int* table = tables + static_cast<long long>(segment[0]) * width + segment[1];
    for (int i = threadIdx.x; i < segment[3]; i += blockDim.x) table[i] = blocks[segment[2] + i];
}

// Grid: one block a row. `rows` is in the host's memory: each integer is read once.
extern "C" __global__ void prepare_rows(const int* __restrict__ rows, const int* __restrict__ tokens,
                                        const int* __restrict__ last_token, const int* __restrict__ tables, int width,
                                        int block_size, long long* __restrict__ ids, long long* __restrict__ positions,
                                        long long* __restrict__ cache_slots, int* __restrict__ query_start,
                                        int* __restrict__ context_len, int* __restrict__ row_tables,
                                        int* __restrict__ row_slots, int* __restrict__ row_ends,
                                        int* __restrict__ sample_slots, int samples, int* host, int told,
                                        long long* __restrict__ place) {
    const int r = blockIdx.x;
    __shared__ int ints[5];
    if (threadIdx.x < 5) ints[threadIdx.x] = rows[5 * r + threadIdx.x];
    __syncthreads();
    const Row row = {ints[0], ints[1], ints[2], ints[3], ints[4]};
    const bool padding = row.slot < 0;
    const int end = row.start + row.len;
    const int* table = tables + static_cast<long long>(padding ? 0 : row.slot) * width;
    for (int i = threadIdx.x; i < row.len; i += blockDim.x) {
        const int position = row.start + i;
        const int flat = row.first + i;
        ids[flat] = padding ? 0 : row.source < 0 ? last_token[row.slot] : tokens[row.source + i];
        positions[flat] = padding ? 0 : position;
        cache_slots[flat] = padding ? -1
                                    : static_cast<long long>(table[position / block_size]) * block_size +
                                          position % block_size;
    }
    const int used = padding ? 0 : (end + block_size - 1) / block_size;
    for (int i = threadIdx.x; i < used; i += blockDim.x) {
        row_tables[static_cast<long long>(r) * width + i] = table[i];
    }
    if (r == 0 && threadIdx.x == 0) {
        place[0] = reinterpret_cast<long long>(host);
        place[1] = told;
    }
    if (threadIdx.x == 0) {
        query_start[r] = row.first;
        if (r == gridDim.x - 1) query_start[r + 1] = row.first + row.len;
        context_len[r] = padding ? 0 : end;
        row_slots[r] = row.slot;
        sample_slots[r] = samples ? row.slot : -1;
        row_ends[r] = end;
    }
}

// last_token[slots[i]] = tokens[i], and of the first place[1] also host[i] = tokens[i], where host is the address place[0]: a
// captured launch has the same arguments each time. Rows of negative slots are left alone. A row that could not be sampled
// (negative) goes on with token 0: its sequence ends before anybody reads what follows.
extern "C" __global__ void keep_tokens(const int* tokens, const int* slots, int count, int* last_token,
                                       const long long* place) {
    pdl_wait();
    pdl_launch();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count || slots[i] < 0) return;
    const int token = tokens[i];
    if (i < place[1]) reinterpret_cast<int*>(place[0])[i] = token;
    last_token[slots[i]] = max(token, 0);
}
