// specgen: entry=scaled_softmax(in0, weight.scale, out0, in0.shape[0]:int, in0.shape[1]:int, stream)
// specgen: out0=like(in0)
#include <cuda_runtime.h>

namespace {

constexpr int kThreads = 256;

__device__ float BlockReduce(float value, bool largest, float* shared) {
    for (int offset = 16; offset > 0; offset /= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, value, offset);
        value = largest ? fmaxf(value, other) : value + other;
    }
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    value = shared[0];
    for (int warp = 1; warp < kThreads / 32; ++warp)
        value = largest ? fmaxf(value, shared[warp]) : value + shared[warp];
    __syncthreads();
    return value;
}

__global__ void ScaledSoftmax(const float* __restrict__ x, const float* __restrict__ scale, float* __restrict__ y,
                              int columns) {
    __shared__ float shared[kThreads / 32];
    const float* row = x + static_cast<long long>(blockIdx.x) * columns;
    float* out = y + static_cast<long long>(blockIdx.x) * columns;
    float largest = -INFINITY;
    for (int at = threadIdx.x; at < columns; at += kThreads) largest = fmaxf(largest, row[at]);
    largest = BlockReduce(largest, true, shared);
    float sum = 0.0f;
    for (int at = threadIdx.x; at < columns; at += kThreads) sum += __expf(row[at] - largest);
    sum = BlockReduce(sum, false, shared);
    for (int at = threadIdx.x; at < columns; at += kThreads) out[at] = __expf(row[at] - largest) / sum * scale[at];
}

}  // namespace

extern "C" int scaled_softmax(const float* x, const float* scale, float* y, int rows, int columns,
                              cudaStream_t stream) {
    ScaledSoftmax<<<rows, kThreads, 0, stream>>>(x, scale, y, columns);
    return cudaGetLastError();
}
