// The RWKV-5 recurrence on the CPU: the functions that Python calls. Layout, method and memory: the header.

#include "../common/cpu_linear_attention.h"

// Tokens from one checkpoint to the next; checkpoints are [T / this + S, H, N, N].
RWKV_EXPORT int rwkv_wkv5_checkpoint_tokens() { return rwkv::kCheckpointTokens; }

// checkpoints may be null where no backward pass follows.
RWKV_EXPORT void rwkv_wkv5_forward(int S, int H, int N, const int64_t* cu_seqlens, const float* r, const float* w, const float* k,
                                   const float* v, const float* u, const float* state, float* y, float* final_state,
                                   float* checkpoints, int n_threads) {
  rwkv::forward<true>({r, w, k, v, u}, {{S, cu_seqlens}, H, N}, state, y, final_state, checkpoints, n_threads);
}

// dw and du are [S, H, N]: a row for each sequence, to be added up.
RWKV_EXPORT void rwkv_wkv5_backward(int S, int H, int N, const int64_t* cu_seqlens, const float* r, const float* w, const float* k,
                                    const float* v, const float* u, const float* checkpoints, const float* dy,
                                    const float* d_final, float* dr, float* dw, float* dk, float* dv, float* du,
                                    float* d_state, int n_threads) {
  rwkv::backward<true>({r, w, k, v, u}, {{S, cu_seqlens}, H, N}, checkpoints, dy, d_final, {dr, dw, dk, dv, du}, d_state,
                        n_threads);
}
