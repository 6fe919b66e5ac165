// Which accesses to a CTA's declared memory are not ordered by its barriers. The compiler calls in here, by what it has for its
// own sanitizer, before every access of the sources that are built with -fsanitize=thread.
#include "emulator.h"

#include <deque>

namespace emulator {
namespace {

constexpr size_t kGrain = 2;  // bytes that are looked at together
constexpr int kMaxThreads = 256;

struct Access {
  int16_t thread = -1;    // none
  bool several = false;  // lanes of the warp, at once
  bool copying = false;
  uint32_t cta_barriers = 0, warp_barriers = 0;

  bool is_before(const Position& now) const {
    if (thread < 0) return true;
    if (copying) return false;
    return (thread == now.thread && !several) || cta_barriers < now.cta_barriers ||
           (thread / 32 == now.thread / 32 && warp_barriers < now.warp_barriers);
  }
};

Access access_of(const Position& now) {
  return {.thread = static_cast<int16_t>(now.thread), .cta_barriers = now.cta_barriers, .warp_barriers = now.warp_barriers};
}

struct Place {
  uint32_t cta = 0;  // that it was last looked at for
  Access write;
  Access reads[kMaxThreads / 32];  // since then, the last of each warp

  void check(const Position& now, bool writes) const {
    if (write.copying) fail("a place that a copy is on its way to");
    bool ordered = write.is_before(now);
    for (const Access& read : reads) ordered &= !writes || read.is_before(now);
    if (!ordered) fail("two threads at one place in shared memory, and no barrier between them");
  }
};

}  // namespace

// Of one CTA after another: to forget a million bytes for each would take most of the time.
struct Accesses {
  uint32_t cta = 0;
  std::vector<Place> places;
  std::vector<std::pair<size_t, size_t>> copies[kMaxThreads];  // of each thread, their first place and the one behind

  Place& at(size_t i) {
    if (places[i].cta != cta) places[i] = {.cta = cta, .write = {}, .reads = {}};
    return places[i];
  }
};

namespace {

Accesses& accesses_to(int rank) {
  static std::deque<Accesses> all;
  Declared& declared = declared_by(rank);
  if (declared.accesses == nullptr) {
    if (all.size() <= static_cast<size_t>(rank)) all.resize(rank + 1);
    Accesses& fresh = all[rank];
    ++fresh.cta;
    fresh.places.resize(std::max(fresh.places.size(), declared.memory.size() / kGrain));
    for (auto& copies : fresh.copies) copies.clear();
    declared.accesses = &fresh;
  }
  return *declared.accesses;
}

// The places of [pointer, pointer + bytes); none if that is elsewhere.
std::pair<size_t, size_t> places_of(const Declared& declared, const void* pointer, size_t bytes) {
  const size_t offset = static_cast<const uint8_t*>(pointer) - declared.memory.data();
  if (offset >= declared.memory.size()) return {0, 0};
  return {offset / kGrain, (offset + bytes + kGrain - 1) / kGrain};
}

}  // namespace

void access(const void* pointer, size_t bytes, bool writes) {
  const Position& now = position();
  if (now.declared == nullptr) return;
  const auto [begin, end] = places_of(*now.declared, pointer, bytes);
  if (begin == end) return;
  Accesses& accesses = accesses_to(own_rank());
  for (size_t i = begin; i < end; ++i) {
    Place& place = accesses.at(i);
    Access& read = place.reads[now.thread / 32];
    const bool again = read.thread >= 0 && read.cta_barriers == now.cta_barriers && read.warp_barriers == now.warp_barriers;
    if (!writes && again && read.several) continue;
    place.check(now, writes);
    if (writes) {
      place = {.cta = place.cta, .write = access_of(now), .reads = {}};
    } else {
      const bool several = again && read.thread != now.thread;
      read = access_of(now);
      read.several = several;
    }
  }
}

void copy_later(void* pointer, const void* source, size_t bytes) {
  access(pointer, bytes, true);
  const auto places = places_of(*position().declared, pointer, bytes);
  Accesses& accesses = accesses_to(own_rank());
  for (size_t i = places.first; i < places.second; ++i) accesses.at(i).write.copying = true;
  accesses.copies[thread_index()].push_back(places);
  put_off(kCopied, [=] { std::memcpy(pointer, source, bytes); });
}

void wait_for_copies() {
  settle(kCopied);
  const Position& now = position();
  Accesses& accesses = accesses_to(own_rank());
  for (const auto& [begin, end] : std::exchange(accesses.copies[now.thread], {})) {
    for (size_t i = begin; i < end; ++i) accesses.at(i).write = access_of(now);
  }
}

void write_from_outside(int rank, void* pointer, const void* source, size_t bytes) {
  std::memcpy(pointer, source, bytes);
  const auto [begin, end] = places_of(declared_by(rank), pointer, bytes);
  Accesses& accesses = accesses_to(rank);
  for (size_t i = begin; i < end; ++i) accesses.at(i) = {.cta = accesses.cta, .write = {}, .reads = {}};
}

}  // namespace emulator

#define ACCESS(N)                                                                             \
  void __tsan_read##N(void* place) { emulator::access(place, N, false); }                     \
  void __tsan_write##N(void* place) { emulator::access(place, N, true); }                     \
  void __tsan_unaligned_read##N(void* place) { emulator::access(place, N, false); }           \
  void __tsan_unaligned_write##N(void* place) { emulator::access(place, N, true); }

extern "C" {
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void* place, size_t bytes) { emulator::access(place, bytes, false); }
void __tsan_write_range(void* place, size_t bytes) { emulator::access(place, bytes, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
