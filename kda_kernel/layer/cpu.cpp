// The operators around the delta rule on a CPU. Plain vectors of 4: they are bound by memory and by exp.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "backend.h"
#include "cpu/sequences.h"

namespace kda::cpu {
namespace {
constexpr int kLanes = 4;
}
}  // namespace kda::cpu

#include "cpu/simd.h"

namespace kda::cpu {
namespace {

constexpr int64_t kBlock = 64;      // channels that are walked together: two or four cache lines of a token
constexpr int64_t kMaxWidth = 4;    // of the convolution
constexpr int64_t kGrainRows = 64;  // rows of the norm for one thread, at least

void store_scalar_as(FloatKind dtype, void* data, int64_t index, float x) {
  if (dtype == FloatKind::kFloat32) {
    static_cast<float*>(data)[index] = x;
    return;
  }
  uint16_t rounded[kLanes];
  store_bf16(rounded, splat(x));
  static_cast<uint16_t*>(data)[index] = rounded[0];
}

// A block of channels of q, k or v.
struct Channels {
  const ChannelTensor& x;
  const ChannelTensor& y;
  int64_t local;  // the first, among those of x
  int64_t first;  // among those of q|k|v
  int64_t count;  // a multiple of kLanes
};

// Column `column` of the final state is the input of token `length` - columns + `column`; the order is safe where both
// states are one.
void store_final_state(const ShortConvParams& p, const Channels& c, int64_t sequence, int64_t row_start,
                       int64_t length) {
  const ConvInputs& from = p.initial_state;
  const ConvInputs& to = p.final_state;
  for (int64_t i = 0; i < c.count; ++i) {
    for (int64_t column = 0; column < to.columns; ++column) {
      const int64_t token = length - to.columns + column;
      float x = 0.0f;
      if (token >= 0) {
        x = load_scalar_as(p.dtype, c.x.data, row_start + token * c.x.token_stride + c.local + i);
      } else if (from.data != nullptr && from.columns + token >= 0) {
        x = load_scalar_as(p.dtype, from.data,
                           sequence * from.sequence_stride + (c.first + i) * from.channel_stride +
                               (from.columns + token) * from.column_stride);
      }
      store_scalar_as(p.dtype, to.data,
                      sequence * to.sequence_stride + (c.first + i) * to.channel_stride + column * to.column_stride, x);
    }
  }
}

// One sequence of a block of channels: tokens [begin, end) of a row of the batch.
void convolve(const ShortConvParams& p, const Channels& c, int64_t sequence, int64_t row, int64_t begin, int64_t end) {
  const int64_t W = p.width;
  float weight[kMaxWidth][kBlock], bias[kBlock], recent[kMaxWidth][kBlock];  // recent[t % W]: the input of token t
  for (int64_t i = 0; i < c.count; ++i) {
    for (int64_t j = 0; j < W; ++j) weight[j][i] = load_scalar_as(p.weight_dtype, p.weight, (c.first + i) * W + j);
    bias[i] = p.bias == nullptr ? 0.0f : load_scalar_as(p.bias_dtype, p.bias, c.first + i);
    const ConvInputs& state = p.initial_state;
    for (int64_t back = 1; back < W; ++back) {
      recent[W - back][i] = state.data == nullptr
                                ? 0.0f
                                : load_scalar_as(p.dtype, state.data,
                                                 sequence * state.sequence_stride +
                                                     (c.first + i) * state.channel_stride +
                                                     (state.columns - back) * state.column_stride);
    }
  }
  const int64_t x_start = row * c.x.batch_stride + begin * c.x.token_stride;
  const int64_t y_start = row * c.y.batch_stride + begin * c.y.token_stride;
  for (int64_t t = 0; t < end - begin; ++t) {
    for (int64_t i = 0; i < c.count; i += kLanes) {
      store(&recent[t % W][i], load_as(p.dtype, c.x.data, x_start + t * c.x.token_stride + c.local + i));
      Vec y = load(&bias[i]);
      for (int64_t j = 0; j < W; ++j) y += load(&weight[j][i]) * load(&recent[(t + 1 + j) % W][i]);
      store_as(p.dtype, c.y.data, y_start + t * c.y.token_stride + c.local + i, y * sigmoid(y));
    }
  }
  if (p.final_state.data != nullptr) store_final_state(p, c, sequence, x_start, end - begin);
}

// One row of kHeadDim channels.
void normalise(const GatedNormParams& p, int64_t row) {
  const int64_t head = row % p.num_heads, token = row / p.num_heads % p.num_tokens,
                batch = row / p.num_heads / p.num_tokens;
  auto start = [&](const TokenTensor& x) {
    return batch * x.batch_stride + token * x.token_stride + head * x.head_stride;
  };
  float x[kHeadDim];
  Vec squares = splat(0.0f);
  for (int i = 0; i < kHeadDim; i += kLanes) {
    const Vec part = load_as(p.dtype, p.x.data, start(p.x) + i);
    squares += part * part;
    store(&x[i], part);
  }
  const float scale = 1.0f / std::sqrt(sum(squares) / kHeadDim + p.eps);
  for (int i = 0; i < kHeadDim; i += kLanes) {
    const Vec gate = load_as(p.dtype, p.gate.data, start(p.gate) + i);
    const Vec act = p.silu ? gate * sigmoid(gate) : sigmoid(gate);
    const Vec y = load(&x[i]) * scale * load_as(p.weight_dtype, p.weight, i) * act;
    store_as(p.dtype, const_cast<void*>(p.out.data), start(p.out) + i, y);
  }
}

}  // namespace
}  // namespace kda::cpu

void kda::run_short_conv(const ShortConvParams& p, int32_t) {
  using namespace cpu;
  const bool packed = p.cu_seqlens.data != nullptr;
  const auto bounds =
      packed ? sequence_bounds(p.cu_seqlens, p.num_sequences, p.num_tokens) : std::vector<int64_t>{};
  std::vector<Channels> blocks;
  int64_t first = 0;
  for (int part = 0; part < 3; ++part) {
    const int64_t channels = p.x[part].channels;
    for (int64_t local = 0; local < channels; local += kBlock) {
      blocks.push_back({p.x[part], p.y[part], local, first + local, std::min(kBlock, channels - local)});
    }
    first += channels;
  }
  const int64_t count = static_cast<int64_t>(blocks.size());
  torch::stable::parallel_for(0, count * p.num_sequences, 1, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t n = job / count;
      const Channels& block = blocks[job % count];
      if (packed) {
        convolve(p, block, n, 0, bounds[n], bounds[n + 1]);
      } else {
        convolve(p, block, n, n, 0, p.num_tokens);
      }
    }
  });
}

void kda::run_gated_norm(const GatedNormParams& p, int32_t) {
  const int64_t rows = p.num_rows * p.num_tokens * p.num_heads;
  torch::stable::parallel_for(0, rows, cpu::kGrainRows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) cpu::normalise(p, row);
  });
}
