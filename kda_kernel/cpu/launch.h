// The kernels for CPUs: what they are given, and their builds for instruction sets. Plain C++, no torch.
#pragma once

#include <cstdint>

#include "params.h"

namespace kda::cpu {

// Columns of the state (rows of V) that are worked on together: a [K, 32] panel is 16 KB, a third of a small L1.
constexpr int kPanel = 32;
constexpr int kPanels = kHeadDim / kPanel;

// Tokens in a chunk. The triangular parts cost kChunk / 2 * K per token, the state 3 K V: they are small at 16, and
// U fits the registers of AVX-512.
constexpr int kChunk = 16;

// Panels [first_panel, last_panel) of one value head of one sequence, tokens [begin, end) of batch row `batch`.
struct Job {
  int64_t sequence;
  int64_t batch;
  int64_t begin;
  int64_t end;
  int32_t head;
  int32_t first_panel;
  int32_t last_panel;
  int64_t first_intermediate_state;  // the sequence's
};

// What a job of prefill needs beside its tensors: one chunk's factors and the state, all float32.
struct alignas(64) Workspace {
  float q[kChunk][kHeadDim];           // scaled, normalised
  float k[kChunk][kHeadDim];           // normalised
  float a[kChunk][kHeadDim];           // exp(g)
  float pre[2 * kChunk][kHeadDim];     // rows 2i, 2i + 1: k_i, q_i times the decay from the chunk's start through i
  float suf[kChunk][kHeadDim];         // k_j times the decay after j to the chunk's end
  float total[kHeadDim];               // the decay of the whole chunk
  float Akk[kChunk][kChunk];           // below the diagonal, with beta
  float Aqk[kChunk][kChunk];           // below and on the diagonal
  float beta[kChunk];
  float read[2 * kChunk][kPanel];      // pre S, then O in the rows of q; one panel
  float v[kChunk][kPanel];
  float u[kChunk][kPanel];
  float S[kPanels][kHeadDim][kPanel];  // the state as [K, V], panel by panel
};

// The kernels built for one instruction set.
struct Build {
  void (*prefill)(const PrefillParams& params, const Job& job, Workspace& workspace);
  void (*decode)(const DecodeParams& params, const Job& job);
};

void prefill_portable(const PrefillParams& params, const Job& job, Workspace& workspace);
void decode_portable(const DecodeParams& params, const Job& job);
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define KDA_CPU_X86_BUILDS 1
void prefill_avx2(const PrefillParams& params, const Job& job, Workspace& workspace);
void decode_avx2(const DecodeParams& params, const Job& job);
void prefill_avx512(const PrefillParams& params, const Job& job, Workspace& workspace);
void decode_avx512(const DecodeParams& params, const Job& job);
#endif

}  // namespace kda::cpu
