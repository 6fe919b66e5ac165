// Gated RMS norm: out = x rsqrt(mean(x^2) + eps) weight act(gate), act the sigmoid or SiLU, over rows of 128 channels.
//
// Half a warp has a row, 8 channels a lane. A thread reads what it writes and nothing else, so out may be x or gate.
#include "layer/launch.h"
#include "layer/vector.cuh"

namespace kda {
namespace layer {
namespace {

constexpr int kThreads = 256;
constexpr int kRowLanes = kHeadDim / kChannelVector;
constexpr int kRowsAtOnce = kThreads / kRowLanes;
constexpr int kBatch = 4;  // rows of a thread, all of whose loads are in flight together
static_assert(kRowLanes == 16, "the sum below exchanges over half a warp");

struct Shape {
  uint32_t rows;
  uint32_t tokens;
  uint32_t heads;
};

__device__ __forceinline__ int64_t offset_of(const TokenTensor& x, uint32_t b, uint32_t t, uint32_t h) {
  return b * x.batch_stride + t * x.token_stride + h * x.head_stride;
}

template <bool kAligned>
__global__ void __launch_bounds__(kThreads, 2)
    gated_norm_kernel(const __grid_constant__ GatedNormParams p, Shape shape) {
  const uint32_t channel = threadIdx.x % kRowLanes * kChannelVector;
  const uint32_t first = blockIdx.x * (kRowsAtOnce * kBatch) + threadIdx.x / kRowLanes;
  uint4 x_raw[kBatch] = {}, gate_raw[kBatch] = {};
  int64_t target[kBatch];
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    const uint32_t row = first + i * kRowsAtOnce;
    if (row >= shape.rows) continue;
    const uint32_t token = row / shape.heads, h = row % shape.heads, b = token / shape.tokens, t = token % shape.tokens;
    x_raw[i] = load_raw<kAligned>(static_cast<const __nv_bfloat16*>(p.x.data) + offset_of(p.x, b, t, h) + channel);
    gate_raw[i] =
        load_raw<kAligned>(static_cast<const __nv_bfloat16*>(p.gate.data) + offset_of(p.gate, b, t, h) + channel);
    target[i] = offset_of(p.out, b, t, h) + channel;
  }
  const Floats weight = load_as<kAligned>(p.weight_dtype, p.weight, channel);

#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    const Floats x = to_floats(x_raw[i]), gate = to_floats(gate_raw[i]);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kChannelVector; ++j) sum = fmaf(x.at[j], x.at[j], sum);
#pragma unroll
    for (int lane = kRowLanes / 2; lane > 0; lane /= 2) sum += __shfl_xor_sync(~0u, sum, lane);
    const float scale = rsqrtf(sum / kHeadDim + p.eps);
    Floats y;
#pragma unroll
    for (int j = 0; j < kChannelVector; ++j) {
      const float act = p.silu ? gate.at[j] * sigmoid(gate.at[j]) : sigmoid(gate.at[j]);
      y.at[j] = x.at[j] * scale * weight.at[j] * act;
    }
    if (first + i * kRowsAtOnce < shape.rows) {
      store<kAligned>(static_cast<__nv_bfloat16*>(const_cast<void*>(p.out.data)) + target[i], y);
    }
  }
}

}  // namespace
}  // namespace layer

cudaError_t launch_gated_norm(const GatedNormParams& params, cudaStream_t stream) {
  using namespace layer;
  const Shape shape{.rows = static_cast<uint32_t>(params.num_rows * params.num_tokens * params.num_heads),
                    .tokens = static_cast<uint32_t>(params.num_tokens),
                    .heads = static_cast<uint32_t>(params.num_heads)};
  const uint32_t blocks = (shape.rows + kRowsAtOnce * kBatch - 1) / (kRowsAtOnce * kBatch);
  const auto kernel = params.aligned ? gated_norm_kernel<true> : gated_norm_kernel<false>;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks, config.blockDim = kThreads, config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, params, shape);
}

}  // namespace kda
