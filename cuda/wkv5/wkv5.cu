// The RWKV-5 recurrence on a GPU: the functions that Python calls. Layout, method and memory: the header.
//
// dtype is that of r, k, v, y and their gradients; w, u, states, checkpoints and what has a gradient of a state are
// float32. cu_seqlens may be null: then all sequences have T / S tokens. Each function that launches returns 0 or
// CUDA's code of what went wrong; all work is on `stream`.

#include "../common/gpu_linear_attention.cuh"

// Tokens from one checkpoint to the next; checkpoints are [T / this + S, H, N, N].
RWKV_EXPORT int rwkv_wkv5_checkpoint_tokens() { return rwkv::kGroupTokens; }

RWKV_EXPORT const char* rwkv_wkv5_error(int code) { return rwkv::error_text(code); }

RWKV_EXPORT int64_t rwkv_wkv5_workspace_bytes(int is_backward, int S, int64_t T, int H, int N) {
  return rwkv::workspace_bytes<true>(is_backward != 0, S, T, H, N);
}

// checkpoints may be null where no backward pass follows.
RWKV_EXPORT int rwkv_wkv5_forward(int dtype, int S, int64_t T, int H, int N, const int64_t* cu_seqlens, const void* r,
                                  const float* w, const void* k, const void* v, const float* u, const float* state,
                                  void* y, float* final_state, float* checkpoints, void*, void* stream) {
  return rwkv::forward<true>({dtype, S, T, H, N, cu_seqlens}, {r, w, k, v, u}, state, y, final_state, checkpoints,
                             stream);
}

// dw and du are [S, H, N]: a row for each sequence, to be added up.
RWKV_EXPORT int rwkv_wkv5_backward(int dtype, int S, int64_t T, int H, int N, const int64_t* cu_seqlens, const void* r,
                                   const float* w, const void* k, const void* v, const float* u,
                                   const float* checkpoints, const void* dy, const float* d_final, void* dr, float* dw,
                                   void* dk, void* dv, float* du, float* d_state, void* workspace, void* stream) {
  return rwkv::backward<true>({dtype, S, T, H, N, cu_seqlens}, {r, w, k, v, u}, checkpoints, dy, d_final,
                              {dr, dw, dk, dv, du, dtype}, d_state, workspace, stream);
}

// One token for each sequence; final_state may be state.
RWKV_EXPORT int rwkv_wkv5_step(int dtype, int S, int H, int N, const void* r, const float* w, const void* k,
                               const void* v, const float* u, const float* state, void* y, float* final_state,
                               void* stream) {
  return rwkv::step<true>({dtype, S, S, H, N, nullptr}, {r, w, k, v, u}, state, y, final_state, stream);
}
