// The CPU kernel built for AVX-512: 16 of 32 registers hold a tile.
#include "cpu/launch.h"

#if defined(KDA_CPU_X86_BUILDS)

#include <cmath>
#include <cstdint>
#include <cstring>

// After the standard headers: their inline functions stay plain.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")

namespace kda::cpu {
namespace {
constexpr int kLanes = 16;
constexpr int kTileRows = 8;
}  // namespace
}  // namespace kda::cpu

#include "cpu/decode_job.h"
#include "cpu/job.h"

void kda::cpu::prefill_avx512(const PrefillParams& params, const Job& job, Workspace& workspace) {
  run_job(params, job, workspace);
}

void kda::cpu::decode_avx512(const DecodeParams& params, const Job& job) { run_decode_job(params, job); }

#endif
