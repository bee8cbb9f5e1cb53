// Writes a line for every kernel and copy that a process runs on its GPUs: start and end (ns), grid, name. To be loaded by the
// driver, which needs no change of the program:
//
//     L=.libtorch/nvidia/cu13
//     gcc -O2 -shared -fPIC -I$L/include benches/trace/kernels.c -o target/kernels.so -L$L/lib -l:libcupti.so.13
//     CUDA_INJECTION64_PATH=$PWD/target/kernels.so TRACE=trace.txt target/release/nano-vllm-serve bench latency ...
//     python3 benches/trace/steps.py trace.txt --rows 128
//
// Kernels of captured graphs have a line each. In the 256 requests of RESULTS.md it costs about 1 % of the time.
#include <cupti.h>
#include <stdio.h>
#include <stdlib.h>

static FILE *out;

static void request(uint8_t **buffer, size_t *size, size_t *most) {
    *size = 16 << 20;
    *buffer = aligned_alloc(64, *size);
    *most = 0;
}

static void complete(CUcontext context, uint32_t stream, uint8_t *buffer, size_t size, size_t valid) {
    (void)context, (void)stream, (void)size;
    CUpti_Activity *record = NULL;
    while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
        if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
            CUpti_ActivityKernel10 *k = (void *)record;
            fprintf(out, "%llu %llu %d %d %d %s\n", (unsigned long long)k->start, (unsigned long long)k->end, k->gridX, k->gridY,
                    k->gridZ, k->name);
        } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
            CUpti_ActivityMemcpy6 *k = (void *)record;
            fprintf(out, "%llu %llu %llu 0 0 copy\n", (unsigned long long)k->start, (unsigned long long)k->end,
                    (unsigned long long)k->bytes);
        }
    }
    free(buffer);
}

static void end(void) {
    cuptiActivityFlushAll(1);
    fflush(out);
}

int InitializeInjection(void) {
    const char *path = getenv("TRACE");
    out = fopen(path ? path : "trace.txt", "w");
    if (!out) {
        perror("TRACE");
        return 0;
    }
    setvbuf(out, NULL, _IOFBF, 1 << 20);
    cuptiActivityRegisterCallbacks(request, complete);
    CUptiResult kernels = cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
    CUptiResult copies = cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMCPY);
    if (kernels || copies) fprintf(stderr, "CUPTI does not trace: %d, %d\n", kernels, copies);
    // A process that does not end in the usual way has written most of it.
    cuptiActivityFlushPeriod(200);
    atexit(end);
    return 1;
}
