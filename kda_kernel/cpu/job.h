// One job: a value head of a sequence (or some panels of its state), chunk after chunk, in float32. Included once per
// instruction set, after its target pragma and the constants kLanes and kTileRows; see simd.h for why all is internal.
//
// The chunk form, tokens i, j of a chunk, S [K, V] the state before it, a_t = exp(g_t):
//   Akk[i, j] = beta_i sum_d k_id k_jd prod_{j < m <= i} a_md    j <  i
//   Aqk[i, j] =        sum_d q_id k_jd prod_{j < m <= i} a_md    j <= i
//   (I + Akk) U = diag(beta) (V - pre_k S)                        solved by forward substitution
//   O = pre_q S + Aqk U
//   S <- diag(total) S + suf^T U
// Decays are products of a <= 1 and nothing else, so every gate is exact. No sum runs over tokens that it does not
// depend on, not even with a factor of 0: a NaN stays where the recurrence would have it.
#pragma once

#include <cmath>

#include "cpu/launch.h"
#include "cpu/simd.h"

namespace kda::cpu {
namespace {

constexpr float kL2Epsilon = 1e-6f;

inline int64_t offset(const TokenTensor& x, int64_t batch, int64_t token, int64_t head) {
  return batch * x.batch_stride + token * x.token_stride + head * x.head_stride;
}

// row = factor * x / |x| or factor * x.
inline void load_key(FloatKind dtype, const void* data, int64_t index, bool l2norm, float factor, float* row) {
  Vec squares = splat(0.0f);
  for (int d = 0; d < kHeadDim; d += kLanes) {
    const Vec x = load_as(dtype, data, index + d);
    squares += x * x;
    store(row + d, x);
  }
  if (l2norm) factor *= 1.0f / std::sqrt(sum(squares) + kL2Epsilon);
  for (int d = 0; d < kHeadDim; d += kLanes) store(row + d, load(row + d) * factor);
}

// row = exp(log decay).
inline void load_decay(const AttentionParams& p, int64_t index, int32_t head, float rate, float* row) {
  const float* bias = p.dt_bias == nullptr ? nullptr : p.dt_bias + static_cast<int64_t>(head) * kHeadDim;
  for (int d = 0; d < kHeadDim; d += kLanes) {
    Vec g = load_as(p.g_dtype, p.g.data, index + d);
    if (p.gate != GateKind::kPreActivated) {
      if (bias != nullptr) g += load(bias + d);
      g = p.gate == GateKind::kLowerBound ? p.lower_bound * sigmoid(rate * g) : -rate * softplus(g);
    }
    store(row + d, exp(g));
  }
}

inline float load_beta(const AttentionParams& p, int64_t index) {
  const float x = load_scalar_as(p.beta_dtype, p.beta.data, index);
  if (!p.sigmoid_beta) return x;
  return (p.neg_eigval ? 2.0f : 1.0f) / (1.0f + ::expf(-x));
}

// The chunk's q, k, a and beta. Entries of tokens that it has not are left as they are.
template <class AnyWorkspace>
void load_tokens(const AttentionParams& p, const Job& job, int64_t first, int length, float rate, AnyWorkspace& w) {
  const int32_t qk_head = job.head / p.heads_per_qk;
  for (int i = 0; i < length; ++i) {
    const int64_t t = first + i;
    load_key(p.q_dtype, p.q.data, offset(p.q, job.batch, t, qk_head), p.l2norm_qk, p.scale, w.q[i]);
    load_key(p.k_dtype, p.k.data, offset(p.k, job.batch, t, qk_head), p.l2norm_qk, 1.0f, w.k[i]);
    load_decay(p, offset(p.g, job.batch, t, job.head), job.head, rate, w.a[i]);
    w.beta[i] = load_beta(p, offset(p.beta, job.batch, t, job.head));
  }
}

// pre and total: running products of a from the chunk's start.
void decay_from_start(int length, Workspace& w) {
  for (int d = 0; d < kHeadDim; d += kLanes) {
    Vec decay = splat(1.0f);
    for (int i = 0; i < length; ++i) {
      decay *= load(w.a[i] + d);
      store(w.pre[2 * i] + d, decay * load(w.k[i] + d));
      store(w.pre[2 * i + 1] + d, decay * load(w.q[i] + d));
    }
    store(w.total + d, decay);
  }
}

// Akk, Aqk and suf: k_j decays from token to token and meets every k_i and q_i on its way.
void decay_to_end(int length, Workspace& w) {
  constexpr int kVecs = kHeadDim / kLanes;
  for (int j = 0; j < length; ++j) {
    Vec key[kVecs];
    Vec qk = splat(0.0f);
    for (int x = 0; x < kVecs; ++x) {
      key[x] = load(w.k[j] + x * kLanes);
      qk += key[x] * load(w.q[j] + x * kLanes);
    }
    w.Aqk[j][j] = sum(qk);
    for (int i = j + 1; i < length; ++i) {
      Vec kk = splat(0.0f);
      qk = splat(0.0f);
      for (int x = 0; x < kVecs; ++x) {
        key[x] *= load(w.a[i] + x * kLanes);
        kk += key[x] * load(w.k[i] + x * kLanes);
        qk += key[x] * load(w.q[i] + x * kLanes);
      }
      w.Akk[i][j] = w.beta[i] * sum(kk);
      w.Aqk[i][j] = sum(qk);
    }
    for (int x = 0; x < kVecs; ++x) store(w.suf[j] + x * kLanes, key[x]);
  }
}

// read[rows] = pre[rows] S for `rows` rows of pre, two vectors of columns at a time.
template <int rows>
inline void read_state(const float (*pre)[kHeadDim], const float (*S)[kPanel], float (*read)[kPanel]) {
  for (int column = 0; column < kPanel; column += 2 * kLanes) {
    Vec left[rows], right[rows];
    for (int r = 0; r < rows; ++r) left[r] = right[r] = splat(0.0f);
    for (int d = 0; d < kHeadDim; ++d) {
      const Vec s_left = load(S[d] + column), s_right = load(S[d] + column + kLanes);
      for (int r = 0; r < rows; ++r) {
        left[r] += pre[r][d] * s_left;
        right[r] += pre[r][d] * s_right;
      }
    }
    for (int r = 0; r < rows; ++r) {
      store(read[r] + column, left[r]);
      store(read[r] + column + kLanes, right[r]);
    }
  }
}

// S <- diag(total) S + suf^T U.
inline void update_state(int length, const Workspace& w, float (*S)[kPanel]) {
  for (int d = 0; d < kHeadDim; d += kTileRows) {
    for (int column = 0; column < kPanel; column += 2 * kLanes) {
      Vec left[kTileRows], right[kTileRows];
      for (int r = 0; r < kTileRows; ++r) {
        left[r] = w.total[d + r] * load(S[d + r] + column);
        right[r] = w.total[d + r] * load(S[d + r] + column + kLanes);
      }
      for (int i = 0; i < length; ++i) {
        const Vec u_left = load(w.u[i] + column), u_right = load(w.u[i] + column + kLanes);
        for (int r = 0; r < kTileRows; ++r) {
          left[r] += w.suf[i][d + r] * u_left;
          right[r] += w.suf[i][d + r] * u_right;
        }
      }
      for (int r = 0; r < kTileRows; ++r) {
        store(S[d + r] + column, left[r]);
        store(S[d + r] + column + kLanes, right[r]);
      }
    }
  }
}

// U from v and read, and O in place of the rows of `read` that belong to q.
inline void solve(Workspace& w) {
  for (int column = 0; column < kPanel; column += kLanes) {
    Vec u[kChunk];
#pragma GCC unroll 16
    for (int i = 0; i < kChunk; ++i) u[i] = w.beta[i] * (load(w.v[i] + column) - load(w.read[2 * i] + column));
#pragma GCC unroll 16
    for (int j = 0; j < kChunk; ++j) {
#pragma GCC unroll 16
      for (int i = j + 1; i < kChunk; ++i) u[i] -= w.Akk[i][j] * u[j];
    }
#pragma GCC unroll 16
    for (int i = 0; i < kChunk; ++i) {
      store(w.u[i] + column, u[i]);
      Vec o = load(w.read[2 * i + 1] + column);
#pragma GCC unroll 16
      for (int j = 0; j <= i; ++j) o += w.Aqk[i][j] * u[j];
      store(w.read[2 * i + 1] + column, o);
    }
  }
}

// One chunk's tokens through one panel of the state.
void advance_panel(const PrefillParams& p, const Job& job, int64_t first, int length, int panel, Workspace& w) {
  float(*S)[kPanel] = w.S[panel];
  constexpr int kTokens = kTileRows / 2;  // two rows of pre per token
  int i = 0;
  for (; i + kTokens <= length; i += kTokens) read_state<kTileRows>(w.pre + 2 * i, S, w.read + 2 * i);
  for (; i < length; ++i) read_state<2>(w.pre + 2 * i, S, w.read + 2 * i);
  for (i = 0; i < length; ++i) {
    const int64_t index = offset(p.v, job.batch, first + i, job.head) + panel * kPanel;
    for (int c = 0; c < kPanel; c += kLanes) store(w.v[i] + c, load_as(p.v_dtype, p.v.data, index + c));
  }
  solve(w);
  for (i = 0; i < length; ++i) {
    const int64_t index = offset(p.out, job.batch, first + i, job.head) + panel * kPanel;
    void* out = const_cast<void*>(p.out.data);
    for (int c = 0; c < kPanel; c += kLanes) store_as(p.v_dtype, out, index + c, load(w.read[2 * i + 1] + c));
  }
  update_state(length, w, S);
}

// Where row `row` of the head's state of that number begins: V-first rows are the columns of S.
inline int64_t state_row(const Job& job, int64_t state, int32_t heads, int64_t row) {
  return ((state * heads + job.head) * kHeadDim + row) * kHeadDim;
}

void load_state(const StateTensor& x, const Job& job, int32_t heads, Workspace& w) {
  for (int panel = job.first_panel; panel < job.last_panel; ++panel) {
    float(*S)[kPanel] = w.S[panel];
    if (x.data == nullptr) {
      std::memset(S, 0, sizeof(w.S[panel]));
    } else if (x.v_first) {
      for (int c = 0; c < kPanel; ++c) {
        float row[kHeadDim];
        const int64_t index = state_row(job, job.sequence, heads, panel * kPanel + c);
        for (int d = 0; d < kHeadDim; d += kLanes) store(row + d, load_as(x.dtype, x.data, index + d));
        for (int d = 0; d < kHeadDim; ++d) S[d][c] = row[d];
      }
    } else {
      for (int d = 0; d < kHeadDim; ++d) {
        const int64_t index = state_row(job, job.sequence, heads, d) + panel * kPanel;
        for (int c = 0; c < kPanel; c += kLanes) store(S[d] + c, load_as(x.dtype, x.data, index + c));
      }
    }
  }
}

void store_state(const StateTensor& x, const Job& job, int64_t state, int32_t heads, const Workspace& w) {
  if (x.data == nullptr) return;
  for (int panel = job.first_panel; panel < job.last_panel; ++panel) {
    const float(*S)[kPanel] = w.S[panel];
    if (x.v_first) {
      for (int c = 0; c < kPanel; ++c) {
        float row[kHeadDim];
        const int64_t index = state_row(job, state, heads, panel * kPanel + c);
        for (int d = 0; d < kHeadDim; ++d) row[d] = S[d][c];
        for (int d = 0; d < kHeadDim; d += kLanes) store_as(x.dtype, x.data, index + d, load(row + d));
      }
    } else {
      for (int d = 0; d < kHeadDim; ++d) {
        const int64_t index = state_row(job, state, heads, d) + panel * kPanel;
        for (int c = 0; c < kPanel; c += kLanes) store_as(x.dtype, x.data, index + c, load(S[d] + c));
      }
    }
  }
}

inline void run_job(const PrefillParams& p, const Job& job, Workspace& w) {
  const float rate = p.A_log == nullptr ? 1.0f : ::expf(p.A_log[job.head]);
  load_state(p.initial_state, job, p.num_heads, w);
  for (int64_t first = job.begin; first < job.end; first += kChunk) {
    const int length = static_cast<int>(job.end - first < kChunk ? job.end - first : kChunk);
    if ((first - job.begin) % kIntermediateStep == 0) {
      const int64_t index = job.first_intermediate_state + (first - job.begin) / kIntermediateStep;
      if (index < p.num_intermediate_states) store_state(p.intermediate_states, job, index, p.num_heads, w);
    }
    load_tokens(p, job, first, length, rate, w);
    for (int i = length; i < kChunk; ++i) w.beta[i] = 0.0f;
    decay_from_start(length, w);
    decay_to_end(length, w);
    for (int panel = job.first_panel; panel < job.last_panel; ++panel) {
      advance_panel(p, job, first, length, panel, w);
    }
  }
  store_state(p.final_state, job, job.sequence, p.num_heads, w);
}

}  // namespace
}  // namespace kda::cpu
