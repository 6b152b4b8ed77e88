// The RWKV-4 recurrence on the CPU, forward and backward, float32, any length, any decay <= 1.
//
//   y_t = (A_{t-1} + e^{u+k_t} v_t) / (B_{t-1} + e^{u+k_t}),  A_t = e^w A_{t-1} + e^{k_t} v_t,  B likewise without v
//
// Layout: w, u [C]; k, v, y [T, C] with the tokens of all S sequences (cpu_sequences.h); states [S, 3, C] = (a, b, p)
// with A = a e^p, B = b e^p; all contiguous. Checkpoints are [T / 32 + S, 3, C].
// Parallel split: a block of neighbouring channels of one sequence is one task and owns all that it writes, so
// results do not depend on the number of threads. The gradients of w and u are left as one row a sequence.
//
// Method: token by token; of the two exponentials in each sum one is e^0, so each sum takes one exp. Backward: the
// forward pass leaves (a, b, p) every kInterval tokens, the states between are computed again. The gradients of A and
// B are kept as (ga, gb) e^o; o is at most -p, so that no exponent below is positive and nothing overflows.
//
// Memory: 3 kVecs (kInterval + 1) vectors a thread, 25 KB.

#include "../common/cpu_sequences.h"
#include "../common/cpu_vector.h"

namespace {

using namespace rwkv;

constexpr int kInterval = 32;
constexpr int kVecs = 4;  // vectors of channels in a task: enough to hide the latency of exp and the division
constexpr int kBlock = kVecs * kLanes;

struct Sizes {
  Sequences sequences;
  int C;
  int n_blocks() const { return (C + kBlock - 1) / kBlock; }
  // Where a checkpoint of a sequence begins.
  size_t checkpoint(int s, int index) const {
    return (sequences.first_checkpoint(s, kInterval) + index) * 3 * static_cast<size_t>(C);
  }
};

struct Inputs {
  const float *w, *u, *k, *v;
};

struct Gradients {
  float *w, *u, *k, *v, *state;  // w and u: [S, C]
};

// kVecs vectors of channels; of the last block of a row only the first `count` channels exist, the others read as 0.
struct Block {
  Vec x[kVecs];
};

inline Block load_block(const float* p, int count) {
  Block out;
  if (count >= kBlock) {
    for (int i = 0; i < kVecs; ++i) out.x[i] = load(p + i * kLanes);
  } else {
    std::memset(&out, 0, sizeof out);
    std::memcpy(&out, p, count * sizeof(float));
  }
  return out;
}

inline void store_block(float* p, const Block& block, int count) {
  if (count >= kBlock)
    for (int i = 0; i < kVecs; ++i) store(p + i * kLanes, block.x[i]);
  else
    std::memcpy(p, &block, count * sizeof(float));
}

inline Vec larger(Vec x, Vec y) { return x > y ? x : y; }

// (e^{x-m}, e^{y-m}) for m = max(x, y).
struct Weights {
  Vec x, y;
};
inline Weights weigh(Vec x, Vec y) {
  const Vec difference = x - y, one = spread(1.f);
  const Vec smaller = exp(difference > 0.f ? -difference : difference);
  return {difference >= 0.f ? one : smaller, difference >= 0.f ? smaller : one};
}

struct Sums {
  Vec a, b, p;
};

inline Sums add_token(const Sums& past, Vec w, Vec k, Vec v) {
  const Vec p = past.p + w;
  const Weights weight = weigh(p, k);
  return {weight.x * past.a + weight.y * v, weight.x * past.b + weight.y, larger(p, k)};
}

struct State {
  Sums sums[kVecs];
};

State load_state(const float* state, int C, int count) {
  const Block a = load_block(state, count), b = load_block(state + C, count), p = load_block(state + 2 * C, count);
  State out;
  for (int i = 0; i < kVecs; ++i) out.sums[i] = {a.x[i], b.x[i], p.x[i]};
  return out;
}

void store_state(float* to, int C, int count, const State& state) {
  Block a, b, p;
  for (int i = 0; i < kVecs; ++i) {
    a.x[i] = state.sums[i].a;
    b.x[i] = state.sums[i].b;
    p.x[i] = state.sums[i].p;
  }
  store_block(to, a, count);
  store_block(to + C, b, count);
  store_block(to + 2 * C, p, count);
}

void forward_block(const Inputs& in, const Sizes& sizes, int s, int channel, const float* state, float* y,
                   float* final_state, float* checkpoints) {
  const int C = sizes.C, count = C - channel, T = sizes.sequences.length(s);
  const Block w = load_block(in.w + channel, count), u = load_block(in.u + channel, count);
  const size_t state_at = static_cast<size_t>(s) * 3 * C + channel;
  State now = load_state(state + state_at, C, count);
  for (int t = 0; t < T; ++t) {
    if (checkpoints != nullptr && t % kInterval == 0)
      store_state(checkpoints + sizes.checkpoint(s, t / kInterval) + channel, C, count, now);
    const size_t at = (sizes.sequences.start(s) + t) * C + channel;
    const Block k = load_block(in.k + at, count), v = load_block(in.v + at, count);
    Block out;
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) {
      Sums& past = now.sums[i];
      const Weights weight = weigh(past.p, u.x[i] + k.x[i]);
      out.x[i] = (weight.x * past.a + weight.y * v.x[i]) / (weight.x * past.b + weight.y);
      past = add_token(past, w.x[i], k.x[i], v.x[i]);
    }
    store_block(y + at, out, count);
  }
  store_state(final_state + state_at, C, count, now);
  const int n_needed = (T + kInterval - 1) / kInterval;
  if (checkpoints != nullptr && sizes.checkpoint(s, n_needed) < sizes.checkpoint(s + 1, 0))  // room for one more
    store_state(checkpoints + sizes.checkpoint(s, n_needed) + channel, C, count, State{});
}

void backward_block(const Inputs& in, const Sizes& sizes, int s, int channel, const float* checkpoints,
                    const float* dy, const float* d_final, const Gradients& out) {
  const int C = sizes.C, count = C - channel, T = sizes.sequences.length(s);
  const Block w = load_block(in.w + channel, count), u = load_block(in.u + channel, count);
  const size_t state_at = static_cast<size_t>(s) * 3 * C + channel;
  // before[t] is the state before token t of an interval.
  State* const before = reinterpret_cast<State*>(thread_workspace((kInterval + 1) * sizeof(State) / sizeof(float)));
  State gradient = load_state(d_final + state_at, C, count);  // (ga, gb, o); what comes in for p is not used
  Block dw = {}, du = {};
  const int n_chunks = (T + kInterval - 1) / kInterval;
  for (int chunk = n_chunks - 1; chunk >= 0; --chunk) {
    const int first = chunk * kInterval, n_tokens = T - first < kInterval ? T - first : kInterval;
    const size_t first_at = (sizes.sequences.start(s) + first) * C + channel;
    before[0] = load_state(checkpoints + sizes.checkpoint(s, chunk) + channel, C, count);
    for (int t = 0; t < n_tokens; ++t) {
      const size_t at = first_at + static_cast<size_t>(t) * C;
      const Block k = load_block(in.k + at, count), v = load_block(in.v + at, count);
#pragma GCC unroll 4
      for (int i = 0; i < kVecs; ++i) before[t + 1].sums[i] = add_token(before[t].sums[i], w.x[i], k.x[i], v.x[i]);
    }
    if (chunk + 1 == n_chunks)
      for (int i = 0; i < kVecs; ++i) gradient.sums[i].p = -before[n_tokens].sums[i].p;
    Block chunk_dw = {}, chunk_du = {};  // summed by chunks first: a long sum of floats would lose digits
    for (int t = n_tokens - 1; t >= 0; --t) {
      const size_t at = first_at + static_cast<size_t>(t) * C;
      const Block k = load_block(in.k + at, count), v = load_block(in.v + at, count), dys = load_block(dy + at, count);
      Block dk, dv;
#pragma GCC unroll 4
      for (int i = 0; i < kVecs; ++i) {
        const Sums past = before[t].sums[i];
        Sums& g = gradient.sums[i];
        const Vec bonus_key = u.x[i] + k.x[i], scale = larger(past.p, bonus_key);
        const Weights weight = weigh(past.p, bonus_key);
        const Vec inverse = 1.f / (weight.x * past.b + weight.y);
        const Vec y = (weight.x * past.a + weight.y * v.x[i]) * inverse;
        const Vec q = dys.x[i] * inverse;  // times e^-scale

        const Vec key = exp(k.x[i] + g.p);
        const Vec bonus = weight.y * (v.x[i] - y) * q;
        dk.x[i] = key * (g.a * v.x[i] + g.b) + bonus;
        dv.x[i] = key * g.a + weight.y * q;
        chunk_du.x[i] += bonus;
        chunk_dw.x[i] += exp(w.x[i] + past.p + g.p) * (g.a * past.a + g.b * past.b);

        const Vec decayed = w.x[i] + g.p;
        const Weights mix = weigh(decayed, -scale);
        g = {mix.x * g.a + mix.y * q, mix.x * g.b - mix.y * (q * y), larger(decayed, -scale)};
      }
      store_block(out.k + at, dk, count);
      store_block(out.v + at, dv, count);
    }
    for (int i = 0; i < kVecs; ++i) {
      dw.x[i] += chunk_dw.x[i];
      du.x[i] += chunk_du.x[i];
    }
  }
  const size_t sum_at = static_cast<size_t>(s) * C + channel;
  store_block(out.w + sum_at, dw, count);
  store_block(out.u + sum_at, du, count);
  for (int i = 0; T > 0 && i < kVecs; ++i) {  // an empty sequence hands its state on; else from the gradients of A and B to those of (a, b, p)
    const Sums first = before[0].sums[i];
    Sums& g = gradient.sums[i];
    const Vec scale = exp(first.p + g.p);
    g = {g.a * scale, g.b * scale, Vec{}};
    g.p = first.a * g.a + first.b * g.b;
  }
  store_state(out.state + state_at, C, count, gradient);
}

}  // namespace

#define RWKV_EXPORT extern "C" __attribute__((visibility("default")))

// Tokens from one checkpoint to the next; checkpoints are [T / this + S, 3, C].
RWKV_EXPORT int rwkv_wkv4_checkpoint_tokens() { return kInterval; }

// checkpoints may be null where no backward pass follows.
RWKV_EXPORT void rwkv_wkv4_forward(int S, int C, const int64_t* cu_seqlens, const float* w, const float* u, const float* k, const float* v,
                                   const float* state, float* y, float* final_state, float* checkpoints,
                                   int n_threads) {
  const Inputs in{w, u, k, v};
  const Sizes sizes{{S, cu_seqlens}, C};
  for_each_share(sizes.sequences, sizes.n_blocks(), n_threads, [&](int first, int end) {
    for (int task = first; task < end; ++task)
      forward_block(in, sizes, task / sizes.n_blocks(), task % sizes.n_blocks() * kBlock, state, y, final_state,
                    checkpoints);
  });
}

// dw, du: [S, C], to be summed over the sequences.
RWKV_EXPORT void rwkv_wkv4_backward(int S, int C, const int64_t* cu_seqlens, const float* w, const float* u, const float* k, const float* v,
                                    const float* checkpoints, const float* dy, const float* d_final, float* dw,
                                    float* du, float* dk, float* dv, float* d_state, int n_threads) {
  const Inputs in{w, u, k, v};
  const Sizes sizes{{S, cu_seqlens}, C};
  const Gradients out{dw, du, dk, dv, d_state};
  for_each_share(sizes.sequences, sizes.n_blocks(), n_threads, [&](int first, int end) {
    for (int task = first; task < end; ++task)
      backward_block(in, sizes, task / sizes.n_blocks(), task % sizes.n_blocks() * kBlock, checkpoints, dy, d_final,
                     out);
  });
}
