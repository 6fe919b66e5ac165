// Short convolution and SiLU of q|k|v: y_t = SiLU(bias + sum_j weight[:, j] x_{t - (W - 1) + j}).
//
// A block takes a tile of tokens of 8 * kThreads channels; a thread walks the tile with 8 channels and the last W - 1
// inputs in registers. The tile in which a sequence begins computes its first W - 1 tokens, even past the tile's end:
// so one thread alone reads a sequence's initial state and then writes its final state, which may be the same memory.
#include "common/sequences.cuh"
#include "layer/launch.h"
#include "layer/vector.cuh"

namespace kda {
namespace layer {
namespace {

constexpr int kThreads = 256;
// Tokens of a tile: 2 (W - 1) of 16 are read a second time, mostly out of L2; longer tiles leave too few threads.
constexpr int kTile = 16;
// Tokens whose loads a thread has in flight; 8 do not fit the registers of two blocks on a multiprocessor.
constexpr int kBatch = 4;

// What one thread works on: 8 channels of one row of the batch.
struct Channels {
  const __nv_bfloat16* x;  // of token 0
  __nv_bfloat16* y;
  int64_t x_stride;
  int64_t y_stride;
  int64_t first;  // among the channels of q|k|v
};

__device__ __forceinline__ Channels find_channels(const ShortConvParams& p, int64_t group, int64_t row) {
  const int64_t first = group * kChannelVector;
  ChannelTensor x = p.x[0], y = p.y[0];
  int64_t local = first;
  if (local >= x.channels) {
    local -= x.channels;
    x = p.x[1], y = p.y[1];
    if (local >= x.channels) {
      local -= x.channels;
      x = p.x[2], y = p.y[2];
    }
  }
  return {.x = static_cast<const __nv_bfloat16*>(x.data) + row * x.batch_stride + local,
          .y = static_cast<__nv_bfloat16*>(y.data) + row * y.batch_stride + local,
          .x_stride = x.token_stride,
          .y_stride = y.token_stride,
          .first = first};
}

template <int W, bool kAligned>
struct Conv {
  float weight[W][kChannelVector];
  uint4 before[W - 1];  // the inputs before the next token, the oldest first

  __device__ __forceinline__ void load_weights(const ShortConvParams& p, int64_t first) {
#pragma unroll
    for (int part = 0; part < W; ++part) {
      const Floats x = load_as<kAligned>(p.weight_dtype, p.weight, first * W + part * kChannelVector);
#pragma unroll
      for (int i = 0; i < kChannelVector; ++i) {
        const int place = part * kChannelVector + i;
        weight[place % W][place / W] = x.at[i];
      }
    }
  }

  // The inputs before `token`, all of its sequence.
  __device__ __forceinline__ void load_before(const Channels& c, int64_t token) {
#pragma unroll
    for (int j = 0; j < W - 1; ++j) before[j] = load_raw<kAligned>(c.x + (token - (W - 1) + j) * c.x_stride);
  }

  // The inputs before a sequence's first token.
  __device__ __forceinline__ void load_before(const Channels& c, const ConvInputs& state, int64_t sequence) {
    const auto* source = static_cast<const uint16_t*>(state.data) + sequence * state.sequence_stride +
                         (state.columns - (W - 1)) * state.column_stride + c.first * state.channel_stride;
#pragma unroll
    for (int j = 0; j < W - 1; ++j) {
      auto pair = [&](int i) -> uint32_t {
        if (state.data == nullptr) return 0;
        const auto* low = source + i * state.channel_stride + j * state.column_stride;
        return low[0] | static_cast<uint32_t>(low[state.channel_stride]) << 16;
      };
      before[j] = make_uint4(pair(0), pair(2), pair(4), pair(6));
    }
  }

  // `count` tokens from `begin` on, with `before` at begin.
  __device__ __forceinline__ void walk(const ShortConvParams& p, const Channels& c, int64_t begin, int count) {
    const __nv_bfloat16* x = c.x + begin * c.x_stride;
    __nv_bfloat16* y = c.y + begin * c.y_stride;
#pragma unroll 1
    for (; count > 0; count -= kBatch) {
      uint4 raw[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i, x += c.x_stride) {
        if (i < count) raw[i] = load_raw<kAligned>(x);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i, y += c.y_stride) {
        if (i < count) store<kAligned>(y, step(p, c, raw[i]));
      }
    }
  }

  __device__ __forceinline__ Floats step(const ShortConvParams& p, const Channels& c, uint4 x) {
    Floats y = {};
    // Read again for every token: no published model has one, and registers are short.
    if (p.bias != nullptr) y = load_as<kAligned>(p.bias_dtype, p.bias, c.first);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const Floats input = to_floats(j < W - 1 ? before[j] : x);
#pragma unroll
      for (int i = 0; i < kChannelVector; ++i) y.at[i] = fmaf(weight[j][i], input.at[i], y.at[i]);
    }
#pragma unroll
    for (int i = 0; i < kChannelVector; ++i) y.at[i] *= sigmoid(y.at[i]);
#pragma unroll
    for (int j = 0; j < W - 2; ++j) before[j] = before[j + 1];
    before[W - 2] = x;
    return y;
  }
};

// The last inputs of a sequence of tokens [begin, begin + length), oldest first. A column comes from the inputs or from
// a column of the initial state that is not further left, so both states may be one.
__device__ __forceinline__ void store_final_state(const ShortConvParams& p, const Channels& c, int64_t sequence,
                                                  int64_t begin, int64_t length) {
  const ConvInputs& from = p.initial_state;
  const ConvInputs& to = p.final_state;
  const auto* inputs = reinterpret_cast<const uint16_t*>(c.x) + begin * c.x_stride;
  const auto* source = static_cast<const uint16_t*>(from.data) + sequence * from.sequence_stride;
  auto* target = static_cast<uint16_t*>(to.data) + sequence * to.sequence_stride;
#pragma unroll 1
  for (int i = 0; i < kChannelVector; ++i) {
#pragma unroll 1
    for (int64_t column = 0; column < to.columns; ++column) {
      const int64_t token = length - to.columns + column;  // negative: before the sequence
      uint16_t x = 0;
      if (token >= 0) {
        x = inputs[token * c.x_stride + i];
      } else if (from.data != nullptr && from.columns + token >= 0) {
        x = source[(c.first + i) * from.channel_stride + (from.columns + token) * from.column_stride];
      }
      target[(c.first + i) * to.channel_stride + column * to.column_stride] = x;
    }
  }
}

// cu_seqlens do not go from 0 to T without a decrease: NaN for the tile's tokens and for every `tiles`-th final state.
template <bool kAligned>
__device__ __forceinline__ void poison(const ShortConvParams& p, const Channels& c, int64_t begin, int64_t end,
                                       int64_t tile, int64_t tiles) {
  const float nan = __int_as_float(0x7fffffff);
  for (int64_t token = begin; token < end; ++token) {
    store<kAligned>(c.y + token * c.y_stride, {nan, nan, nan, nan, nan, nan, nan, nan});
  }
  const ConvInputs& state = p.final_state;
  if (state.data == nullptr) return;
  for (int64_t n = tile; n < p.num_sequences; n += tiles) {
    auto* target = static_cast<__nv_bfloat16*>(state.data) + n * state.sequence_stride + c.first * state.channel_stride;
    for (int64_t place = 0; place < kChannelVector * state.columns; ++place) {
      target[place / state.columns * state.channel_stride + place % state.columns * state.column_stride] =
          __float2bfloat16_rn(nan);
    }
  }
}

// The packed sequence that `token` continues, else the first that begins there or later; -1 where cu_seqlens are not
// valid (as in sequences_valid). Every thread of the block gets the same answer.
__device__ __forceinline__ int64_t sequence_at(const ShortConvParams& p, int64_t token) {
  if (!sequences_valid(p.cu_seqlens, p.num_sequences, p.num_tokens)) return -1;
  int64_t low = 0, high = p.num_sequences;  // the number of sequences that begin before the token
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (sequence_bound(p.cu_seqlens, middle) < token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return max(low - 1, int64_t{0});
}

template <int W, bool kAligned>
__global__ void __launch_bounds__(kThreads, 2)
    short_conv_kernel(const __grid_constant__ ShortConvParams p, int64_t tiles, int64_t groups) {
  static_assert(kTile >= W - 1);
  const int64_t row = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int64_t begin = tile * kTile, end = min(begin + kTile, p.num_tokens);
  const bool packed = p.cu_seqlens.data != nullptr;
  int64_t n = packed ? sequence_at(p, begin) : row;

  const int64_t group = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (group >= groups) return;
  const Channels c = find_channels(p, group, row);
  if (n < 0) return poison<kAligned>(p, c, begin, end, tile, tiles);

  const int64_t sequences = packed ? p.num_sequences : row + 1;
  Conv<W, kAligned> conv;
  conv.load_weights(p, c.first);
#pragma unroll 1
  for (; n < sequences; ++n) {
    const int64_t first = packed ? sequence_bound(p.cu_seqlens, n) : 0;
    const int64_t last = packed ? sequence_bound(p.cu_seqlens, n + 1) : p.num_tokens;
    if (first >= end && tile + 1 < tiles) break;  // the last tile has the empty sequences at T, too
    const bool begins_here = first >= begin;
    const int64_t from = begins_here ? first : max(begin, first + W - 1);
    const int64_t to = min(last, begins_here ? max(end, first + W - 1) : end);
    if (from < to) {
      if (begins_here) {
        conv.load_before(c, p.initial_state, n);
      } else {
        conv.load_before(c, from);
      }
      conv.walk(p, c, from, static_cast<int>(to - from));
    }
    if (begins_here && p.final_state.data != nullptr) store_final_state(p, c, n, first, last - first);
  }
}

template <int W>
cudaError_t launch(const ShortConvParams& p, cudaStream_t stream) {
  const int64_t groups = (p.x[0].channels + p.x[1].channels + p.x[2].channels) / kChannelVector;
  const int64_t tiles = p.num_tokens == 0 ? 1 : (p.num_tokens + kTile - 1) / kTile;
  const dim3 grid(static_cast<unsigned>(tiles * p.num_rows), static_cast<unsigned>((groups + kThreads - 1) / kThreads));
  const auto kernel = p.aligned ? short_conv_kernel<W, true> : short_conv_kernel<W, false>;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = kThreads, config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, p, tiles, groups);
}

}  // namespace
}  // namespace layer

cudaError_t launch_short_conv(const ShortConvParams& params, cudaStream_t stream) {
  switch (params.width) {
    case 2: return layer::launch<2>(params, stream);
    case 3: return layer::launch<3>(params, stream);
    default: return layer::launch<4>(params, stream);
  }
}

}  // namespace kda
