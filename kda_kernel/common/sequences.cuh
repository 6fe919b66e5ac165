// Which tokens a sequence holds, in padded and in packed batches.
#pragma once

#include <cuda_bf16.h>

#include "params.h"

namespace kda {

struct Sequence {
  int64_t batch;  // index into the batch dimension
  int64_t begin;  // first token
  int32_t length;
};

__device__ __forceinline__ int64_t sequence_bound(const SequenceBounds& bounds, int64_t index) {
  return bounds.is_int64 ? static_cast<const int64_t*>(bounds.data)[index]
                         : static_cast<const int32_t*>(bounds.data)[index];
}

// Does cu_seqlens start at 0, never decrease and end at T? Called by every thread of the block, which all get the
// same answer: the host cannot look without a synchronisation, and a wrong boundary must never become an address.
__device__ __forceinline__ bool sequences_valid(const SequenceBounds& bounds, int64_t num_sequences,
                                                int64_t num_tokens) {
  bool wrong = false;
  for (int64_t i = threadIdx.x; i <= num_sequences; i += blockDim.x) {
    int64_t here = sequence_bound(bounds, i);
    int64_t before = i == 0 ? 0 : sequence_bound(bounds, i - 1);
    wrong |= here < before || (i == 0 && here != 0) || (i == num_sequences && here != num_tokens);
  }
  return __syncthreads_or(wrong) == 0;
}

// How many intermediate states the sequences before this one have; the same for every lane of the calling warp.
__device__ __forceinline__ int64_t intermediate_states_before(const SequenceBounds& bounds, int64_t index,
                                                              int64_t num_tokens) {
  const auto states = [](int64_t length) { return (length + kIntermediateStep - 1) / kIntermediateStep; };
  if (bounds.data == nullptr) return index * states(num_tokens);
  int64_t sum = 0;
  for (int64_t i = threadIdx.x % 32; i < index; i += 32) {
    sum += states(sequence_bound(bounds, i + 1) - sequence_bound(bounds, i));
  }
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  return sum;
}

// Calls f(number, index), on some lane of the calling warp, for each of the `count` sequences whose places, from the longest
// on, are first + number * step. Of more than 32 sequences a place is the index itself: then none is a large part of the
// work. Whatever the bounds say, every sequence has one place.
template <class F>
__device__ __forceinline__ void for_each_by_length(const SequenceBounds& bounds, int num_sequences, int first, int step,
                                                   int count, F f) {
  const int lane = threadIdx.x % 32;
  if (bounds.data == nullptr || num_sequences > 32) {
    for (int number = lane; number < count; number += 32) f(number, first + number * step);
    return;
  }
  const int64_t length = lane < num_sequences ? sequence_bound(bounds, lane + 1) - sequence_bound(bounds, lane) : -1;
  int place = 0;
  for (int other = 0; other < num_sequences; ++other) {
    const int64_t others = __shfl_sync(~0u, length, other);
    place += others > length || (others == length && other < lane);
  }
  if (lane < num_sequences && place % step == first) f(place / step, lane);
}

__device__ __forceinline__ Sequence sequence_at(const SequenceBounds& bounds, int64_t index, int64_t num_tokens) {
  int64_t begin = 0, length = num_tokens;
  if (bounds.data != nullptr) {
    begin = sequence_bound(bounds, index);
    length = sequence_bound(bounds, index + 1) - begin;
  }
  return {.batch = bounds.data == nullptr ? index : 0, .begin = begin, .length = static_cast<int32_t>(length)};
}

// The same sequence for every lane of the calling warp: its length comes from one of them, so that it is uniform to the
// compiler.
__device__ __forceinline__ Sequence find_sequence(const SequenceBounds& bounds, int64_t index, int64_t num_tokens) {
  Sequence sequence = sequence_at(bounds, index, num_tokens);
  sequence.length = __shfl_sync(~0u, sequence.length, 0);
  return sequence;
}

}  // namespace kda
