// One job of decoding: a value head of a sequence (or some panels of its state), token after token, in float32.
// Included once per instruction set, after job.h.
//
//   S <- diag(a) S;  u = beta (v - S^T k);  o = S^T q + (q . k) u;  S <- S + k u^T        S [K, V], q times scale
//
// A panel is 32 columns of S, in the order in which the state is stored: [K, 32], or V-first 32 rows [32, K]. Neither
// is transposed on its way.
#pragma once

#include "cpu/job.h"

namespace kda::cpu {
namespace {

struct alignas(64) DecodeWorkspace {
  float q[kChunk][kHeadDim];   // scaled, normalised
  float k[kChunk][kHeadDim];   // normalised
  float a[kChunk][kHeadDim];   // exp(g)
  float beta[kChunk];
  float qk[kChunk];            // q . k
  float S[kPanel * kHeadDim];  // one panel, [K, 32] or [32, K]
};

// What becomes of a sequence. The order of the checks is that of reference_decode.py.
enum class Row { kLive, kPadding, kWrong };

inline int64_t load_index(const IndexTensor& x, int64_t row, int64_t column) {
  const int64_t index = row * x.row_stride + column * x.column_stride;
  return x.is_int64 ? static_cast<const int64_t*>(x.data)[index] : static_cast<const int32_t*>(x.data)[index];
}

// Sets `start` to the slot that the sequence starts from.
inline Row look_up(const DecodeParams& p, const Job& job, int64_t& start) {
  start = job.sequence;
  if (p.state_indices.data == nullptr) return Row::kLive;
  const auto wrong = [&](int64_t slot) { return slot != -1 && (slot < 0 || slot >= p.initial_state.num_slots); };
  int64_t accepted = 1;
  if (p.num_accepted_tokens.data != nullptr) accepted = load_index(p.num_accepted_tokens, job.sequence, 0);
  if (p.slots_per_sequence > 0 && (accepted < 1 || accepted > p.slots_per_sequence)) return Row::kWrong;
  start = load_index(p.state_indices, job.sequence, accepted - 1);
  if (start == -1) return Row::kPadding;
  if (wrong(start)) return Row::kWrong;
  if (p.slots_per_sequence == 0) return Row::kLive;
  if (job.end - job.begin > p.slots_per_sequence) return Row::kWrong;
  for (int64_t t = 0; t < job.end - job.begin; ++t) {
    if (wrong(load_index(p.state_indices, job.sequence, t))) return Row::kWrong;
  }
  return Row::kLive;
}

// Calls visit(element of the panel, element of the state) for every vector of a panel of slot `slot`.
template <class Visit>
inline void for_panel(const StatePool& x, int64_t slot, int32_t head, int panel, Visit visit) {
  const int rows = x.v_first ? kPanel : kHeadDim, columns = kHeadDim * kPanel / rows;
  const int64_t origin = slot * x.slot_stride + int64_t{head} * kHeadDim * kHeadDim +
                         panel * kPanel * (x.v_first ? kHeadDim : 1);
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; c += kLanes) visit(r * columns + c, origin + r * kHeadDim + c);
  }
}

inline void load_panel(const StatePool& x, int64_t slot, int32_t head, int panel, float* S) {
  for_panel(x, slot, head, panel, [&](int i, int64_t at) {
    store(S + i, x.data == nullptr ? splat(0.0f) : load_as(x.dtype, x.data, at));
  });
}

inline void store_panel(const StatePool& x, int64_t slot, int32_t head, int panel, const float* S) {
  for_panel(x, slot, head, panel, [&](int i, int64_t at) { store_as(x.dtype, x.data, at, load(S + i)); });
}

inline void fill_panel(const StatePool& x, int64_t slot, int32_t head, int panel, float value) {
  for_panel(x, slot, head, panel, [&](int, int64_t at) { store_as(x.dtype, x.data, at, splat(value)); });
}

// Token i of the chunk through a panel [K, 32], two vectors of columns at a time. v is the token's row, so is o.
inline void step_k_first(const DecodeWorkspace& w, int i, const float* v, float* o, float* S) {
  for (int column = 0; column < kPanel; column += 2 * kLanes) {
    Vec kS[2] = {splat(0.0f), splat(0.0f)}, qS[2] = {splat(0.0f), splat(0.0f)};
    for (int d = 0; d < kHeadDim; ++d) {
      for (int x = 0; x < 2; ++x) {
        const Vec s = w.a[i][d] * load(S + d * kPanel + column + x * kLanes);
        kS[x] += w.k[i][d] * s;
        qS[x] += w.q[i][d] * s;
      }
    }
    Vec u[2];
    for (int x = 0; x < 2; ++x) {
      u[x] = w.beta[i] * (load(v + column + x * kLanes) - kS[x]);
      store(o + column + x * kLanes, qS[x] + w.qk[i] * u[x]);
    }
    for (int d = 0; d < kHeadDim; ++d) {
      for (int x = 0; x < 2; ++x) {
        float* s = S + d * kPanel + column + x * kLanes;
        store(s, w.a[i][d] * load(s) + w.k[i][d] * u[x]);
      }
    }
  }
}

// The same through a panel [32, K].
inline void step_v_first(const DecodeWorkspace& w, int i, const float* v, float* o, float* S) {
  for (int row = 0; row < kPanel; ++row, S += kHeadDim) {
    Vec kS = splat(0.0f), qS = splat(0.0f);
    for (int d = 0; d < kHeadDim; d += kLanes) {
      const Vec s = load(w.a[i] + d) * load(S + d);
      kS += load(w.k[i] + d) * s;
      qS += load(w.q[i] + d) * s;
    }
    const float u = w.beta[i] * (v[row] - sum(kS));
    o[row] = sum(qS) + w.qk[i] * u;
    for (int d = 0; d < kHeadDim; d += kLanes) {
      store(S + d, load(w.a[i] + d) * load(S + d) + load(w.k[i] + d) * u);
    }
  }
}

// The factors of the tokens [first, first + length).
inline void load_chunk(const DecodeParams& p, const Job& job, int64_t first, int length, float rate,
                       DecodeWorkspace& w) {
  load_tokens(p, job, first, length, rate, w);
  for (int i = 0; i < length; ++i) {
    Vec qk = splat(0.0f);
    for (int d = 0; d < kHeadDim; d += kLanes) qk += load(w.q[i] + d) * load(w.k[i] + d);
    w.qk[i] = sum(qk);
  }
}

// The chunk's tokens through one panel, and the states after each to their slots, where these are wanted.
inline void advance_panel(const DecodeParams& p, const Job& job, int64_t first, int length, int panel,
                          DecodeWorkspace& w) {
  for (int i = 0; i < length; ++i) {
    float v[kPanel], o[kPanel];
    const int64_t v_index = offset(p.v, job.batch, first + i, job.head) + panel * kPanel;
    for (int c = 0; c < kPanel; c += kLanes) store(v + c, load_as(p.v_dtype, p.v.data, v_index + c));
    (p.initial_state.v_first ? step_v_first : step_k_first)(w, i, v, o, w.S);
    const int64_t o_index = offset(p.out, job.batch, first + i, job.head) + panel * kPanel;
    void* out = const_cast<void*>(p.out.data);
    for (int c = 0; c < kPanel; c += kLanes) store_as(p.v_dtype, out, o_index + c, load(o + c));
    if (p.slots_per_sequence > 0) {
      const int64_t slot = load_index(p.state_indices, job.sequence, first + i - job.begin);
      if (slot != -1) store_panel(p.initial_state, slot, job.head, panel, w.S);
    }
  }
}

// A sequence that is not live: its outputs and its final state are `value`.
inline void fill(const DecodeParams& p, const Job& job, float value) {
  for (int panel = job.first_panel; panel < job.last_panel; ++panel) {
    for (int64_t t = job.begin; t < job.end; ++t) {
      const int64_t index = offset(p.out, job.batch, t, job.head) + panel * kPanel;
      for (int c = 0; c < kPanel; c += kLanes) {
        store_as(p.v_dtype, const_cast<void*>(p.out.data), index + c, splat(value));
      }
    }
    if (p.final_state.data != nullptr) fill_panel(p.final_state, job.sequence, job.head, panel, value);
  }
}

inline void run_decode_job(const DecodeParams& p, const Job& job) {
  int64_t start;
  const Row row = look_up(p, job, start);
  if (row != Row::kLive) return fill(p, job, row == Row::kPadding ? 0.0f : __builtin_nanf(""));

  const float rate = p.A_log == nullptr ? 1.0f : ::expf(p.A_log[job.head]);
  DecodeWorkspace w;
  for (int panel = job.first_panel; panel < job.last_panel; ++panel) {
    load_panel(p.initial_state, start, job.head, panel, w.S);
    for (int64_t first = job.begin; first < job.end; first += kChunk) {
      const int length = static_cast<int>(job.end - first < kChunk ? job.end - first : kChunk);
      // The first panel's factors serve the others too, if there is only one chunk.
      if (panel == job.first_panel || job.end - job.begin > kChunk) load_chunk(p, job, first, length, rate, w);
      advance_panel(p, job, first, length, panel, w);
    }
    if (p.final_state.data != nullptr) store_panel(p.final_state, job.sequence, job.head, panel, w.S);
    if (p.inplace && p.slots_per_sequence == 0) store_panel(p.initial_state, start, job.head, panel, w.S);
  }
}

}  // namespace
}  // namespace kda::cpu
