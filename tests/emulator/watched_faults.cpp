// Faults of kernels that use what they declare in shared memory as any other; built to be watched, as those for decoding are.
#include "watched_faults.h"

#include "common/ptx.cuh"

namespace {

struct Row {
  volatile int at[kWatchedBytes / sizeof(int)];
};

}  // namespace

void threads_without_a_barrier() { kda::block_shared<Row>().at[threadIdx.x % 32] = 1; }

// A shuffle brings the lanes together, but orders no accesses.
void lanes_without_a_barrier() {
  Row& row = kda::block_shared<Row>();
  row.at[threadIdx.x] = 1;
  const int read = row.at[__shfl_xor_sync(~0u, static_cast<int>(threadIdx.x), 1)];
  row.at[threadIdx.x + blockDim.x] = read;
}

void copy_without_a_wait() {
  static const int one = 1;
  Row& row = kda::block_shared<Row>();
  kda::cp_async<4>(const_cast<int*>(&row.at[threadIdx.x]), &one);
  row.at[threadIdx.x + blockDim.x] = row.at[threadIdx.x];
}

void nothing_wrong() {
  static const int one = 1;
  Row& row = kda::block_shared<Row>();
  kda::cp_async<4>(const_cast<int*>(&row.at[threadIdx.x]), &one);
  kda::cp_async_wait_all();
  __syncwarp();
  row.at[threadIdx.x + blockDim.x] = row.at[threadIdx.x ^ 1];
  __syncthreads();
  row.at[threadIdx.x] = row.at[2 * blockDim.x - 1 - threadIdx.x];
}
