// Which tokens a sequence has, and which slots of the state pool it reads and writes. docs/decode.md has the rules.
#pragma once

#include "common/sequences.cuh"
#include "params.h"

namespace kda::decode {

// Padding: zeros as output and in final_state. Invalid: NaN there. Neither touches the pool.
enum class RowKind { kLive, kPadding, kInvalid };

constexpr int64_t kPaddingIndex = -1;

struct StartSlot {
  RowKind kind;
  int64_t slot;
};

__device__ __forceinline__ int64_t index_at(const IndexTensor& x, int64_t row, int64_t column) {
  const int64_t offset = row * x.row_stride + column * x.column_stride;
  return x.is_int64 ? static_cast<const int64_t*>(x.data)[offset] : static_cast<const int32_t*>(x.data)[offset];
}

// Where a sequence's state before its first token stands.
__device__ __forceinline__ StartSlot start_slot(const DecodeParams& p, int64_t sequence) {
  if (p.state_indices.data == nullptr) return {RowKind::kLive, sequence};
  int64_t column = 0;
  if (p.num_accepted_tokens.data != nullptr) {
    column = index_at(p.num_accepted_tokens, sequence, 0) - 1;
    if (column < 0 || column >= p.slots_per_sequence) return {RowKind::kInvalid, 0};
  }
  const int64_t slot = index_at(p.state_indices, sequence, column);
  if (slot == kPaddingIndex) return {RowKind::kPadding, 0};
  if (slot < 0 || slot >= p.initial_state.num_slots) return {RowKind::kInvalid, 0};
  return {RowKind::kLive, slot};
}

// Can the state after each of the sequence's tokens be kept? Called by every thread of the block, which all get the
// same answer, where states are kept per token.
__device__ __forceinline__ bool token_slots_valid(const DecodeParams& p, int64_t sequence, int32_t length) {
  bool wrong = length > p.slots_per_sequence;
  if (!wrong) {
    for (int32_t t = threadIdx.x; t < length; t += blockDim.x) {
      const int64_t slot = index_at(p.state_indices, sequence, t);
      wrong |= slot < kPaddingIndex || slot >= p.initial_state.num_slots;
    }
  }
  return __syncthreads_or(wrong) == 0;
}

// Where a sequence's tokens stand: Sequence in half its registers, which the state is short of.
struct Tokens {
  int32_t batch, begin, length;
};

// None where a boundary is not inside the batch: cu_seqlens are checked as a whole only once the state is on its way.
__device__ __forceinline__ Tokens find_tokens(const DecodeParams& p, int64_t index) {
  const Sequence x = find_sequence(p.cu_seqlens, index, p.num_tokens);
  const bool inside = x.begin >= 0 && x.length >= 0 && x.begin + x.length <= p.num_tokens;
  if (!inside) return {.batch = 0, .begin = 0, .length = 0};
  return {.batch = static_cast<int32_t>(x.batch), .begin = static_cast<int32_t>(x.begin), .length = x.length};
}

// Element offset of a token's row at a head.
__device__ __forceinline__ int64_t row_offset(const TokenTensor& x, const Tokens& tokens, int32_t token, int head) {
  return tokens.batch * x.batch_stride + (tokens.begin + token) * x.token_stride + head * x.head_stride;
}

// Which slot gets the state after a token, or a negative number if none does: without slots per token it is the
// start slot, or slot `sequence` of final_state, and the token is the last. kPlain: so it is.
template <bool kPlain>
__device__ __forceinline__ int64_t slot_after(const DecodeParams& p, int64_t sequence, int64_t start, int32_t token,
                                              bool last) {
  if (!kPlain && p.slots_per_sequence > 0) return index_at(p.state_indices, sequence, token);
  return last ? (p.inplace ? start : sequence) : kPaddingIndex;
}

}  // namespace kda::decode
