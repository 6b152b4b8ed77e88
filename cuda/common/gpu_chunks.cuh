// What the kernels on tensor cores share: sequences, or segments of them, shared out over blocks; chunks of tokens on
// their way into shared memory; and states that are kept.
//
// A chunk is kChunkTokens tokens. A block walks through the chunks of a span: a whole sequence, or one of its segments
// of segment_tokens tokens, which run side by side where sequences are few and long. Segments of sequence s have the
// slots from cu_seqlens[s] / segment_tokens + s on, so each knows its place without the lengths of the others; a slot
// for which there are no tokens has nothing to do. Every kStateTokens tokens of a sequence its state is kept, rounded to
// bfloat16, as a checkpoint: those of sequence s begin at cu_seqlens[s] / kStateTokens + s.

#pragma once

#include "gpu_heads.cuh"
#include "gpu_tiles.cuh"

namespace rwkv {

constexpr int kChunkTokens = 16;
constexpr int kStateTokens = 64;
static_assert(kStateTokens % kChunkTokens == 0, "a checkpoint lies before a chunk");

// Blocks that keep a large chip busy: two for each of the 132 multiprocessors of an H100. The same on every chip, so that
// a call gives the same bits on all of them.
constexpr int64_t kBusyBlocks = 264;
constexpr int64_t kLeastSegment = 256;  // tokens

// Tokens of a segment where S sequences of T tokens in all get n_blocks blocks each; 0: sequences stay whole. Segments
// cost `work` times the work, so they must bring more than that.
inline int segment_tokens_for(int64_t S, int64_t T, int64_t n_blocks, int64_t work) {
  if (S == 0 || S * n_blocks * work > kBusyBlocks || T / S < 2 * work * kLeastSegment) return 0;
  const int64_t wanted = T * n_blocks / kBusyBlocks;
  const int64_t tokens = wanted < kLeastSegment ? kLeastSegment : wanted;
  return static_cast<int>((tokens + kStateTokens - 1) / kStateTokens * kStateTokens);
}

inline int64_t count_slots(int S, int64_t T, int segment_tokens) {
  return segment_tokens == 0 ? S : T / segment_tokens + S;
}

// What a block walks through.
struct Span {
  int64_t slot;
  int s, head, part;        // part: of the values of a head, where several blocks share them out
  int64_t first_token, n_tokens;
  int64_t first_checkpoint;  // in states; those of a span follow each other
  bool is_first, is_last;    // of its sequence
  bool is_used;              // false for a slot that has no segment

  __device__ int64_t n_chunks() const { return (n_tokens + kChunkTokens - 1) / kChunkTokens; }
};

// Block (slot * H + head) * n_parts + part has this span. Whatever cu_seqlens holds, it lies inside of the tensors.
__device__ inline Span span_of_block(const Heads& heads, int n_parts, int segment_tokens) {
  Span span;
  const int64_t block = blockIdx.x;
  span.part = static_cast<int>(block % n_parts);
  span.head = static_cast<int>(block / n_parts % heads.H);
  span.slot = block / n_parts / heads.H;
  int64_t number = 0;  // of the segment in its sequence
  if (segment_tokens == 0) {
    span.s = static_cast<int>(span.slot);
  } else {
    int low = 0, high = heads.S - 1;  // the last sequence whose slots begin at this one or before
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (heads.start(middle) / segment_tokens + middle <= span.slot)
        low = middle;
      else
        high = middle - 1;
    }
    span.s = low;
    number = span.slot - (heads.start(low) / segment_tokens + low);
  }
  const int64_t start = heads.start(span.s), next = heads.start(span.s + 1), end = next < start ? start : next;
  const int64_t first = start + number * segment_tokens;
  span.is_used = number == 0 || (number > 0 && first < end);
  span.first_token = span.is_used ? first : start;
  const int64_t left = span.is_used ? end - first : 0;
  span.n_tokens = segment_tokens == 0 || left < segment_tokens ? left : segment_tokens;
  span.first_checkpoint = start / kStateTokens + span.s + (span.is_used ? number * (segment_tokens / kStateTokens) : 0);
  span.is_first = number == 0;
  span.is_last = span.is_used && span.first_token + span.n_tokens == end;
  return span;
}

// Starts the copy of the rows of a chunk from global memory, `stride` numbers apart, a row to every `step` numbers of
// shared memory. Rows from n_rows on become 0 and are not read. All kThreads threads take part; each waits for its own
// copies (cp_async_wait).
template <int kColumns, int kThreads, typename Number>
__device__ __forceinline__ void fetch_rows(const Number* from, int64_t stride, int n_rows, int thread, Number* to,
                                           int step) {
  constexpr int kNumbers = 16 / sizeof(Number), kPieces = kColumns / kNumbers;  // of 16 bytes
  static_assert(kThreads % kPieces == 0, "threads have whole rows");
  constexpr int kRows = kThreads / kPieces;  // at a time
  const int first = thread / kPieces, column = thread % kPieces * kNumbers;
  if (kRows > kChunkTokens && first >= kChunkTokens) return;
  from += first * stride + column;
  to += first * step + column;
#pragma unroll
  for (int row = 0; row < kChunkTokens; row += kRows) {
    cp_async<16>(to + row * step, from, first + row < n_rows);
    from += kRows * stride;
  }
}

// The same of bfloat16 into a matrix, and of float32 into rows of kColumns floats without gaps.
template <int kColumns, int kThreads>
__device__ __forceinline__ void fetch_chunk(const uint16_t* from, int64_t stride, int n_rows, int thread,
                                            const Matrix<kColumns>& to) {
  fetch_rows<kColumns, kThreads>(from, stride, n_rows, thread, to.first, Matrix<kColumns>::kStride);
}
template <int kColumns, int kThreads>
__device__ __forceinline__ void fetch_chunk(const float* from, int64_t stride, int n_rows, int thread, float* to) {
  fetch_rows<kColumns, kThreads>(from, stride, n_rows, thread, to, kColumns);
}

}  // namespace rwkv
