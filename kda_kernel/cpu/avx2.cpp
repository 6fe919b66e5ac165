// The CPU kernel built for AVX2 with FMA: 8 of 16 registers hold a tile.
#include "cpu/launch.h"

#if defined(KDA_CPU_X86_BUILDS)

#include <cmath>
#include <cstdint>
#include <cstring>

// After the standard headers: their inline functions stay plain.
#pragma GCC target("avx2,fma")

namespace kda::cpu {
namespace {
constexpr int kLanes = 8;
constexpr int kTileRows = 4;
}  // namespace
}  // namespace kda::cpu

#include "cpu/decode_job.h"
#include "cpu/job.h"

void kda::cpu::prefill_avx2(const PrefillParams& params, const Job& job, Workspace& workspace) {
  run_job(params, job, workspace);
}

void kda::cpu::decode_avx2(const DecodeParams& params, const Job& job) { run_decode_job(params, job); }

#endif
