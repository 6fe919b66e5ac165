// Fibers, the scheduler, barriers and shared memory of emulator.h.
#include "emulator.h"

#include <sys/mman.h>

#include <deque>
#include <random>
#include <stdexcept>
#include <string>

#if !defined(__x86_64__)
#error "the emulator switches fibers on x86-64 alone"
#endif

// Keeps the registers that a function has to, and goes on where `to` was left.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size emulator_switch, .-emulator_switch
)");

namespace emulator {
namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr uint32_t kFirstAddress = 1024;  // 0 is nobody's
constexpr int kRankBit = 24;

struct Barrier {
  int arrivals = 0;  // of a phase; 0: not a barrier
  int missing = 0;
  int bytes = 0;
  uint32_t phase = 0;
};

struct Meeting {
  int here = 0;
  uint32_t generation = 0;
};

struct Cta {
  int rank = 0;
  dim3 block;
  int running = 0;  // threads
  Declared declared;
  std::vector<Barrier> barriers;
  std::vector<uint8_t> in_flight;
  Meeting meetings[16];
  int votes = 0, result = 0;  // of __syncthreads_or()
};

struct Warp {
  const char* name = nullptr;  // of the collective that lanes have entered
  int here = 0;
  uint32_t generation = 0;
  void* arguments[32];
};

struct Thread {
  void* stack_pointer = nullptr;
  Cta* cta = nullptr;
  Warp* warp = nullptr;
  unsigned index = 0;
  bool done = false;
  const uint32_t* word = nullptr;  // that it waits for
  uint32_t value = 0;
  std::vector<std::function<void()>> copies;
  std::vector<std::shared_ptr<std::function<void()>>> put_off[3];  // Until; what has happened is empty
  std::deque<std::function<void()>> in_order;
  std::shared_ptr<void> products;
  uint32_t cluster_generation = 0;
  Position position{};
};

// The threads of one cluster, and what is on its way.
struct Cluster {
  std::vector<Cta> ctas;
  std::vector<Warp> warps;
  std::vector<Thread> threads;
  std::vector<std::function<void()>> events;
  Meeting meeting;
  int threads_per_cta = 0;
  dim3 grid;
};

std::mt19937_64 random_numbers;
Device device_now{1, 232448, 132};
unsigned ctas_launched;  // last
Cluster* cluster = nullptr;
Thread* current = nullptr;
void* scheduler = nullptr;
const std::function<void()>* body = nullptr;
std::string error;

void leave() { emulator_switch(&current->stack_pointer, scheduler); }

void start() {
  (*body)();
  if (!current->copies.empty()) fail("a thread ends with copies that no barrier waits for");
  if (!current->put_off[kRead].empty()) fail("a thread ends with copies that shared memory has to outlive");
  current->done = true;
  --current->cta->running;
  leave();
}

void resume(Thread& thread) {
  current = &thread;
  emulator_switch(&scheduler, thread.stack_pointer);
  current = nullptr;
}

// Fibers' stacks, kept for the next launch.
uint8_t* stack(size_t index) {
  static std::vector<uint8_t*> all;
  while (all.size() <= index) {
    void* pages = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) throw std::runtime_error("emulator: no memory for a thread's stack");
    all.push_back(static_cast<uint8_t*>(pages));
  }
  return all[index];
}

void prepare(Thread& thread, size_t index) {
  auto* top = reinterpret_cast<void**>(stack(index) + kStackBytes);
  *--top = nullptr;  // start() does not return; as after a call, the stack is 8 bytes off a multiple of 16
  *--top = reinterpret_cast<void*>(&start);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  thread.stack_pointer = top;
}

bool runnable(const Thread& thread) { return !thread.done && (thread.word == nullptr || *thread.word != thread.value); }

// Runs a warp's lanes until all of them wait; whether any could run.
bool run_warp(size_t warp) {
  const size_t order = random_numbers() % 32;
  bool any = false, again = true;
  while (again && error.empty()) {
    again = false;
    for (size_t i = 0; i < 32 && error.empty(); ++i) {
      Thread& thread = cluster->threads[32 * warp + (i ^ order)];
      if (!runnable(thread)) continue;
      thread.word = nullptr;
      resume(thread);
      any = again = true;
    }
  }
  return any;
}

bool run_events() {
  std::vector<std::function<void()>> now;
  std::swap(now, cluster->events);
  std::shuffle(now.begin(), now.end(), random_numbers);
  const size_t count = now.empty() ? 0 : 1 + random_numbers() % now.size();
  for (size_t i = 0; i < count; ++i) now[i]();
  cluster->events.insert(cluster->events.end(), now.begin() + count, now.end());
  return count > 0;
}

void describe_waiting() {
  std::string waiting;
  for (size_t i = 0; i < cluster->threads.size(); i += 32) {
    const Thread& thread = cluster->threads[i];
    if (thread.done) continue;
    waiting += " " + std::to_string(thread.cta->rank) + ":" + std::to_string(thread.index / 32);
    if (thread.warp->name != nullptr) waiting += std::string(" in ") + thread.warp->name;
    for (size_t b = 0; b < thread.cta->barriers.size(); ++b) {
      if (thread.word == &thread.cta->barriers[b].phase) waiting += " at " + std::to_string(kFirstAddress + 8 * b);
    }
    waiting += ";";
  }
  error = "all threads wait (CTA:warp, barrier's address):" + waiting;
}

void run_cluster() {
  const size_t warps = cluster->warps.size();
  std::vector<size_t> order(warps);
  for (size_t i = 0; i < warps; ++i) order[i] = i;
  std::vector<int> pauses(warps);  // rounds that a warp is left out
  const auto unfinished = [] {
    return std::any_of(cluster->threads.begin(), cluster->threads.end(), [](const Thread& t) { return !t.done; });
  };
  while (error.empty() && unfinished()) {
    bool progress = chance(0.5) && run_events();
    std::shuffle(order.begin(), order.end(), random_numbers);
    bool paused = false;
    for (const size_t warp : order) {
      if (!error.empty()) break;
      if (pauses[warp] > 0) {
        --pauses[warp];
        paused = true;
        continue;
      }
      if (run_warp(warp)) {
        progress = true;
        if (chance(0.1)) pauses[warp] = random_numbers() % 20;
      }
    }
    if (!progress && !paused && error.empty() && !run_events()) describe_waiting();
  }
  while (error.empty() && run_events()) {
  }
}

Barrier& barrier_at(uint32_t address, bool any = false) {
  const uint32_t place = address & ((1u << kRankBit) - 1), rank = address >> kRankBit;
  if (rank >= cluster->ctas.size() || place % 8 != 0 || place < kFirstAddress) fail("not a barrier's address");
  Cta& cta = cluster->ctas[rank];
  const size_t index = (place - kFirstAddress) / 8;
  if (cta.running == 0) fail("a barrier of a CTA that has ended");
  if (index >= cta.barriers.size() || (cta.barriers[index].arrivals == 0 && !any)) fail("no barrier there");
  return cta.barriers[index];
}

void complete(Barrier& barrier) {
  if (barrier.missing < 0) fail("more arrivals at a barrier than a phase has");
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  barrier.missing = barrier.arrivals;
  ++barrier.phase;
}

void meet(Meeting& meeting, int threads) {
  if (++meeting.here == threads) {
    meeting.here = 0;
    ++meeting.generation;
  } else {
    wait_while(&meeting.generation, meeting.generation);
  }
}

}  // namespace

unsigned thread_index() { return current->index; }
unsigned block_x() { return current->cta->block.x; }
unsigned block_y() { return current->cta->block.y; }
unsigned block_z() { return current->cta->block.z; }
unsigned grid_y() { return cluster->grid.y; }
unsigned block_size() { return cluster->threads_per_cta; }
int lane() { return current->index % 32; }
int own_rank() { return current->cta->rank; }

void fail(const char* what) {
  if (error.empty()) {
    error = what;
    if (current != nullptr) {
      error += ", in thread " + std::to_string(current->index) + " of CTA " + std::to_string(current->cta->rank);
    }
  }
  if (current == nullptr) throw std::runtime_error("emulator: " + error);
  leave();
  __builtin_unreachable();
}

void wait_while(const uint32_t* word, uint32_t value) {
  current->word = word;
  current->value = value;
  leave();
}

bool chance(double probability) { return random_numbers() < probability * 0x1p64; }

void later(std::function<void()> happens, bool in_order) {
  if (!in_order) {
    cluster->events.push_back(std::move(happens));
    return;
  }
  current->in_order.push_back(std::move(happens));
  cluster->events.push_back([thread = current] {
    const auto first = std::move(thread->in_order.front());
    thread->in_order.pop_front();
    first();
  });
}

void put_off(Until until, std::function<void()> happens) {
  const auto kept = std::make_shared<std::function<void()>>(std::move(happens));
  current->put_off[until].push_back(kept);
  later([kept] {
    if (*kept) std::exchange(*kept, nullptr)();
  });
}
void settle(Until until) {
  auto all = std::exchange(current->put_off[until], {});
  std::shuffle(all.begin(), all.end(), random_numbers);
  for (const auto& kept : all) {
    if (*kept) std::exchange(*kept, nullptr)();
  }
}

void collective(const char* name, void* arguments, void (*run)(void* const*)) {
  Warp& warp = *current->warp;
  if (warp.here == 0) warp.name = name;
  if (warp.name != name) fail("the lanes of a warp are in different collectives");
  warp.arguments[lane()] = arguments;
  if (++warp.here < 32) {
    wait_while(&warp.generation, warp.generation);
    return;
  }
  run(warp.arguments);
  warp.here = 0;
  warp.name = nullptr;
  ++warp.generation;
}

void named_barrier(int barrier, int threads) { meet(current->cta->meetings[barrier], threads); }

void cluster_arrive() {
  Meeting& meeting = cluster->meeting;
  current->cluster_generation = meeting.generation;
  if (++meeting.here == static_cast<int>(cluster->threads.size())) {
    meeting.here = 0;
    ++meeting.generation;
  }
}
void cluster_wait() {
  if (cluster->meeting.generation == current->cluster_generation) {
    wait_while(&cluster->meeting.generation, current->cluster_generation);
  }
}

void* shared(uint32_t address, int bytes, bool local) {
  const uint32_t place = address & ((1u << kRankBit) - 1), rank = address >> kRankBit;
  if (rank >= cluster->ctas.size() || place < kFirstAddress) fail("not an address in shared memory");
  Cta& cta = cluster->ctas[rank];
  if (local && &cta != current->cta) fail("another CTA's shared memory");
  if (place - kFirstAddress + bytes > cta.declared.memory.size()) fail("an address behind shared memory");
  if (place % (bytes < 16 ? bytes : 16) != 0) fail("a misaligned address in shared memory");
  if (cta.in_flight[(place - kFirstAddress) / 16] != 0) fail("an address that a copy is writing to");
  return cta.declared.memory.data() + (place - kFirstAddress);
}
void give_memory(Cta& cta, size_t bytes) {
  cta.declared.memory.assign(bytes, 0xff);
  cta.barriers.resize(bytes / 8);
  cta.in_flight.resize(bytes / 16 + 1);
}
void* declared(size_t bytes) {
  Cta& cta = *current->cta;
  if (cta.declared.memory.empty()) give_memory(cta, bytes);
  if (cta.declared.memory.size() != bytes) fail("shared memory that is declared in more than one piece");
  return cta.declared.memory.data();
}
uint32_t address_of(const void* place) {
  const auto& memory = current->cta->declared.memory;
  const ptrdiff_t offset = static_cast<const uint8_t*>(place) - memory.data();
  if (offset < 0 || offset >= static_cast<ptrdiff_t>(memory.size())) fail("the address of what is not in shared memory");
  return first_address() + static_cast<uint32_t>(offset);
}
void in_flight(uint32_t address, bool begins) {
  Cta& cta = cluster->ctas[address >> kRankBit];
  cta.in_flight[((address & ((1u << kRankBit) - 1)) - kFirstAddress) / 16] = begins;
}
uint32_t remote(uint32_t address, int cta) {
  return (address & ((1u << kRankBit) - 1)) | static_cast<uint32_t>(cta) << kRankBit;
}
uint32_t first_address() { return remote(kFirstAddress, current->cta->rank); }

void barrier_init(uint32_t barrier, int arrivals) {
  if (arrivals <= 0) fail("a barrier without arrivals");
  barrier_at(barrier, true) = {.arrivals = arrivals, .missing = arrivals, .bytes = 0, .phase = 0};
}
void barrier_arrive(uint32_t barrier, int expected_bytes, int arrivals) {
  Barrier& at = barrier_at(barrier);
  at.bytes += expected_bytes;
  at.missing -= arrivals;
  complete(at);
}
void barrier_bytes(uint32_t barrier, int bytes) {
  Barrier& at = barrier_at(barrier);
  at.bytes -= bytes;
  complete(at);
}
bool barrier_test(uint32_t barrier, uint32_t parity) { return (barrier_at(barrier).phase & 1) != parity; }
void barrier_wait(uint32_t barrier, uint32_t parity) {
  const Barrier& at = barrier_at(barrier);
  while ((at.phase & 1) == parity) wait_while(&at.phase, at.phase);
}

Position& position() {
  static Position nowhere{};
  return current != nullptr ? current->position : nowhere;
}
Declared& declared_by(int rank) { return cluster->ctas[rank].declared; }

std::vector<std::function<void()>>& copies() { return current->copies; }
std::shared_ptr<void>& products() { return current->products; }

const Device& device() { return device_now; }

void run_grid(dim3 grid, int threads, int cluster_ctas, int shared_bytes, const std::function<void()>& kernel) {
  if (shared_bytes > device_now.shared_bytes) throw std::runtime_error("emulator: more shared memory than a CTA may have");
  if (cluster_ctas > device_now.cluster_ctas || grid.x % cluster_ctas != 0) {
    throw std::runtime_error("emulator: not a cluster that the device has");
  }
  body = &kernel;
  error.clear();
  ctas_launched = grid.x * grid.y * grid.z;
  for (unsigned index = 0; index < grid.x / cluster_ctas * grid.y * grid.z; ++index) {
    const unsigned row = index / (grid.x / cluster_ctas), first = index % (grid.x / cluster_ctas) * cluster_ctas;
    Cluster now;
    now.threads_per_cta = threads;
    now.grid = grid;
    now.ctas.resize(cluster_ctas);
    now.warps.resize(cluster_ctas * threads / 32);
    now.threads.resize(cluster_ctas * threads);
    for (int rank = 0; rank < cluster_ctas; ++rank) {
      Cta& cta = now.ctas[rank];
      cta.rank = rank;
      cta.block = dim3(first + rank, row % grid.y, row / grid.y);
      cta.running = threads;
      give_memory(cta, shared_bytes);
      for (int i = 0; i < threads; ++i) {
        const size_t index = static_cast<size_t>(rank) * threads + i;
        Thread& thread = now.threads[index];
        thread.cta = &cta;
        thread.index = i;
        thread.position = {.thread = i, .cta_barriers = 0, .warp_barriers = 0, .declared = &cta.declared};
        thread.warp = &now.warps[index / 32];
        prepare(thread, index);
      }
    }
    cluster = &now;
    run_cluster();
    cluster = nullptr;
    if (!error.empty()) throw std::runtime_error("emulator: cluster " + std::to_string(index) + ": " + error);
  }
}

}  // namespace emulator

void __syncwarp() {
  emulator::collective("__syncwarp", nullptr, [](void* const*) {});
  ++emulator::current->position.warp_barriers;
}
void __syncthreads() {
  emulator::named_barrier(0, emulator::cluster->threads_per_cta);
  ++emulator::current->position.cta_barriers;
}
int __syncthreads_or(int x) {
  emulator::Cta& cta = *emulator::current->cta;
  cta.votes |= x;
  __syncthreads();
  cta.result = cta.votes;
  __syncthreads();
  cta.votes = 0;
  const int result = cta.result;
  __syncthreads();
  return result;
}

cudaError_t emulator_max_clusters(int* clusters, const cudaLaunchConfig_t* config) {
  const bool fits = static_cast<int>(config->attrs[0].val.clusterDim.x) <= emulator::device_now.cluster_ctas;
  *clusters = fits ? 1 << 20 : 0;
  return cudaSuccess;
}

extern "C" {

// The device of later launches, and the order in which its threads run.
__attribute__((visibility("default"))) void emulator_configure(int cluster_ctas, int shared_bytes, uint64_t seed, int sms) {
  emulator::device_now = {cluster_ctas, shared_bytes, sms};
  emulator::random_numbers.seed(seed);
}

__attribute__((visibility("default"))) unsigned emulator_ctas() { return emulator::ctas_launched; }

// Kernels ask for a device once and remember its answers: so each kind of device has a number of its own.
cudaError_t cudaGetDevice(int* device) {
  const emulator::Device& now = emulator::device_now;
  *device = now.cluster_ctas + (now.shared_bytes >> 10 << 4) + (now.sms << 12);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emulator::device_now.shared_bytes;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = emulator::device_now.sms;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}
const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "an error of the emulator"; }
}
