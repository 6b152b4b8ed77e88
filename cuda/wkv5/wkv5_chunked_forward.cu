// The RWKV-5 recurrence on tensor cores, forward: the functions that Python calls. Method, layout and memory: the
// header. Those of the backward pass: wkv5_chunked_backward.cu; of the kernels that compute token by token: wkv5.cu.
//
// dtype must be bfloat16, and N 64 or 128. r, k, v, y and the checkpoints are bfloat16; w, u and states are float32.
// All of them begin at multiples of 16 bytes. cu_seqlens may be null: then all sequences have T / S tokens. Each
// function that launches returns 0 or CUDA's code of what went wrong; all work is on `stream`.

#include "../common/gpu_chunked_linear_attention_forward.cuh"

// Tokens from one checkpoint to the next; checkpoints are [T / this + S, H, N, N].
RWKV_EXPORT int rwkv_wkv5_checkpoint_tokens_chunked() { return rwkv::kStateTokens; }

// The functions of a form. workspace_bytes is that of both passes; checkpoints may be null where no backward pass
// follows. Any form of the backward pass fits any form of this one.
#define RWKV_WKV5_CHUNKED_FORM(NAME, FORM)                                                                             \
  RWKV_EXPORT int64_t rwkv_wkv5_workspace_bytes##NAME(int is_backward, int S, int64_t T, int H, int N) {               \
    return rwkv::chunked::workspace_bytes(FORM, is_backward != 0, S, T, H, N);                                         \
  }                                                                                                                    \
  RWKV_EXPORT int rwkv_wkv5_forward##NAME(int dtype, int S, int64_t T, int H, int N, const int64_t* cu_seqlens,        \
                                          const void* r, const float* w, const void* k, const void* v, const float* u, \
                                          const float* state, void* y, float* final_state, void* checkpoints,          \
                                          void* workspace, void* stream) {                                             \
    return rwkv::chunked::forward<true>(FORM, {dtype, S, T, H, N, cu_seqlens}, {r, w, k, v, u}, state, y,              \
                                        final_state, checkpoints, workspace, stream);                                  \
  }

RWKV_WKV5_CHUNKED_FORM(_chunked, rwkv::chunked::Form::kBySizes)
RWKV_WKV5_CHUNKED_FORM(_chunked_whole, rwkv::chunked::Form::kWhole)  // to compare the forms, in tests and benchmarks
RWKV_WKV5_CHUNKED_FORM(_chunked_segments, rwkv::chunked::Form::kSegments)
