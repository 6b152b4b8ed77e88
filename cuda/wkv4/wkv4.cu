// The RWKV-4 recurrence on a GPU, forward, backward and one token: float32 inside, any length, any decay <= 1.
//
//   y_t = (A_{t-1} + e^{u+k_t} v_t) / (B_{t-1} + e^{u+k_t}),  A_t = e^w A_{t-1} + e^{k_t} v_t,  B likewise without v
//
// Layout: w, u [C] and states [S, 3, C] = (a, b, p) with A = a e^p, B = b e^p in float32; k, v, y [T, C] in the dtype
// of the call, with the tokens of all S sequences one after another; all contiguous. Checkpoints are
// [T / 16 + S, 3, C], those of sequence s begin at cu_seqlens[s] / 16 + s.
//
// Parallel split: a sequence is cut into segments of L tokens; a block has 32 channels of one segment, a lane each, and
// walks through it in tiles of 128 tokens, of which each of its 8 warps takes 16. In a tile every warp first adds up its
// own tokens, from nothing; through shared memory each gets the sums of the others and joins them to what came before
// the tile; then it computes its outputs. So the inputs are read once, 16 + 16 token steps and 8 joins wait for each
// other where there are 128 tokens, and 8 times as many threads are at work as there are channels. Two forms:
//   sequential  L has no end: one segment a sequence, one kernel a pass.
//   scan        L = 128, for few channels and long sequences: a pass over the segments leaves the sums of each, a scan
//               joins them to the sums before each, a second pass over the segments computes the outputs. Of the n
//               segments of a sequence the scan joins n / 32 in a row, twice, and 32 such runs in 5 rounds.
// Both are the same kernels. The number of segments is bounded without a look at the lengths, as that of checkpoints:
// T / L + S slots, those of sequence s begin at cu_seqlens[s] / L + s, and a slot finds its sequence by bisection.
//
// Method: of the two exponentials in each sum one is e^0, so each sum takes one exp. The log scale is kept as
// base + age * w: so it is rounded once, and not again at each token. Backward: the forward pass leaves (a, b, p) before
// every 16 tokens, which is what a warp starts from; nothing is divided by a decay. The gradients of A and B are sums of
// the same kind from the last token to the first, (ga, gb) e^o; o is at most -p, so that no exponent below is positive.
// The gradients of w and u are left as one row a sequence.
//
// Memory: 0.75 bytes of checkpoints a token and channel. The scan form takes 12 bytes of workspace a slot and channel,
// 20 in the backward pass. Shared memory of a block: 22 KB forward (38 in float32), 54 KB backward, 4 KB in the scan.
// Bytes moved for a token and channel of bfloat16, beside checkpoints: 6 forward and 10 backward, the least possible, in
// the sequential form; 10 and 16 in the scan form.

#include <cstdint>
#include <type_traits>

#include "../common/gpu.cuh"

namespace {

using namespace rwkv;

constexpr int kBatch = 16;    // tokens of a warp in a tile; also from one checkpoint to the next
constexpr int kChannels = 32;  // of a block, a lane each
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kChannels;
constexpr int kTile = kWarps * kBatch;
constexpr int kForwardBlocks = 4, kBackwardBlocks = 2;  // that shall fit on a multiprocessor: 64 and 128 registers
constexpr int64_t kSegment = 128;              // tokens of a segment in the scan form; whole tiles
constexpr int64_t kNoEnd = int64_t{1} << 62;   // and in the sequential one
constexpr int kScanChannels = 8, kLanes = 32;  // threads of a block that joins segments: 8 floats are one sector
constexpr int kScanThreads = kScanChannels * kLanes;

constexpr float kEmptyLogScale = -1e38f;  // exp of it is 0, and it stays finite in a difference
// Stands for every stronger log decay, -inf among them, whose product with an age of 0 would be no number.
constexpr float kStrongestDecay = -1e20f;

// ---- where things lie

// A piece of a sequence: the tokens first .. end - 1 of the row. An empty sequence has one piece without tokens.
struct Segment {
  int s;
  int64_t first, end;
  int64_t checkpoint;  // index of the first one
  bool exists, is_first, is_last;
};

// S sequences of T tokens in all.
struct Row {
  int64_t T;
  int S, C;
  const int64_t* cu_seqlens;  // [S + 1], or null: then all sequences are equally long
  int64_t segment_tokens;

  // Where sequence s starts, for s <= S. Boundaries that are wrong must not lead out of the tensors.
  __device__ int64_t start(int s) const {
    if (cu_seqlens == nullptr) return s * (T / S);
    const int64_t given = cu_seqlens[s];
    return given < 0 ? 0 : given < T ? given : T;
  }
  __device__ int64_t end(int s) const {
    const int64_t first = start(s), next = start(s + 1);
    return next < first ? first : next;
  }
  // Where those begin that a sequence has one of for each `interval` tokens: room for all of them, found without a look
  // at other sequences. Of each sequence, up to one is not needed.
  static __device__ int64_t first_of(int s, int64_t start, int64_t interval) { return start / interval + s; }
  __device__ int64_t first_slot(int s) const { return first_of(s, start(s), segment_tokens); }

  __host__ __device__ int64_t n_slots() const { return T / segment_tokens + S; }

  __device__ int64_t n_segments(int s) const {
    const int64_t length = end(s) - start(s);
    return length == 0 ? 1 : (length - 1) / segment_tokens + 1;
  }

  __device__ int sequence_of(int64_t slot) const {
    if (segment_tokens > T) return static_cast<int>(slot);
    int low = 0, high = S;  // the last sequence whose slots begin at or before this one
    while (high - low > 1) {
      const int middle = low + (high - low) / 2;
      if (first_slot(middle) <= slot)
        low = middle;
      else
        high = middle;
    }
    return low;
  }

  __device__ Segment segment(int64_t slot) const {
    Segment out;
    out.s = sequence_of(slot);
    const int64_t sequence_start = start(out.s), sequence_end = end(out.s), index = slot - first_slot(out.s);
    out.is_first = index == 0;
    out.exists = index >= 0 && index < n_segments(out.s);
    out.is_last = index + 1 == n_segments(out.s);
    out.first = out.is_first ? sequence_start : sequence_start + index * segment_tokens;
    out.end = out.is_last ? sequence_end : out.first + segment_tokens;
    out.checkpoint = first_of(out.s, sequence_start, kBatch) + (out.first - sequence_start) / kBatch;
    return out;
  }
};

struct Inputs {
  const float *w, *u;
  const void *k, *v;
};

struct Gradients {
  float *w, *u;  // a row for each slot: one a sequence, or one a segment, to be added up
  void *k, *v;
  float* state;
};

__device__ __forceinline__ float log_decay(const float* w, int c) {
  return w[c] < kStrongestDecay ? kStrongestDecay : w[c];  // fmaxf would hide what is no number
}

// ---- sums

// (e^{x-m}, e^{y-m}) for m = max(x, y).
struct Weights {
  float x, y;
};
__device__ __forceinline__ Weights weigh(float x, float y) {
  const float difference = x - y, smaller = expf(-fabsf(difference));
  return {difference >= 0.f ? 1.f : smaller, difference >= 0.f ? smaller : 1.f};
}

// The same, quicker, off by a few units of the last digit: where the result is not multiplied on from token to token.
// Exponents are <= 0, and the further they are below, the less what they weigh counts.
__device__ __forceinline__ Weights weigh_once(float x, float y) {
  const float difference = x - y, smaller = __expf(-fabsf(difference));
  return {difference >= 0.f ? 1.f : smaller, difference >= 0.f ? smaller : 1.f};
}

// Two sums a e^p and b e^p.
struct Sums {
  float a, b, p;
};

__device__ __forceinline__ Sums no_sums() { return {0.f, 0.f, kEmptyLogScale}; }

// Of state number `index` of [.., 3, C].
__device__ __forceinline__ Sums load_sums(const float* states, int64_t index, int C, int c) {
  const float* from = states + index * 3 * C + c;
  return {from[0], from[C], from[2 * static_cast<int64_t>(C)]};
}

__device__ __forceinline__ void store_sums(float* states, int64_t index, int C, int c, Sums sums) {
  float* to = states + index * 3 * C + c;
  to[0] = sums.a;
  to[C] = sums.b;
  to[2 * static_cast<int64_t>(C)] = sums.p;
}

// What lies `tokens` tokens back, and what has been added since.
__device__ __forceinline__ Sums join(Sums past, Sums since, float tokens, float w) {
  const float p = fmaf(tokens, w, past.p);
  const Weights weight = weigh(p, since.p);
  return {weight.x * past.a + weight.y * since.a, weight.x * past.b + weight.y * since.b, fmaxf(p, since.p)};
}

// Sums on their way through tokens, with p = base + age * w.
struct RunningSums {
  float a, b, base, age;

  __device__ explicit RunningSums(Sums start) : a(start.a), b(start.b), base(start.p), age(0.f) {}

  __device__ __forceinline__ Sums now(float w) const { return {a, b, fmaf(age, w, base)}; }

  // Lets the sums decay once and adds (x, y) e^scale.
  __device__ __forceinline__ void add(float x, float y, float scale, float w) {
    age += 1.f;
    const float decayed = fmaf(age, w, base);
    const Weights weight = weigh(decayed, scale);
    a = weight.x * a + weight.y * x;
    b = weight.x * b + weight.y * y;
    if (!(decayed >= scale)) {
      base = scale;
      age = 0.f;
    }
  }

  // Lets them decay `tokens` times and adds what has been added since.
  __device__ __forceinline__ void take(Sums since, float tokens, float w) {
    age += tokens;
    const float decayed = fmaf(age, w, base);
    const Weights weight = weigh(decayed, since.p);
    a = weight.x * a + weight.y * since.a;
    b = weight.x * b + weight.y * since.b;
    if (!(decayed >= since.p)) {
      base = since.p;
      age = 0.f;
    }
  }
};

// ---- tokens on their way

// Where element `at` of a tensor lies.
__device__ __forceinline__ void* element(void* tensor, int64_t at, int dtype) {
  return static_cast<char*>(tensor) + at * (dtype == kFloat32 ? 4 : 2);
}

__device__ __forceinline__ int tokens_of_batch(int64_t left) {
  return left < kBatch ? (left < 0 ? 0 : static_cast<int>(left)) : kBatch;
}

// What a thread is: a channel of a segment, and some tokens of each tile.
struct Place {
  int warp, c;
  bool has_channel;  // the last block may have fewer than 32; its other lanes compute those of the last channel again
  int64_t slot;

  __device__ explicit Place(const Row& row) {
    const int n_groups = (row.C + kChannels - 1) / kChannels, lane = static_cast<int>(threadIdx.x) % kChannels;
    const int channel = static_cast<int>(blockIdx.x % n_groups) * kChannels + lane;
    warp = static_cast<int>(threadIdx.x) / kChannels;
    slot = blockIdx.x / n_groups;
    has_channel = channel < row.C;
    c = has_channel ? channel : row.C - 1;
  }
};

// The sums of each warp of a block, in shared memory; those of two tiles, so that a barrier a tile is enough.
class Exchange {
 public:
  static constexpr int kFloats = 2 * kWarps * 3 * kChannels;

  __device__ Exchange(float* memory, int64_t tile)
      : x_(memory + (tile & 1) * (kFloats / 2) + static_cast<int>(threadIdx.x) % kChannels) {}

  __device__ __forceinline__ void put(int warp, Sums sums) const {
    float* const to = x_ + warp * 3 * kChannels;
    to[0] = sums.a, to[kChannels] = sums.b, to[2 * kChannels] = sums.p;
  }
  __device__ __forceinline__ Sums get(int warp) const {
    const float* const from = x_ + warp * 3 * kChannels;
    return {from[0], from[kChannels], from[2 * kChannels]};
  }

 private:
  float* x_;
};

// One number for each token of a batch, in shared memory; the thread's own, so nobody waits for another. Neighbouring
// threads lie in neighbouring banks.
class Column {
 public:
  __device__ explicit Column(int number)
      : x_(shared_memory() + Exchange::kFloats + number * kBatch * kThreads + threadIdx.x) {}
  __device__ __forceinline__ float& operator[](int token) const { return x_[token * kThreads]; }

 private:
  float* x_;
};
constexpr size_t kSumsBytes = Exchange::kFloats * sizeof(float);
constexpr size_t forward_bytes(int dtype) { return kSumsBytes + 2 * kBatch * kThreads * (dtype == kFloat32 ? 4 : 2); }
constexpr size_t kBackwardBytes = kSumsBytes + (3 * kBatch * kThreads + kChannels) * sizeof(float);

// A batch of one channel as it lies in memory, two numbers of 16 bits in a register; converted where it is used.
template <int dtype>
struct Batch {
  static constexpr bool kPairs = dtype != kFloat32;
  using Element = std::conditional_t<kPairs, uint16_t, float>;
  using Word = std::conditional_t<kPairs, unsigned, float>;
  static constexpr int kInWord = kPairs ? 2 : 1, kWords = kBatch / kInWord;
  Word words[kWords];

  // The first `count` tokens from element `at` on; the others are zero.
  __device__ __forceinline__ void fetch(const void* from, int64_t at, int C, int count) {
    const Element* p = static_cast<const Element*>(from) + at;
    Element x[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i, p += C) x[i] = i < count ? *p : Element{};
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if constexpr (!kPairs)
        words[i] = x[i];
      else if (i % 2 == 0)
        words[i / 2] = x[i] | static_cast<unsigned>(x[i + 1]) << 16;
    }
  }
  __device__ __forceinline__ float operator[](int i) const { return number(words[i / kInWord], i % kInWord); }

  static __device__ __forceinline__ float number(Word word, int which) {
    if constexpr (dtype == kFloat32)
      return word;
    else if constexpr (dtype == kBFloat16)
      return __uint_as_float(which == 0 ? word << 16 : word & 0xffff0000u);
    else
      return float16_to_float(static_cast<uint16_t>(which == 0 ? word & 0xffffu : word >> 16));
  }

  // To and from a place of the thread's own in shared memory, [kWords, kThreads], for loops that are not unrolled.
  __device__ __forceinline__ void keep(Word* place) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) place[i * kThreads] = words[i];
  }
};

// ---- forward

// The sums of a warp's tokens, from nothing.
template <int dtype>
__device__ __forceinline__ Sums add_up(const Batch<dtype>& k, const Batch<dtype>& v, int count, float w) {
  RunningSums sums(no_sums());
#pragma unroll
  for (int i = 0; i < kBatch; ++i)
    if (i < count) sums.add(v[i], 1.f, k[i], w);
  return sums.now(w);
}

// Outputs of a segment from the sums before it, `incoming` [slots, 3, C]: in the sequential form those are the states.
template <int dtype>
__global__ void __launch_bounds__(kThreads, kForwardBlocks)
    forward_kernel(Row row, Inputs in, const float* incoming, void* y, float* final_state, float* checkpoints) {
  const int C = row.C;
  const Place place(row);
  const Segment segment = row.segment(place.slot);
  if (!segment.exists) return;
  const int c = place.c;
  const float w = log_decay(in.w, c), u = in.u[c];
  using Tokens = Batch<dtype>;
  using Word = typename Tokens::Word;
  Word* const kept_k = reinterpret_cast<Word*>(shared_memory() + Exchange::kFloats) + threadIdx.x;
  Word* const kept_v = kept_k + Tokens::kWords * kThreads;

  RunningSums before(load_sums(incoming, place.slot, C, c));  // the tile
  const int64_t length = segment.end - segment.first;
  int64_t at = (segment.first + place.warp * kBatch) * C + c, checkpoint = segment.checkpoint + place.warp;
  int parity = 0;
  for (int64_t left = length; left > 0; left -= kTile, at += kTile * C, checkpoint += kWarps, parity ^= 1) {
    const int count = tokens_of_batch(left - place.warp * kBatch);
    Tokens k, v;
    k.fetch(in.k, at, C, count);
    v.fetch(in.v, at, C, count);
    k.keep(kept_k);
    v.keep(kept_v);
    const Exchange exchange(shared_memory(), parity);
    exchange.put(place.warp, add_up(k, v, count, w));
    __syncthreads();
    RunningSums sums(before);
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      if (warp == place.warp) sums = before;
      before.take(exchange.get(warp), static_cast<float>(tokens_of_batch(left - warp * kBatch)), w);
    }
    if (count == 0 || !place.has_channel) continue;
    if (checkpoints != nullptr)
      store_sums(checkpoints, checkpoint, C, c, sums.now(w));
    void* out = element(y, at, dtype);
#pragma unroll 2
    for (int i = 0; i < count; i += Tokens::kInWord) {
      const Word keys = kept_k[i / Tokens::kInWord * kThreads], values = kept_v[i / Tokens::kInWord * kThreads];
#pragma unroll
      for (int which = 0; which < Tokens::kInWord; ++which, out = element(out, C, dtype)) {
        if (i + which >= count) break;
        const Sums past = sums.now(w);
        const float key = Tokens::number(keys, which), value = Tokens::number(values, which);
        const Weights weight = weigh_once(past.p, u + key);
        store(out, 0, __fdividef(weight.x * past.a + weight.y * value, weight.x * past.b + weight.y), dtype);
        sums.add(value, 1.f, key, w);
      }
    }
  }
  if (!segment.is_last || place.warp != 0 || !place.has_channel) return;
  store_sums(final_state, segment.s, C, c, length == 0 ? load_sums(incoming, place.slot, C, c) : before.now(w));
  if (checkpoints == nullptr) return;
  const int64_t room = Row::first_of(segment.s + 1, segment.end, kBatch);
  for (int64_t spare = segment.checkpoint + (length + kBatch - 1) / kBatch; spare < room; ++spare)
    store_sums(checkpoints, spare, C, c, {0.f, 0.f, 0.f});
}

// The sums that a segment adds to nothing, which those after it need: [slots, 3, C].
template <int dtype>
__global__ void __launch_bounds__(kThreads, kForwardBlocks) summarize_kernel(Row row, Inputs in, float* summaries) {
  const int C = row.C;
  const Place place(row);
  const Segment segment = row.segment(place.slot);
  if (!segment.exists || segment.is_last) return;
  const float w = log_decay(in.w, place.c);

  RunningSums sums(no_sums());
  for (int64_t tile = 0; tile < kSegment / kTile; ++tile) {  // every segment but the last is whole
    const int64_t at = (segment.first + tile * kTile + place.warp * kBatch) * C + place.c;
    Batch<dtype> k, v;
    k.fetch(in.k, at, C, kBatch);
    v.fetch(in.v, at, C, kBatch);
    const Exchange exchange(shared_memory(), tile);
    exchange.put(place.warp, add_up(k, v, kBatch, w));
    __syncthreads();
    if (place.warp != 0) continue;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sums.take(exchange.get(warp), kBatch, w);
  }
  if (place.warp == 0 && place.has_channel) store_sums(summaries, place.slot, C, place.c, sums.now(w));
}

// ---- backward

// From the gradients of the sums after a segment, those before it and those of all its inputs; `outgoing` [slots, 3, C]
// holds them for all but the last segment of a sequence, whose own is d_final. With `only_sums` it computes nothing but
// what a segment adds to the gradients of the sums before it: summaries [slots, 3, C].
template <int dtype, bool only_sums>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks)
    backward_kernel(Row row, Inputs in, const float* checkpoints, const void* dy, const float* d_final,
                    const float* outgoing, Gradients out, float* summaries) {
  const int C = row.C;
  const Place place(row);
  const Segment segment = row.segment(place.slot);
  if (!segment.exists || (only_sums && segment.is_first)) return;
  const int c = place.c;
  const float w = log_decay(in.w, c), u = in.u[c];
  const int64_t length = segment.end - segment.first;
  float* const last_scale = shared_memory() + Exchange::kFloats + 3 * kBatch * kThreads + threadIdx.x % kChannels;

  RunningSums after(no_sums());  // the gradient after the tile
  if (segment.is_last)
    after = RunningSums(load_sums(d_final, segment.s, C, c));  // what comes in for p is not used
  else if (!only_sums)
    after = RunningSums(load_sums(outgoing, place.slot, C, c));
  float dw = 0.f, du = 0.f;
  const Column past_a(0), past_b(1), past_p(2);
  const int64_t last_tile = (length - 1) / kTile;
  int64_t at = (segment.first + last_tile * kTile + place.warp * kBatch) * C + c;
  for (int64_t tile = length > 0 ? last_tile : -1; tile >= 0; --tile, at -= kTile * C) {
    const int64_t left = length - tile * kTile;
    const int count = tokens_of_batch(left - place.warp * kBatch);
    const bool ends_sequence = segment.is_last && tile == last_tile;
    Batch<dtype> k, v, dys;
    k.fetch(in.k, at, C, count);
    v.fetch(in.v, at, C, count);
    dys.fetch(dy, at, C, count);
    RunningSums sums(no_sums());
    if (count > 0)
      sums = RunningSums(load_sums(checkpoints, segment.checkpoint + tile * kWarps + place.warp, C, c));

    // q is dy over the denominator, times e^-scale; the scale is that of the larger of the two terms.
    float q[kBatch], y[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      q[i] = y[i] = 0.f;
      if (i >= count) continue;
      const Sums past = sums.now(w);
      past_a[i] = past.a;
      past_b[i] = past.b;
      past_p[i] = past.p;
      const float key = k[i], value = v[i];
      const Weights weight = weigh(past.p, u + key);
      const float inverse = 1.f / (weight.x * past.b + weight.y);
      y[i] = (weight.x * past.a + weight.y * value) * inverse;
      q[i] = dys[i] * inverse;
      sums.add(value, 1.f, key, w);
    }
    if (ends_sequence && count > 0 && place.warp * kBatch + count == left) *last_scale = sums.now(w).p;

    const auto add_token = [&](RunningSums& gradient, int i) {
      gradient.add(q[i], -(q[i] * y[i]), -fmaxf(past_p[i], u + k[i]), w);
    };
    RunningSums own(no_sums());
#pragma unroll
    for (int i = kBatch - 1; i >= 0; --i)
      if (i < count) add_token(own, i);
    const Exchange exchange(shared_memory(), tile);
    exchange.put(place.warp, own.now(w));
    __syncthreads();
    if (ends_sequence) after.base = -*last_scale;
    RunningSums gradient(after);
#pragma unroll
    for (int warp = kWarps - 1; warp >= 0; --warp) {
      if (warp == place.warp) gradient = after;
      after.take(exchange.get(warp), static_cast<float>(tokens_of_batch(left - warp * kBatch)), w);
    }
    if (only_sums || count == 0) continue;
    float batch_dw = 0.f, batch_du = 0.f;  // summed by batches first: a long sum of floats would lose digits
    void* dk = element(out.k, at + kBatch * C, dtype);
    void* dv = element(out.v, at + kBatch * C, dtype);
#pragma unroll
    for (int i = kBatch - 1; i >= 0; --i) {
      dk = element(dk, -C, dtype);
      dv = element(dv, -C, dtype);
      if (i >= count) continue;
      const Sums past{past_a[i], past_b[i], past_p[i]}, now = gradient.now(w);
      const float key = k[i], value = v[i], scale = fmaxf(past.p, u + key);
      const float through_sums = __expf(key + now.p), of_bonus = __expf(u + key - scale) * q[i];
      const float through_bonus = of_bonus * (value - y[i]);
      if (place.has_channel) {
        store(dk, 0, through_sums * (now.a * value + now.b) + through_bonus, dtype);
        store(dv, 0, through_sums * now.a + of_bonus, dtype);
      }
      batch_du += through_bonus;
      batch_dw += __expf(w + past.p + now.p) * (now.a * past.a + now.b * past.b);
      add_token(gradient, i);
    }
    dw += batch_dw;
    du += batch_du;
  }

  const Sums before_segment = after.now(w);
  if (only_sums) {
    if (place.warp == 0 && place.has_channel) store_sums(summaries, place.slot, C, c, before_segment);
    return;
  }
  // The exchange of the last tile may still be read; the other one is free.
  const Exchange exchange(shared_memory(), 1);
  exchange.put(place.warp, {dw, du, 0.f});
  __syncthreads();
  if (place.warp != 0 || !place.has_channel) return;
  dw = du = 0.f;
  for (int warp = 0; warp < kWarps; ++warp) {
    const Sums part = exchange.get(warp);
    dw += part.a;
    du += part.b;
  }
  out.w[place.slot * C + c] = dw;
  out.u[place.slot * C + c] = du;
  if (!segment.is_first) return;
  if (length == 0) {  // an empty sequence hands all of its gradient on
    store_sums(out.state, segment.s, C, c, load_sums(d_final, segment.s, C, c));
    return;
  }
  // From the gradients of A and B to those of (a, b, p).
  const Sums start = load_sums(checkpoints, segment.checkpoint, C, c);
  const float scale = expf(start.p + before_segment.p);
  const float da = before_segment.a * scale, db = before_segment.b * scale;
  store_sums(out.state, segment.s, C, c, {da, db, start.a * da + start.b * db});
}

// ---- the scan over segments

constexpr size_t kScanBytes = 4 * kScanThreads * sizeof(float);

// A block joins the segments of one sequence in 8 channels. Lane i of a channel has the i-th run of them, in the order
// of the scan.
struct Lane {
  int s, c, lane;
  bool has_channel;
  int64_t first_slot, n_segments, begin, end;  // the run
};

__device__ __forceinline__ Lane this_lane(const Row& row) {
  const int n_tiles = (row.C + kScanChannels - 1) / kScanChannels;
  Lane out;
  out.s = static_cast<int>(blockIdx.x / n_tiles);
  out.c = static_cast<int>(blockIdx.x % n_tiles) * kScanChannels + static_cast<int>(threadIdx.x) % kScanChannels;
  out.lane = static_cast<int>(threadIdx.x) / kScanChannels;
  out.has_channel = out.c < row.C;
  out.first_slot = row.first_slot(out.s);
  out.n_segments = row.n_segments(out.s);
  const int64_t each = (out.n_segments + kLanes - 1) / kLanes;
  out.begin = out.lane * each < out.n_segments ? out.lane * each : out.n_segments;
  out.end = out.begin + each < out.n_segments ? out.begin + each : out.n_segments;
  if (!out.has_channel) out.end = out.begin;
  return out;
}

// Puts in the place of what each segment adds the sums before it, starting from the state; or, backwards, the gradients
// of the sums after it: those of the last segment are not used.
template <bool backwards>
__global__ void __launch_bounds__(kScanThreads)
    scan_kernel(Row row, const float* log_decays, const float* state, float* summaries) {
  const Lane my = this_lane(row);
  const int c = my.has_channel ? my.c : 0;
  const float w = log_decay(log_decays, c), segment_tokens = static_cast<float>(row.segment_tokens);
  const auto slot = [&](int64_t i) { return my.first_slot + (backwards ? my.n_segments - 1 - i : i); };
  const auto added = [&](int64_t i) {  // nothing comes after the last one, so it has no summary
    return i + 1 < my.n_segments ? load_sums(summaries, slot(i), row.C, c) : no_sums();
  };

  Sums run = my.lane == 0 && !backwards ? load_sums(state, my.s, row.C, c) : no_sums();
  const Sums start = run;
#pragma unroll 4
  for (int64_t i = my.begin; i < my.end; ++i) run = join(run, added(i), segment_tokens, w);

  // The runs of all lanes up to and with this one, joined two by two, then of four and four, and so on.
  float tokens = static_cast<float>(my.end - my.begin) * segment_tokens;
  float* const mine = shared_memory() + 4 * threadIdx.x;
  const auto show = [&] {
    mine[0] = run.a;
    mine[1] = run.b;
    mine[2] = run.p;
    mine[3] = tokens;
    __syncthreads();
  };
  for (int distance = 1; distance < kLanes; distance *= 2) {
    show();
    if (my.lane >= distance) {
      const float* before = mine - 4 * distance * kScanChannels;
      run = join({before[0], before[1], before[2]}, run, tokens, w);
      tokens += before[3];
    }
    __syncthreads();
  }
  show();
  const float* before = mine - 4 * kScanChannels;
  Sums sums = my.lane == 0 ? start : Sums{before[0], before[1], before[2]};

  Sums next = my.begin < my.end ? added(my.begin) : no_sums();
  for (int64_t i = my.begin; i < my.end; ++i) {
    const Sums now = next;
    if (i + 1 < my.end) next = added(i + 1);
    store_sums(summaries, slot(i), row.C, c, sums);
    sums = join(sums, now, segment_tokens, w);
  }
}

// Adds up [slots, C] over the segments of each sequence, always in the same order, into [S, C].
__global__ void __launch_bounds__(kScanThreads) add_segments_kernel(Row row, const float* parts, float* sums) {
  const Lane my = this_lane(row);
  float sum = 0.f;
#pragma unroll 4
  for (int64_t i = my.begin; i < my.end; ++i) sum += parts[(my.first_slot + i) * row.C + my.c];
  float* const mine = shared_memory() + threadIdx.x;
  *mine = sum;
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    __syncthreads();
    if (my.lane < distance) *mine += mine[distance * kScanChannels];
  }
  if (my.lane == 0 && my.has_channel) sums[static_cast<int64_t>(my.s) * row.C + my.c] = *mine;
}

// ---- one token

// One thread for each channel of a sequence; final_state may be state.
template <int dtype>
__global__ void __launch_bounds__(kThreads)
    step_kernel(int S, int C, Inputs in, const float* state, void* y, float* final_state) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, s = thread / C;
  if (s >= S) return;
  const int c = static_cast<int>(thread % C);
  const float w = log_decay(in.w, c), k = load(in.k, thread, dtype), v = load(in.v, thread, dtype);
  const Sums past = load_sums(state, s, C, c);
  const Weights weight = weigh(past.p, in.u[c] + k);
  store(y, thread, (weight.x * past.a + weight.y * v) / (weight.x * past.b + weight.y), dtype);
  store_sums(final_state, s, C, c, join(past, {v, 1.f, k}, 1.f, w));
}

// ---- launches

constexpr int kInvalidValue = 1;  // as CUDA numbers it

dim3 blocks_for(int64_t n_threads) { return dim3(static_cast<unsigned>((n_threads + kThreads - 1) / kThreads)); }

// A kernel has at most a block for each slot and 8 channels.
bool can_run(const Row& row) { return row.n_slots() * ((row.C + kScanChannels - 1) / kScanChannels) <= 0x7fffffff; }

dim3 blocks_of_tiles(const Row& row) {
  return dim3(static_cast<unsigned>(row.n_slots() * ((row.C + kChannels - 1) / kChannels)));
}

dim3 blocks_of_scan(const Row& row) {
  const int64_t n_tiles = (row.C + kScanChannels - 1) / kScanChannels;
  return dim3(static_cast<unsigned>(row.S * n_tiles));
}

// run(a constant that is the dtype), or an error code.
template <typename Run>
int with_dtype(int dtype, Run run) {
  switch (dtype) {
    case kFloat32: return run(std::integral_constant<int, kFloat32>{});
    case kBFloat16: return run(std::integral_constant<int, kBFloat16>{});
    case kFloat16: return run(std::integral_constant<int, kFloat16>{});
    default: return kInvalidValue;
  }
}

// By estimate, not by measurement. A tile of 128 tokens takes a block about 3,500 cycles, however few blocks there are;
// where they are many, a token and channel takes a large chip's 528 schedulers 1/300 of a cycle, and the scan form needs
// 1.7 times that. Then both take equally long with about 5,000 channels, and it takes a thousand tokens to make up for
// the start of two more kernels.
bool is_for_scan(int S, int64_t T, int C) {
  return S > 0 && static_cast<int64_t>(S) * C <= 4096 && T / S >= 8 * kSegment;
}

int64_t scan_floats(int S, int64_t T, int C) { return (T / kSegment + S) * 3 * C; }

int64_t scan_workspace_bytes(int is_backward, int S, int64_t T, int C) {
  const int64_t floats = scan_floats(S, T, C);
  return static_cast<int64_t>(sizeof(float)) * (is_backward ? floats / 3 * 5 : floats);
}

int forward(bool scan, int dtype, int S, int64_t T, int C, const int64_t* cu_seqlens, const Inputs& in,
            const float* state, void* y, float* final_state, float* checkpoints, void* workspace, void* stream) {
  if (S == 0 || C == 0) return 0;
  const Row row{T, S, C, cu_seqlens, scan ? kSegment : kNoEnd};
  if (!can_run(row)) return kInvalidValue;
  const dim3 grid = blocks_of_tiles(row);
  return with_dtype(dtype, [&](auto constant) {
    constexpr int kType = decltype(constant)::value;
    const auto outputs = [&](const float* incoming) {
      return launch(forward_kernel<kType>, grid, dim3(kThreads), forward_bytes(kType), stream, row, in, incoming, y,
                    final_state, checkpoints);
    };
    if (!scan) return outputs(state);
    float* const sums = static_cast<float*>(workspace);
    int error = launch(summarize_kernel<kType>, grid, dim3(kThreads), kSumsBytes, stream, row, in, sums);
    if (error == 0)
      error = launch(scan_kernel<false>, blocks_of_scan(row), dim3(kScanThreads), kScanBytes, stream, row, in.w, state,
                     sums);
    return error == 0 ? outputs(sums) : error;
  });
}

int backward(bool scan, int dtype, int S, int64_t T, int C, const int64_t* cu_seqlens, const Inputs& in,
             const float* checkpoints, const void* dy, const float* d_final, const Gradients& out, void* workspace,
             void* stream) {
  if (S == 0 || C == 0) return 0;
  const Row row{T, S, C, cu_seqlens, scan ? kSegment : kNoEnd};
  if (!can_run(row)) return kInvalidValue;
  const dim3 grid = blocks_of_tiles(row);
  return with_dtype(dtype, [&](auto constant) {
    constexpr int kType = decltype(constant)::value;
    const auto gradients = [&](const float* outgoing, const Gradients& out) {
      return launch((backward_kernel<kType, false>), grid, dim3(kThreads), kBackwardBytes, stream, row, in, checkpoints,
                    dy, d_final, outgoing, out, nullptr);
    };
    if (!scan) return gradients(nullptr, out);
    float* const sums = static_cast<float*>(workspace);
    Gradients by_segment = out;
    by_segment.w = sums + scan_floats(S, T, C);
    by_segment.u = by_segment.w + row.n_slots() * C;
    int error = launch((backward_kernel<kType, true>), grid, dim3(kThreads), kBackwardBytes, stream, row, in,
                       checkpoints, dy, d_final, nullptr, by_segment, sums);
    if (error == 0)
      error = launch(scan_kernel<true>, blocks_of_scan(row), dim3(kScanThreads), kScanBytes, stream, row, in.w, nullptr,
                     sums);
    if (error == 0) error = gradients(sums, by_segment);
    const auto add_up = [&](const float* parts, float* whole) {
      return launch(add_segments_kernel, blocks_of_scan(row), dim3(kScanThreads), kScanThreads * sizeof(float), stream,
                    row, parts, whole);
    };
    if (error == 0) error = add_up(by_segment.w, out.w);
    if (error == 0) error = add_up(by_segment.u, out.u);
    return error;
  });
}

}  // namespace

// Tokens from one checkpoint to the next; checkpoints are [T / this + S, 3, C].
RWKV_EXPORT int rwkv_wkv4_checkpoint_tokens() { return kBatch; }

// 1 where the functions without a form in their names take the scan form.
RWKV_EXPORT int rwkv_wkv4_uses_scan(int S, int64_t T, int C) { return is_for_scan(S, T, C); }

RWKV_EXPORT const char* rwkv_wkv4_error(int code) { return error_text(code); }

// The three functions of a form. T: tokens of all sequences; cu_seqlens: [S + 1] on the device, or null where all are
// equally long; dw, du: [S, C], to be summed over the sequences; checkpoints may be null where no backward pass
// follows. They return 0, or a code for rwkv_wkv4_error. Any form of backward fits any form of forward.
#define RWKV_WKV4_FORM(NAME, SCAN)                                                                                     \
  RWKV_EXPORT int64_t rwkv_wkv4_workspace_bytes##NAME(int is_backward, int S, int64_t T, int C) {                      \
    return SCAN ? scan_workspace_bytes(is_backward, S, T, C) : 0;                                                      \
  }                                                                                                                    \
  RWKV_EXPORT int rwkv_wkv4_forward##NAME(int dtype, int S, int64_t T, int C, const int64_t* cu_seqlens,               \
                                          const float* w, const float* u, const void* k, const void* v,                \
                                          const float* state, void* y, float* final_state, float* checkpoints,         \
                                          void* workspace, void* stream) {                                             \
    return forward(SCAN, dtype, S, T, C, cu_seqlens, {w, u, k, v}, state, y, final_state, checkpoints, workspace,      \
                   stream);                                                                                            \
  }                                                                                                                    \
  RWKV_EXPORT int rwkv_wkv4_backward##NAME(                                                                            \
      int dtype, int S, int64_t T, int C, const int64_t* cu_seqlens, const float* w, const float* u, const void* k,    \
      const void* v, const float* checkpoints, const void* dy, const float* d_final, float* dw, float* du, void* dk,   \
      void* dv, float* d_state, void* workspace, void* stream) {                                                       \
    return backward(SCAN, dtype, S, T, C, cu_seqlens, {w, u, k, v}, checkpoints, dy, d_final,                          \
                    {dw, du, dk, dv, d_state}, workspace, stream);                                                     \
  }

RWKV_WKV4_FORM(, is_for_scan(S, T, C))
RWKV_WKV4_FORM(_sequential, false)  // to compare the forms, in tests and benchmarks
RWKV_WKV4_FORM(_scan, true)

// One token of each of S sequences: k, v, y [S, C].
RWKV_EXPORT int rwkv_wkv4_step(int dtype, int S, int C, const float* w, const float* u, const void* k, const void* v,
                               const float* state, void* y, float* final_state, void* stream) {
  if (S == 0 || C == 0) return 0;
  return with_dtype(dtype, [&](auto constant) {
    return launch(step_kernel<decltype(constant)::value>, blocks_for(static_cast<int64_t>(S) * C), dim3(kThreads), 0,
                  stream, S, C, Inputs{w, u, k, v}, state, y, final_state);
  });
}
