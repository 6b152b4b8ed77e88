// How the CPU kernels find the sequences of a packed row, and how they share them out over threads.
//
// A row holds S sequences one after another; sequence s has the tokens cu_seqlens[s] .. cu_seqlens[s + 1] - 1, and may
// have none. A plain batch of B rows with T tokens is a row of B such sequences.

#pragma once

#include <omp.h>

#include <cstddef>
#include <cstdint>

namespace rwkv {

struct Sequences {
  int count;
  const int64_t* cu_seqlens;  // [count + 1]

  int64_t start(int s) const { return cu_seqlens[s]; }
  int64_t length(int s) const { return cu_seqlens[s + 1] - cu_seqlens[s]; }
  // Where the checkpoints of a sequence begin, and those of the one before it end, with one kept every `interval`
  // tokens. Room for all of them, found without looking at other sequences; of each up to one is not needed.
  int64_t first_checkpoint(int s, int interval) const { return cu_seqlens[s] / interval + s; }
};

// The heads, or blocks of channels, of all sequences are tasks: task s * n_parts + i is part i of sequence s. They are
// shared out by the tokens in them, not by their number, so that one long sequence does not leave threads idle; which
// thread computes a task changes nothing in its result.
class Shares {
 public:
  Shares(const Sequences& sequences, int n_parts, int n_threads)
      : sequences_(sequences), n_parts_(n_parts), n_threads_(n_threads) {}

  // The first task of a thread, which takes those up to the first one of the next thread.
  int64_t first(int thread) const {
    const int64_t all = work_before(sequences_.count) * n_parts_, wanted = all * thread / n_threads_;
    int low = 0, high = sequences_.count;  // the last sequence that starts at or before `wanted`
    while (high - low > 1) {
      const int middle = low + (high - low) / 2;
      (work_before(middle) * n_parts_ <= wanted ? low : high) = middle;
    }
    const int64_t each = work_before(low + 1) - work_before(low), inside = wanted - work_before(low) * n_parts_;
    return static_cast<int64_t>(low) * n_parts_ + (inside + each - 1) / each;
  }

 private:
  static constexpr int kFixedWork = 4;  // of a task: to take a state in and out costs about as much as so many tokens
  int64_t work_before(int s) const { return sequences_.start(s) + static_cast<int64_t>(s) * kFixedWork; }

  const Sequences& sequences_;
  int n_parts_, n_threads_;
};

// run(first, end) computes tasks first .. end - 1, in each thread once.
template <typename Run>
void for_each_share(const Sequences& sequences, int n_parts, int n_threads, Run run) {
#pragma omp parallel num_threads(n_threads)
  {
    const Shares shares(sequences, n_parts, omp_get_num_threads());
    run(shares.first(omp_get_thread_num()), shares.first(omp_get_thread_num() + 1));
  }
}

}  // namespace rwkv
