// Factors of half a chunk's channels for any gate: only products of decays a = exp(log decay), never a division.
//
// The decay tree (levels L = 1, 2, 4, 8) keeps per token
//   pre    the product of a from the start of the token's group through the token
//   suf    the product of a after the token to the end of its group
//   total  the product of a over the group
// Every factor is a product of numbers in (0, 1], so underflow is a correct zero. At level L the rows of the upper half
// of each group of 2 L tokens meet the columns of its lower half:
//   Akk[i, j] = sum_d (k_i pre_i)_d (k_j suf_j)_d,      Aqk[i, j] = sum_d (q_i pre_i)_d (k_j suf_j)_d
// and after the last level pre = exp(G), suf = exp(G_C - G), total = exp(G_C).
//
// Fragment of a 16 x 16 block, element e = 4 h + 2 r + x of a lane: token lane / 4 + 8 r, channel
// 8 h + 2 (lane % 4) + x. Groups of up to 8 tokens are lanes 4, 8, 16 apart; the last level joins r = 0 and r = 1
// inside the lane.
#pragma once

#include "common/gate.cuh"
#include "common/ptx.cuh"
#include "prefill/traits.cuh"

namespace kda::prefill {

// Where the factors of a tile and half of the channels come from and go to.
template <class S>
struct TileFactors {
  uint32_t slot;
  uint32_t scratch;  // the team's
  int tile;
  int half;

  // The tile's rows of a whole panel, and those of this half.
  __device__ __forceinline__ uint32_t q_tile() const { return slot + S::kQ + tile * kTileRows; }
  __device__ __forceinline__ uint32_t k_tile() const { return slot + S::kK + tile * kTileRows; }
  __device__ __forceinline__ uint32_t q() const { return q_tile() + half * kHalfBytes; }
  __device__ __forceinline__ uint32_t k() const { return k_tile() + half * kHalfBytes; }
  __device__ __forceinline__ uint32_t gate() const { return slot + S::kG + tile * kTileRows + half * S::kKsufHalf; }
  __device__ __forceinline__ uint32_t k_suf() const { return slot + S::kKsuf + tile * kTileRows + half * S::kKsufHalf; }
  __device__ __forceinline__ uint32_t t_inv() const { return slot + S::kTInv + tile * kPairDiagonal; }
  __device__ __forceinline__ uint32_t aqk() const { return slot + S::kAqk + tile * kPairDiagonal; }
  __device__ __forceinline__ uint32_t beta() const { return slot + S::kBeta + tile * kTile * 4; }
  // k exp(-G) of the half, and later Akk: with an fp32 gate where it was, in the rows that Ksuf does not take, Akk beside Aqk.
  __device__ __forceinline__ uint32_t inverse() const {
    if constexpr (S::kPairsInGate) return slot + S::kG + half * S::kKsufHalf + kHalfBytes + tile * kTileRows;
    return scratch + (S::kWholeTiles ? tile : tile * kHalves + half) * kTileRows;
  }
  __device__ __forceinline__ uint32_t akk() const {
    if constexpr (S::kPairsInGate) return slot + S::kAqk + kPairBytes + tile * kAkkBytes;
    return scratch + tile * (S::kTeamWarps / kTiles) * kTileRows;
  }
  // Room for sixteen bytes of a lane, `piece` 0 to 2: where T_inv and Aqk of the tile will be, and below them T_inv of both
  // tiles for the first, Aqk for the second. If these will be in the gate's place: where the second half's k exp(-G) was,
  // which is done with.
  __device__ __forceinline__ uint32_t parking(int piece, uint32_t lane) const {
    if constexpr (S::kPairsInGate) return slot + S::kTInv + tile * kTileRows + piece * 512 + lane * 16;
    const uint32_t below = slot + S::kTInv + kPairTile + tile * (S::kAqk - S::kTInv);
    return (piece == 0 ? t_inv() : piece == 1 ? aqk() : below) + pair_block_rows(lane);
  }
  __device__ __forceinline__ uint32_t norms() const {
    return scratch + Scratch<S>::kNorms + tile * Scratch<S>::kNormBytes;
  }
  __device__ __forceinline__ uint32_t total(int of_tile) const {
    return scratch + Scratch<S>::kTotal + of_tile * kTotalBytes;
  }
};

// The address of token t's row, given that of token 0's: the swizzle moves a lane's unit with the token.
__device__ __forceinline__ uint32_t at_token(uint32_t first, int t) { return (first ^ t % 8 * 16) + t * kRowBytes; }

// Where a lane finds its row of the A operand of a pair product in half a panel: k and q of the same eight tokens, columns
// 0-7, then 8-15.
template <class S>
__device__ __forceinline__ uint32_t pair_rows(const TileFactors<S>& to, int half, uint32_t lane) {
  return (lane / 8 % 2 ? to.q_tile() : to.k_tile()) + half * kHalfBytes + swizzled(lane % 8, lane / 16);
}

constexpr int kLaneLevels = 3;  // L = 1, 2, 4 across lanes

// Products of tokens (i, j), sums over channels: rows 0-7 of an MMA carry k_i, rows 8-15 carry q_i, of the same eight
// tokens. Element x, x + 2 of a lane: k, q of row lane / 4 against column 2 (lane % 4) + x.
struct PairSums {
  float group[2][4] = {};  // tokens 0-7 against themselves, 8-15 against themselves
  float across[4] = {};    // tokens 8-15 against 0-7
};

__device__ __forceinline__ void scale_and_pack(uint32_t (&packed)[4], const float (&x)[8], const float (&factor)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    packed[i] = pack_bf16(x[2 * i] * factor[2 * i], x[2 * i + 1] * factor[2 * i + 1]);
  }
}

// One level across lanes: the MMAs of both groups of eight tokens, of which the level's own pairs are right, then the
// two halves merge.
__device__ __forceinline__ void lane_level(float (&products)[2][4], int level, const float (&q)[8], const float (&k)[8],
                                           float (&pre)[8], float (&suf)[8], float (&total)[8], bool upper) {
  float factor[8];
  uint32_t q_rows[4], k_rows[4];
#pragma unroll
  for (int e = 0; e < 8; ++e) factor[e] = upper ? pre[e] : suf[e];
  scale_and_pack(q_rows, q, factor);
  scale_and_pack(k_rows, k, factor);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint32_t rows[4] = {k_rows[r], q_rows[r], k_rows[2 + r], q_rows[2 + r]};
    mma_bf16(products[r], rows, k_rows[r], k_rows[2 + r]);
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    float other = __shfl_xor_sync(~0u, total[e], 4 << level);
    if (upper) {
      pre[e] *= other;
    } else {
      suf[e] *= other;
    }
    total[e] *= other;
  }
}

// The last level, tokens 8-15 against 0-7; leaves pre = exp(G_i), suf = exp(G_C - G_j) and the tile's total.
__device__ __forceinline__ void top_level(float (&products)[4], const float (&q)[8], const float (&k)[8],
                                          float (&pre)[8], float (&suf)[8], float (&total)[8]) {
  uint32_t rows[4], columns[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int low = 4 * h, high = 4 * h + 2;
    rows[2 * h] = pack_bf16(k[high] * pre[high], k[high + 1] * pre[high + 1]);
    rows[2 * h + 1] = pack_bf16(q[high] * pre[high], q[high + 1] * pre[high + 1]);
    columns[h] = pack_bf16(k[low] * suf[low], k[low + 1] * suf[low + 1]);
  }
  mma_bf16(products, rows, columns[0], columns[1]);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const int low = 4 * h + x, high = 4 * h + 2 + x;
      pre[high] *= total[low];
      suf[low] *= total[high];
      total[low] *= total[high];
    }
  }
}

// Each pair from the level at which its tokens part, the highest bit in which their numbers differ; the diagonal, which
// no decay touches, from the lanes' own sums.
__device__ __forceinline__ void add_levels(PairSums& sums, const float (&levels)[kLaneLevels][2][4],
                                           const float (&diagonal)[2], uint32_t lane) {
  const int row = lane / 4, pair = 2 * (lane % 4);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float qk = diagonal[r];
    qk += __shfl_xor_sync(~0u, qk, 1);
    qk += __shfl_xor_sync(~0u, qk, 2);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int differ = row ^ (pair + e % 2);
      const float product = differ & 4 ? levels[2][r][e] : differ & 2 ? levels[1][r][e] : levels[0][r][e];
      sums.group[r][e] += differ == 0 && e >= 2 ? qk : product;
    }
  }
}

// The decays of a block of the half's channels, 1 for tokens past the end; `gate` and `bias` are the half's.
template <GateKind kGate, class S>
__device__ __forceinline__ void decay_block(float (&a)[8], uint32_t gate, int block, uint32_t bias, const GateScale& scale,
                                            int valid, uint32_t lane) {
  constexpr int kUnitChannels = 16 / sizeof(typename S::GElem), kRowChannels = kRowBytes / sizeof(typename S::GElem);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int channel = 16 * block + 8 * h + 2 * (lane % 4);
    const float2 b = load_shared_float2(bias + channel * 4);
    const uint32_t place = gate + channel / kRowChannels * kHalfBytes +
                           swizzled(lane / 4, channel % kRowChannels / kUnitChannels) +
                           channel % kUnitChannels * sizeof(typename S::GElem);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float2 g = sizeof(typename S::GElem) == 2 ? unpack_bf16(load_shared(place + r * kGroupRows))
                                          : load_shared_float2(place + r * kGroupRows);
      const bool inside = lane / 4 + 8 * r < valid;
      a[4 * h + 2 * r] = inside ? exp2_approx(log2_decay<kGate>(g.x, b.x, scale)) : 1.0f;
      a[4 * h + 2 * r + 1] = inside ? exp2_approx(log2_decay<kGate>(g.y, b.y, scale)) : 1.0f;
    }
  }
}

// Half the channels of a tile, in place; `bias` is the half's.
template <GateKind kGate, class S>
__device__ __forceinline__ void decay_tree(PairSums& sums, const TileFactors<S>& to, uint32_t bias,
                                           const GateScale& gate_scale, int valid, uint32_t lane) {
  const float2 norm[2] = {load_shared_float2(to.norms() + lane / 4 * 8),
                          load_shared_float2(to.norms() + (8 + lane / 4) * 8)};
  float levels[kLaneLevels][2][4] = {}, diagonal[2] = {};
#pragma unroll 1
  for (int block = 0; block < kHalfBlocks; ++block) {
    float q[8], k[8], pre[8], suf[8], total[8];
    decay_block<kGate, S>(pre, to.gate(), block, bias, gate_scale, valid, lane);
    // Of the lane's pair in the first group of tokens and the first unit; in the second unit 16 is flipped.
    const uint32_t first = swizzled(lane / 4, block * 2) + lane % 4 * 4;
    const auto place = [&](int i) { return (first ^ i / 2 * 16) + i % 2 * kGroupRows; };
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = i % 2;
      const float2 q_pair = unpack_bf16(load_shared(to.q() + place(i)));
      const float2 k_pair = unpack_bf16(load_shared(to.k() + place(i)));
      q[2 * i] = q_pair.x * norm[r].x;
      q[2 * i + 1] = q_pair.y * norm[r].x;
      k[2 * i] = k_pair.x * norm[r].y;
      k[2 * i + 1] = k_pair.y * norm[r].y;
      diagonal[r] += q[2 * i] * k[2 * i] + q[2 * i + 1] * k[2 * i + 1];
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      suf[e] = 1.0f;
      total[e] = pre[e];
    }
#pragma unroll
    for (int level = 0; level < kLaneLevels; ++level) {
      lane_level(levels[level], level, q, k, pre, suf, total, (lane >> (2 + level)) & 1);
    }
    top_level(sums.across, q, k, pre, suf, total);

    uint32_t q_pre[4], k_pre[4], k_suf[4];
    scale_and_pack(q_pre, q, pre);
    scale_and_pack(k_pre, k, pre);
    scale_and_pack(k_suf, k, suf);
    __syncwarp();  // every lane has its gate: Ksuf of one may cover that of another
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      store_shared(to.q() + place(i), q_pre[i]);
      store_shared(to.k() + place(i), k_pre[i]);
      store_shared(to.k_suf() + place(i), k_suf[i]);
    }
    if (lane < 4) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        store_shared_float2(to.total(to.tile) + total_offset(to.half * kHalfChannels + 16 * block + 8 * h + 2 * lane),
                            total[4 * h], total[4 * h + 1]);
      }
    }
  }
  add_levels(sums, levels, diagonal, lane);
}

}  // namespace kda::prefill
