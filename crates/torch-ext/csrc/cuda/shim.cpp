// What the CUDA half of libtorch has and tch does not bind, as C functions. Built into a shared object that is
// opened after libtorch_cuda (see src/cuda/shim.rs), so the program itself needs no CUDA library to start.
//
// Every function returns null, or a message that the caller frees with te_free.
#include <ATen/cuda/CUDAGraph.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdlib>
#include <cstring>
#include <exception>

namespace {

template <class F>
char* guarded(F&& f) noexcept {
    try {
        f();
        return nullptr;
    } catch (const c10::Error& e) {
        return strdup(e.what_without_backtrace());
    } catch (const std::exception& e) {
        return strdup(e.what());
    } catch (...) {
        return strdup("unknown C++ exception");
    }
}

void check(cudaError_t error) {
    TORCH_CHECK(error == cudaSuccess, cudaGetErrorString(error));
}

}  // namespace

extern "C" {

void te_free(char* message) { std::free(message); }

// A stream of libtorch's pool, which lives as long as the process.
char* te_stream_new(int device, void** out) {
    return guarded([&] {
        auto index = static_cast<c10::DeviceIndex>(device);
        c10::cuda::set_device(index);
        *out = c10::cuda::getStreamFromPool(/*isHighPriority=*/true, index).stream();
    });
}

// Makes the device and the stream the calling thread's current ones.
char* te_stream_set(int device, void* stream) {
    return guarded([&] {
        auto index = static_cast<c10::DeviceIndex>(device);
        c10::cuda::set_device(index);
        c10::cuda::setCurrentCUDAStream(
            c10::cuda::getStreamFromExternal(static_cast<cudaStream_t>(stream), index));
    });
}

char* te_stream_current(int device, void** out) {
    return guarded([&] { *out = c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(device)).stream(); });
}

char* te_stream_synchronize(int device) {
    return guarded([&] { c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(device)).synchronize(); });
}

// Waits for all streams of a device.
char* te_device_synchronize(int device) {
    return guarded([&] {
        c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
        check(cudaDeviceSynchronize());
    });
}

// dst.copy_(src) that does not wait; src or dst should be pinned.
char* te_copy_async(at::Tensor* dst, const at::Tensor* src) {
    return guarded([&] { dst->copy_(*src, /*non_blocking=*/true); });
}

// Pinned memory of a host tensor's shape in its place, with what it holds if `keep`.
char* te_pin(at::Tensor* tensor, int keep) {
    return guarded([&] {
        at::Tensor pinned = at::empty(tensor->sizes(), tensor->options().pinned_memory(true));
        if (keep) pinned.copy_(*tensor);
        *tensor = pinned;
    });
}

char* te_memory(int device, uint64_t* free, uint64_t* total, uint64_t* allocated, uint64_t* reserved) {
    return guarded([&] {
        c10::cuda::set_device(static_cast<c10::DeviceIndex>(device));
        size_t f = 0, t = 0;
        check(cudaMemGetInfo(&f, &t));
        using c10::CachingAllocator::StatType;
        auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(static_cast<c10::DeviceIndex>(device));
        auto all = static_cast<size_t>(StatType::AGGREGATE);
        *free = f;
        *total = t;
        *allocated = stats.allocated_bytes[all].current;
        *reserved = stats.reserved_bytes[all].current;
    });
}

// Gives what libtorch holds and does not use back to the driver.
char* te_memory_release() {
    return guarded([] { c10::cuda::CUDACachingAllocator::emptyCache(); });
}

char* te_graph_pool(uint64_t* pool) {
    return guarded([&] {
        auto id = at::cuda::graph_pool_handle();
        pool[0] = id.first;
        pool[1] = id.second;
    });
}

char* te_graph_begin(const uint64_t* pool, void** out) {
    return guarded([&] {
        auto graph = std::make_unique<at::cuda::CUDAGraph>();
        // Only this thread's calls are checked: others may allocate meanwhile.
        graph->capture_begin({pool[0], pool[1]}, cudaStreamCaptureModeThreadLocal);
        *out = graph.release();
    });
}

// Ends the capture, and brings the graph to the device: a first replay would do that, and wait there for what runs.
char* te_graph_end(void* graph) {
    return guarded([&] {
        auto captured = static_cast<at::cuda::CUDAGraph*>(graph);
        captured->capture_end();
        check(cudaGraphUpload(captured->raw_cuda_graph_exec(), c10::cuda::getCurrentCUDAStream().stream()));
    });
}

// Not CUDAGraph::replay, which first brings the device's random generator up to date, with two kernels and without a
// lock: no captured kernel draws from it.
char* te_graph_replay(void* graph) {
    return guarded([&] {
        auto exec = static_cast<at::cuda::CUDAGraph*>(graph)->raw_cuda_graph_exec();
        check(cudaGraphLaunch(exec, c10::cuda::getCurrentCUDAStream().stream()));
    });
}

char* te_graph_free(void* graph) {
    return guarded([&] { delete static_cast<at::cuda::CUDAGraph*>(graph); });
}

// Events belong to a device, and its default stream is that of the current device: threads that load weights have
// another one.
char* te_event_new(int device, int timing, void** out) {
    return guarded([&] {
        c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
        cudaEvent_t event = nullptr;
        check(cudaEventCreateWithFlags(&event, timing ? cudaEventDefault : cudaEventDisableTiming));
        *out = event;
    });
}

char* te_event_free(void* event) {
    return guarded([&] { check(cudaEventDestroy(static_cast<cudaEvent_t>(event))); });
}

char* te_event_record(void* event, int device) {
    return guarded([&] {
        c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
        auto stream = c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(device)).stream();
        check(cudaEventRecord(static_cast<cudaEvent_t>(event), stream));
    });
}

char* te_event_wait(void* event, int device) {
    return guarded([&] {
        c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
        auto stream = c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(device)).stream();
        check(cudaStreamWaitEvent(stream, static_cast<cudaEvent_t>(event), 0));
    });
}

char* te_event_synchronize(void* event) {
    return guarded([&] { check(cudaEventSynchronize(static_cast<cudaEvent_t>(event))); });
}

char* te_event_query(void* event, int* done) {
    return guarded([&] {
        auto state = cudaEventQuery(static_cast<cudaEvent_t>(event));
        if (state == cudaErrorNotReady) {
            // Not a failure, but the runtime remembers it as its last error.
            (void)cudaGetLastError();
        } else {
            check(state);
        }
        *done = state == cudaSuccess;
    });
}

char* te_event_elapsed(void* start, void* end, float* ms) {
    return guarded(
        [&] { check(cudaEventElapsedTime(ms, static_cast<cudaEvent_t>(start), static_cast<cudaEvent_t>(end))); });
}

}  // extern "C"
