// How a warp holds its part of a state, and how that part gets there and back.
//
// A warp owns 16 values of V with all 128 channels of K, 64 numbers a lane: kTileV values times kTileK channels. Lanes
// lie side by side along K (kKLanes of them) and then along V, so that a sum over K is one over neighbouring lanes and
// no warp needs another's.
//
//              a lane moves 16 bytes along  kKLanes x kVLanes  kTileV x kTileK  bytes side by side
//   V-first fp32                         K            8 x 4           4 x 16           128
//   V-first bf16                         K            8 x 4           4 x 16           128
//   K-first fp32                         V            8 x 4           4 x 16            64
//   K-first bf16                         V           16 x 2           8 x 8             32
#pragma once

#include "common/ptx.cuh"
#include "params.h"

namespace kda::decode {

constexpr int kWarpValues = 16;
constexpr int kWarpsPerHead = kHeadDim / kWarpValues;

template <class Elem, bool kVFirst>
struct Tile {
  static constexpr int kVector = 16 / sizeof(Elem);
  static constexpr int kVLanes = kVFirst ? 4 : kWarpValues / kVector;
  static constexpr int kKLanes = 32 / kVLanes;
  static constexpr int kTileV = kWarpValues / kVLanes;
  static constexpr int kTileK = kHeadDim / kKLanes;
  static constexpr int kRun = kVFirst ? kVector : 4;  // neighbouring channels that a lane holds
  static constexpr int kPieces = kTileV * kTileK / kVector;
  static_assert(2 * kTileV == kKLanes, "one lane for each sum of reduce_over_k");

  using Values = float[kTileV][kTileK];

  static __device__ __forceinline__ int k_lane(int lane) { return lane % kKLanes; }
  static __device__ __forceinline__ int v_lane(int lane) { return lane / kKLanes; }

  // Which of the warp's 16 values the lane's i-th is.
  static __device__ __forceinline__ int value(int i, int lane) {
    return kVFirst ? i * kVLanes + v_lane(lane) : v_lane(lane) * kTileV + i;
  }

  // Which channel a lane's j-th is, but for the lane's own kRun * k_lane.
  static __device__ __forceinline__ constexpr int channel_step(int j) { return j / kRun * kKLanes * kRun + j % kRun; }

  // Vectors over K stand in shared memory in fours, and that with a lane's 4 m-th channel is the one numbered
  // m * kKLanes + k_lane: a read of neighbouring lanes is one of neighbouring addresses.
  static __device__ __forceinline__ int place_of_four(int four) {
    if constexpr (kRun == 4) return four;
    const int half = four % 2, run = four / 2;
    return (run / kKLanes * 2 + half) * kKLanes + run % kKLanes;
  }

  // Element offset of the lane's first piece in the head's state, and that of the piece-th from there.
  static __device__ __forceinline__ int lane_offset(int warp_value, int lane) {
    const int value_offset = warp_value + value(0, lane), channel = kRun * k_lane(lane);
    return kVFirst ? value_offset * kHeadDim + channel : channel * kHeadDim + value_offset;
  }
  static __device__ __forceinline__ constexpr int piece_offset(int piece) {
    if constexpr (!kVFirst) return channel_step(piece) * kHeadDim;
    constexpr int kPerValue = kTileK / kVector;
    return piece / kPerValue * kVLanes * kHeadDim + channel_step(piece % kPerValue * kVector);
  }

  // Element `e` of a piece is value i and channel j of the lane.
  static __device__ __forceinline__ constexpr int value_index(int piece, int e) {
    return kVFirst ? piece / (kTileK / kVector) : e;
  }
  static __device__ __forceinline__ constexpr int channel_index(int piece, int e) {
    return kVFirst ? piece % (kTileK / kVector) * kVector + e : piece;
  }

  static __device__ __forceinline__ void fill(Values& s, float x) {
#pragma unroll
    for (int i = 0; i < kTileV; ++i) {
#pragma unroll
      for (int j = 0; j < kTileK; ++j) s[i][j] = x;
    }
  }

  // The bits as they lie in memory: a pair of bf16 stands in the place of its first until unpack(). Between the two
  // there is time for other work.
  static __device__ __forceinline__ void load(Values& s, const Elem* state) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const uint4 x = load_once<!kVFirst>(state + piece_offset(piece));
      const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        constexpr int kPerWord = kVector / 4;
        s[value_index(piece, kPerWord * w)][channel_index(piece, kPerWord * w)] = __uint_as_float(words[w]);
      }
    }
  }

  static __device__ __forceinline__ void unpack(Values& s) {
    if constexpr (kVector == 8) {
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
        for (int e = 0; e < kVector; e += 2) {
          float& first = s[value_index(piece, e)][channel_index(piece, e)];
          const float2 pair = unpack_bf16(__float_as_uint(first));
          first = pair.x;
          s[value_index(piece, e + 1)][channel_index(piece, e + 1)] = pair.y;
        }
      }
    }
  }

  static __device__ __forceinline__ void store(Elem* state, const Values& s) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      uint32_t words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        constexpr int kPerWord = kVector / 4;
        const float x = s[value_index(piece, kPerWord * w)][channel_index(piece, kPerWord * w)];
        if constexpr (kVector == 4) {
          words[w] = __float_as_uint(x);
        } else {
          words[w] = pack_bf16(x, s[value_index(piece, 2 * w + 1)][channel_index(piece, 2 * w + 1)]);
        }
      }
      store_once(state + piece_offset(piece), make_uint4(words[0], words[1], words[2], words[3]));
    }
  }

  // Sums 2 * kTileV numbers over the lanes along K; lane k_lane gets the sum numbered k_lane. Each step halves the
  // numbers: a lane gives away those whose sum its partner will have.
  template <int kHalf = kTileV>
  static __device__ __forceinline__ float reduce_over_k(float (&x)[2 * kTileV], int lane) {
    if constexpr (kHalf == 0) {
      return x[0];
    } else {
      const bool upper = lane & kHalf;
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        const float kept = upper ? x[kHalf + i] : x[i], given = upper ? x[i] : x[kHalf + i];
        x[i] = kept + __shfl_xor_sync(~0u, given, kHalf);
      }
      return reduce_over_k<kHalf / 2>(x, lane);
    }
  }
};

}  // namespace kda::decode
