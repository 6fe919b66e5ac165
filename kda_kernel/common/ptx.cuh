// One instruction per wrapper. Shared-memory addresses are 32-bit, made once by smem_address().
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

#include <cute/arch/mma_sm80.hpp>

namespace kda {

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The same number, of which the compiler knows nothing: what depends on it is computed where it is used, not kept in a
// register from before a loop.
__device__ __forceinline__ uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// The compiler may not move what reads or writes this register, or memory, across this point.
__device__ __forceinline__ void keep_in_place(float& x) { asm volatile("" : "+f"(x)::"memory"); }

// ---- matrix fragments ------------------------------------------------------------------------------------

// Four 8x8 b16 matrices; lane l gives the address of row l % 8 of matrix l / 8 and receives, of each matrix,
// elements (l / 4, 2 (l % 4)) and the next in its row.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}

// The same with each matrix transposed on the way.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}

// Transposes an 8x8 b16 matrix held across the warp.
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// The reverse of ldmatrix_x4_trans: row l % 8 of matrix l / 8 goes to lane l's address.
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t address, const uint32_t (&x)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]),
               "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
#else
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t row = __shfl_sync(~0u, address, 8 * i + lane / 4), y = movmatrix_trans(x[i]);
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(row + lane % 4 * 4), "r"(y) : "memory");
  }
#endif
}

// D[16, 8] += A[16, 16] B[16, 8], bf16 operands, fp32 accumulation.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  cute::SM80_16x8x16_F32BF16BF16F32_TN::fma(d[0], d[1], d[2], d[3], a[0], a[1], a[2], a[3], b0, b1,  //
                                            d[0], d[1], d[2], d[3]);
}

// D[16, 8] += A[16, 8] B[8, 8]; any register may be A's and B's.
__device__ __forceinline__ void mma_bf16_half(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  cute::SM80_16x8x8_F32BF16BF16F32_TN::fma(d[0], d[1], d[2], d[3], a0, a1, b, d[0], d[1], d[2], d[3]);
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  __nv_bfloat162 packed = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(packed);
}

__device__ __forceinline__ float2 unpack_bf16(uint32_t packed) {
  return make_float2(__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u));
}

// x y + z of two pairs of bf16, each rounded once.
__device__ __forceinline__ uint32_t fma_bf16x2(uint32_t x, uint32_t y, uint32_t z) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(x), "r"(y), "r"(z));
  return d;
}

// Bit 15 of each half word in all bits of the half. (__byte_perm() takes no signs.)
__device__ __forceinline__ uint32_t spread_signs(uint32_t x) {
  uint32_t y;
  asm("prmt.b32 %0, %1, %1, 0xbb99;" : "=r"(y) : "r"(x));
  return y;
}

// ---- global memory ---------------------------------------------------------------------------------------

// 16 bytes that are not worth a place in L1: each is read once or written once. volatile: the loads stay where they are
// written, ahead of all that waits for other loads. kWholeLine: a neighbouring warp is about to ask for the rest of the
// 128 bytes.
template <bool kWholeLine>
__device__ __forceinline__ uint4 load_once(const void* source) {
  uint4 x;
  if constexpr (kWholeLine) {
    asm volatile("ld.global.L1::no_allocate.L2::128B.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(source));
  } else {
    asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(source));
  }
  return x;
}

__device__ __forceinline__ void store_once(void* target, uint4 x) {
  asm volatile("st.global.L1::no_allocate.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(target), "r"(x.x), "r"(x.y), "r"(x.z),
               "r"(x.w)
               : "memory");
}

// ---- shared memory ---------------------------------------------------------------------------------------

// The block's one object of this type, not initialised.
template <class T>
__device__ __forceinline__ T& block_shared() {
  __shared__ T object;
  return object;
}

__device__ __forceinline__ void store_shared(uint32_t address, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ void store_shared_u16(uint32_t address, uint16_t value) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(value) : "memory");
}

__device__ __forceinline__ void store_shared_float(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ __forceinline__ void store_shared_float2(uint32_t address, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}

__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}

__device__ __forceinline__ float2 load_shared_float2(uint32_t address) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
  return x;
}

__device__ __forceinline__ float4 load_shared_float4(uint32_t address) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

__device__ __forceinline__ uint4 load_shared_uint4(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

__device__ __forceinline__ void store_shared_float4(uint32_t address, const float (&x)[4]) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
               : "memory");
}

__device__ __forceinline__ void store_shared_uint4(uint32_t address, uint4 value) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

// Orders this thread's stores to shared memory before later reads of it by wgmma and TMA.
__device__ __forceinline__ void fence_proxy_async() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- asynchronous copies and barriers --------------------------------------------------------------------

// 16 bytes from global to shared memory; zeros when !valid (nothing is read then).
__device__ __forceinline__ void cp_async_16(uint32_t address, const void* source, bool valid) {
  int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source), "r"(bytes)
               : "memory");
}

// kBytes (4, 8 or 16) from global to shared memory.
template <int kBytes>
__device__ __forceinline__ void cp_async(void* target, const void* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(smem_address(target)), "l"(source), "n"(kBytes)
               : "memory");
}

// All cp.async of this thread have landed, for this thread to see.
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// One arrival, which releases what this thread wrote.
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(barrier) : "memory");
}

// One arrival that happens once all cp.async this thread has issued have landed.
__device__ __forceinline__ void barrier_arrive_after_cp_async(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// Has the phase of that parity completed? Where the hardware can wait a while for it, it does.
__device__ __forceinline__ bool barrier_test(uint32_t barrier, uint32_t parity) {
  uint32_t done;
#if __CUDA_ARCH__ >= 900
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done)
               : "r"(barrier), "r"(parity)
               : "memory");
#else
  asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done)
               : "r"(barrier), "r"(parity)
               : "memory");
#endif
  return done != 0;
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  while (!barrier_test(barrier, parity)) {
  }
}

// Meets the other threads that name this barrier; `threads` is a multiple of 32. (Barrier 0 is __syncthreads'.)
__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// ---- clusters of CTAs, from compute capability 9.0 on ------------------------------------------------------

// This thread's barrier_init() is seen by the cluster's other CTAs, and by tensor copies, after they or the threads have met.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// The two halves of a barrier for all threads of a cluster. Orders no memory accesses but barriers' inits: to order others,
// arriving would wait for every load and store that is on its way.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_meet_relaxed() {
  cluster_arrive_relaxed();
  cluster_wait();
}

// The same that does order them: a CTA may leave after it.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Where another CTA of the cluster has what this one has at `address`.
__device__ __forceinline__ uint32_t remote_address(uint32_t address, int cta) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(cta));
  return remote;
}

// One arrival; the phase completes when so many bytes have come as well.
__device__ __forceinline__ void barrier_arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// An arrival at any CTA's barrier, named by remote_address(). It orders this thread's accesses to shared memory; at cluster
// scope it would wait for all its stores to global memory, too (a thousand clocks), which no CTA of the cluster reads.
__device__ __forceinline__ void barrier_arrive_remote(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// barrier_wait() for what other CTAs of the cluster have stored.
__device__ __forceinline__ void barrier_wait_for_cluster(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// Four bytes to the place in a CTA of the cluster that `target` is in this one; they count for its barrier.
__device__ __forceinline__ void store_remote(int cta, uint32_t target, float x, uint32_t barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(
                   remote_address(target, cta)),
               "f"(x), "r"(remote_address(barrier, cta))
               : "memory");
}

// Copies to another CTA's shared memory; the bytes count for a barrier there. `target` and `barrier` are remote_address()es.
// One thread calls; what it copies has been fenced for the async proxy.
__device__ __forceinline__ void copy_to_remote(uint32_t target, uint32_t source, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
               "r"(source), "r"(bytes), "r"(barrier)
               : "memory");
}

// ---- tensor copies (TMA), from compute capability 9.0 on: boxes of a [B, T, H, D] tensor, from (x, head, token, batch) on, by
// one thread. What lies outside the tensor is read as zero and not written. -----------------------------------

struct TensorPlace {
  int x, head, token, batch;
};

// To this CTA's shared memory; the bytes count for a barrier.
__device__ __forceinline__ void copy_from_tensor(uint32_t target, const CUtensorMap& map, const TensorPlace& at,
                                                 uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(
          target),
      "l"(&map), "r"(at.x), "r"(at.head), "r"(at.token), "r"(at.batch), "r"(barrier)
      : "memory");
}

// From shared memory, which may change after bulk_wait_read(). What is copied has been fenced for the async proxy.
__device__ __forceinline__ void copy_to_tensor(const CUtensorMap& map, const TensorPlace& at, uint32_t source) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];\n"
      "cp.async.bulk.commit_group;" ::"l"(&map),
      "r"(at.x), "r"(at.head), "r"(at.token), "r"(at.batch), "r"(source)
      : "memory");
}
__device__ __forceinline__ void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Has the description of a tensor brought to where copies look for it.
__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Has the line of an address in global memory brought to the L2 cache.
__device__ __forceinline__ void prefetch_to_l2(const void* place) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(place)) : "memory");
}

// The same of a box.
__device__ __forceinline__ void prefetch_tensor(const CUtensorMap& map, const TensorPlace& at) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];" ::"l"(&map), "r"(at.x), "r"(at.head),
               "r"(at.token), "r"(at.batch)
               : "memory");
}

// The phase completes when so many bytes more have come.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive_many(uint32_t barrier, int arrivals) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0], %1; }" ::"r"(barrier), "r"(arrivals) : "memory");
}

// ---- special functions -----------------------------------------------------------------------------------

// Of a number and not a number these are not a number.
__device__ __forceinline__ float max_or_nan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

__device__ __forceinline__ float min_or_nan(float x, float y) {
  float z;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace kda
