#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <string_view>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "backend.h"
#include "cpu/launch.h"
#include "cpu/sequences.h"

namespace kda::cpu {
namespace {

constexpr Build kPortable{.prefill = prefill_portable, .decode = decode_portable};

// The fastest build that this CPU runs, unless ATEN_CPU_CAPABILITY ("default", "avx2"), torch's own switch, forbids it.
Build fastest_build() {
#if defined(KDA_CPU_X86_BUILDS)
  const char* value = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view limit = value == nullptr ? "" : value;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && limit != "default";
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && limit != "avx2";
  if (avx512) return {.prefill = prefill_avx512, .decode = decode_avx512};
  if (avx2) return {.prefill = prefill_avx2, .decode = decode_avx2};
#endif
  return kPortable;
}

// Denormal numbers count as 0 while this lives: on x86 each of them costs about a hundred cycles, and a strong gate
// makes many. They are below any rounding error of float32.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : control_(_mm_getcsr()) { _mm_setcsr(control_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(control_); }

 private:
  unsigned control_;
#else
  FlushDenormals() {}
#endif
};

// Into how many jobs to split one head of a sequence, when its fair share is so many threads. The panels of a head can
// run on different threads; each then computes the chunk factors again, about a third of the work.
int32_t splits(double threads) {
  int32_t count = 1;
  while (count < kPanels && 2 * count <= threads) count *= 2;
  return count;
}

// All work, the longest first.
std::vector<Job> make_jobs(const AttentionParams& p, int64_t threads) {
  const bool packed = p.cu_seqlens.data != nullptr;
  const std::vector<int64_t> bounds =
      packed ? sequence_bounds(p.cu_seqlens, p.num_sequences, p.num_tokens) : std::vector<int64_t>{};
  const int64_t all_tokens = packed ? p.num_tokens : p.num_sequences * p.num_tokens;
  std::vector<Job> jobs;
  jobs.reserve(p.num_sequences * p.num_heads);
  int64_t intermediate_states = 0;
  for (int64_t n = 0; n < p.num_sequences; ++n) {
    const int64_t begin = packed ? bounds[n] : 0, end = packed ? bounds[n + 1] : p.num_tokens;
    const double share = static_cast<double>(threads) * (end - begin) / std::max<int64_t>(1, all_tokens * p.num_heads);
    const int32_t panels = kPanels / splits(share);
    for (int32_t head = 0; head < p.num_heads; ++head) {
      for (int32_t panel = 0; panel < kPanels; panel += panels) {
        jobs.push_back({.sequence = n,
                        .batch = packed ? 0 : n,
                        .begin = begin,
                        .end = end,
                        .head = head,
                        .first_panel = panel,
                        .last_panel = panel + panels,
                        .first_intermediate_state = intermediate_states});
      }
    }
    intermediate_states += (end - begin + kIntermediateStep - 1) / kIntermediateStep;
  }
  std::stable_sort(jobs.begin(), jobs.end(),
                   [](const Job& x, const Job& y) { return x.end - x.begin > y.end - y.begin; });
  return jobs;
}

const Build& best_build() {
  static const Build fastest = fastest_build();
  return fastest;
}

// Deals the jobs out to torch's threads; run_job(job, worker) runs one, worker < min(jobs, threads).
template <class RunJob>
void run_jobs(const std::vector<Job>& jobs, int64_t workers, const RunJob& run_job) {
  std::atomic<size_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
    const FlushDenormals flush;
    for (size_t job = next++; job < jobs.size(); job = next++) run_job(jobs[job], worker);
  });
}

}  // namespace
}  // namespace kda::cpu

void kda::run_prefill(const PrefillParams& params, int32_t, bool portable) {
  const cpu::Build& build = portable ? cpu::kPortable : cpu::best_build();
  const int64_t threads = torch::stable::get_num_threads();
  const std::vector<cpu::Job> jobs = cpu::make_jobs(params, threads);
  const int64_t workers = std::min<int64_t>(threads, jobs.size());
  const std::unique_ptr<cpu::Workspace[]> workspaces(new cpu::Workspace[workers]);
  cpu::run_jobs(jobs, workers, [&](const cpu::Job& job, int64_t worker) {
    build.prefill(params, job, workspaces[worker]);
  });
}

void kda::run_decode(const DecodeParams& params, int32_t) {
  const cpu::Build& build = cpu::best_build();
  const int64_t threads = torch::stable::get_num_threads();
  const std::vector<cpu::Job> jobs = cpu::make_jobs(params, threads);
  const int64_t workers = std::min<int64_t>(threads, jobs.size());
  cpu::run_jobs(jobs, workers, [&](const cpu::Job& job, int64_t) { build.decode(params, job); });
}
