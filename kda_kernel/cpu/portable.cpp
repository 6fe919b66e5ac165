// The CPU kernel built for what every CPU of the architecture has: SSE2 or NEON, 8 registers hold a tile.
#include "cpu/launch.h"

namespace kda::cpu {
namespace {
constexpr int kLanes = 4;
constexpr int kTileRows = 4;
}  // namespace
}  // namespace kda::cpu

#include "cpu/decode_job.h"
#include "cpu/job.h"

void kda::cpu::prefill_portable(const PrefillParams& params, const Job& job, Workspace& workspace) {
  run_job(params, job, workspace);
}

void kda::cpu::decode_portable(const DecodeParams& params, const Job& job) { run_decode_job(params, job); }
