// What attention_prefill_sm90.cu is made of: sizes, warpgroup products of scores and of outputs, and tiles of queries. This text
// is put in front of it before it is compiled, behind hopper.cuh.

#define INFINITY_F __int_as_float(0x7f800000)
#if HEAD_DIM == 256
#define KEYS_N 64
#else
#define KEYS_N 128
#endif
#if defined(T_BF16)
#define TYPES "bf16.bf16"
#else
#define TYPES "f16.f16"
#endif

static const int ROWS = 128;
static const int KEYS = KEYS_N;
static const int STAGES = 2;
static const int CHUNKS = HEAD_DIM / 8;
static const int Q_BYTES = ROWS * HEAD_DIM * 2;
static const int KEY_BYTES = KEYS * HEAD_DIM * 2;
static const int GROUP_BYTES = 8 * HEAD_DIM * 2; // of eight tokens
static const float LOG2E = 1.4426950408889634f;

#if HOPPER
#define OUT8(i)                                                                                                        \
    "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]),        \
        "+f"(c[i + 7])
// multiply_keys: c (64 x KEYS) = a b^T, plus c if `add`; both in shared memory, rows along the panels' dimensions.
// multiply_values: c (64 x HEAD_DIM) += a b; a in registers, b's rows are tokens.
#if KEYS_N == 64
DEVICE void multiply_keys(float (&c)[32], u64 a, u64 b, bool add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPES " {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
                 "}, %32, %33, p, 1, 1, 0, 0;\n}\n"
                 : OUT8(0), OUT8(8), OUT8(16), OUT8(24)
                 : "l"(a), "l"(b), "r"((int)add));
}
#endif
#if KEYS_N == 128
DEVICE void multiply_keys(float (&c)[64], u64 a, u64 b, bool add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPES " {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
                 "}, %64, %65, p, 1, 1, 0, 0;\n}\n"
                 : OUT8(0), OUT8(8), OUT8(16), OUT8(24), OUT8(32), OUT8(40), OUT8(48), OUT8(56)
                 : "l"(a), "l"(b), "r"((int)add));
}
#endif
#if HEAD_DIM == 64
DEVICE void multiply_values(float (&c)[32], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPES " {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
                 : OUT8(0), OUT8(8), OUT8(16), OUT8(24)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#endif
#if HEAD_DIM == 128
DEVICE void multiply_values(float (&c)[64], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPES " {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
                 : OUT8(0), OUT8(8), OUT8(16), OUT8(24), OUT8(32), OUT8(40), OUT8(48), OUT8(56)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#endif
#if HEAD_DIM == 256
DEVICE void multiply_values(float (&c)[128], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPES " {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
                 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
                 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
                 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
                 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
                 "}, {%128, %129, %130, %131}, %132, 1, 1, 1, 1;\n"
                 : OUT8(0), OUT8(8), OUT8(16), OUT8(24), OUT8(32), OUT8(40), OUT8(48), OUT8(56), OUT8(64), OUT8(72), OUT8(80), OUT8(88), OUT8(96), OUT8(104), OUT8(112), OUT8(120)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#endif

/// As `copy_box`, of three dimensions.
DEVICE void copy_box3(u32 to, const TensorMap *map, int column, int middle, int row, u32 barrier, u64 policy) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
                 "l"(map), "r"(column), "r"(middle), "r"(row), "r"(barrier), "l"(policy)
                 : "memory");
}

/// A place in a ring of buffers and how often it went round.
struct Ring {
    int at;
    u32 parity;
    DEVICE void next() {
        if (++at == STAGES) at = 0, parity ^= 1;
    }
};

#endif

struct Args {
    const int *query_start, *context_len, *tiles;
    int tokens, num_seqs, ratio, kv_heads, context_room, window;
};

/// One tile, and which keys it sees.
struct Tile {
    int seq, kv_head;
    int row, tokens; // in the flat batch
    int position;    // of the first token
    int from, end;   // keys that some row sees
    int begin, steps;

    /// The list's tile `index`. No steps if its entry names nothing.
    DEVICE void load(const Args &a, int index) {
        steps = 0;
        seq = a.tiles[3 * index], kv_head = a.tiles[3 * index + 2];
        int first = a.tiles[3 * index + 1];
        if (seq < 0 || seq >= a.num_seqs || first < 0 || kv_head < 0 || kv_head >= a.kv_heads) return;
        int start = a.query_start[seq], chunk = a.query_start[seq + 1] - start;
        int context = min(a.context_len[seq], a.context_room);
        if (start < 0 || chunk <= first || start > a.tokens - chunk) return;
        row = start + first;
        tokens = min(ROWS / a.ratio, chunk - first);
        position = context - chunk + first;
        from = a.window > 0 ? max(0, position - a.window + 1) : 0;
        end = max(0, position + tokens);
        begin = from / KEYS * KEYS;
        steps = end > begin ? (end - begin + KEYS - 1) / KEYS : 0;
    }

    /// The next tile of the list that is there; no steps if none is left. `taken` counts them, and in the end, when every
    /// block has found that none is left, is zero again for the kernel after this one.
    DEVICE void take(const Args &a, u32 *taken, int total, int lane) {
        do {
            int index = 0;
            if (lane == 0) index = atomicInc(taken, total + gridDim.x - 1);
            index = __shfl_sync(FULL_WARP, index, 0);
            steps = 0;
            if (index >= total) return;
            load(a, index);
        } while (steps == 0);
    }
};
