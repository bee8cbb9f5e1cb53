// Changes of the slots between steps, from one upload: grid (changes). A change is at
// `changes[changes[1 + i]..]`: what `sample.rs` packed.

extern "C" __global__ void __launch_bounds__(THREADS)
    sample_update(const int *changes, int vocab, Slot *slots, int *aux, int *tail,
                  const u64 *blocks) {
    const int *change = changes + changes[blockIdx.x];
    int thread = threadIdx.x;
    int id = change[0];
    int live = change[1];
    if (!live) {
        if (thread == 0) slots[id].live = 0;
        return;
    }
    int num_aux = change[2], num_tail = change[3], num_allowed = change[4], num_bias = change[5];
    int num_bad = change[6], num_prompt = change[7], num_output = change[8], num_tokens = change[9];
    const int *words = change + 16;
    const Slot *slot = (const Slot *)words;
    if (thread < 32) ((int *)(slots + id))[thread] = words[thread];
    words += 32;
    for (int i = thread; i < num_aux; i += THREADS) aux[(i64)id * AUX + i] = words[i];
    words += num_aux;
    // The last of the sequence's tokens.
    for (int i = thread; i < num_tail; i += THREADS) {
        int position = num_tokens - num_tail + i;
        tail[(i64)id * TAIL + (position & (TAIL - 1))] = words[i];
    }
    words += num_tail;
    const int *allowed = words, *biased = allowed + (num_allowed > 0 ? num_allowed : 0);
    const int *bad = biased + 2 * num_bias, *prompt = bad + num_bad, *output = prompt + num_prompt;
    i64 width = (vocab + 7) / 8 * 8;
    if (slot->bias_row >= 0) {
        float *bias = (float *)dense_row(blocks, slot->bias_row, vocab);
        float start = num_allowed >= 0 ? -INF : 0.f;
        for (i64 i = thread; i < width; i += THREADS) bias[i] = start;
        __syncthreads();
        for (int i = thread; i < num_allowed; i += THREADS) bias[allowed[i]] = 0.f;
        __syncthreads();
        for (int i = thread; i < num_bias; i += THREADS) {
            bias[biased[2 * i]] += __int_as_float(biased[2 * i + 1]);
        }
        __syncthreads();
        for (int i = thread; i < num_bad; i += THREADS) bias[bad[i]] = -INF;
    }
    if (slot->counts_row >= 0) {
        int *counts = dense_row(blocks, slot->counts_row, vocab);
        for (i64 i = thread; i < width; i += THREADS) counts[i] = 0;
        __syncthreads();
        for (int i = thread; i < num_prompt; i += THREADS) atomicOr(&counts[prompt[i]], (int)0x80000000u);
        for (int i = thread; i < num_output; i += THREADS) atomicAdd(&counts[output[i]], 1);
    }
}
