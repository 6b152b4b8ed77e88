// The RWKV-5 recurrence on tensor cores, backward: the functions that Python calls. Method, layout and memory: the
// header. Those of the forward pass, and the workspace's size: wkv5_chunked_forward.cu.
//
// dtype must be bfloat16, and N 64 or 128. r, k, v, dy, their gradients and the checkpoints are bfloat16; w, u, what
// has a gradient of a state, dw and du are float32. All of them begin at multiples of 16 bytes. cu_seqlens may be
// null: then all sequences have T / S tokens. Each function returns 0 or CUDA's code of what went wrong; all work is
// on `stream`.

#include "../common/gpu_chunked_linear_attention_backward.cuh"

namespace rwkv::chunked {

int64_t backward_workspace_bytes(Form form, int S, int64_t T, int H, int N) {
  return back::workspace_bytes<true>(form, S, T, H, N);
}

namespace {

uint16_t* numbers(void* tensor) { return static_cast<uint16_t*>(tensor); }

}  // namespace
}  // namespace rwkv::chunked

// The function of a form. Any form of the forward pass may have written the checkpoints.
// dw and du are [S, H, N]: a row for each sequence, to be added up.
#define RWKV_WKV5_CHUNKED_FORM(NAME, FORM)                                                                             \
  RWKV_EXPORT int rwkv_wkv5_backward##NAME(                                                                            \
      int dtype, int S, int64_t T, int H, int N, const int64_t* cu_seqlens, const void* r, const float* w,             \
      const void* k, const void* v, const float* u, const void* checkpoints, const void* dy, const float* d_final,     \
      void* dr, float* dw, void* dk, void* dv, float* du, float* d_state, void* workspace, void* stream) {            \
    using namespace rwkv::chunked;                                                                                     \
    return back::backward<true>(FORM, {dtype, S, T, H, N, cu_seqlens}, {r, w, k, v, u}, checkpoints, dy, d_final,  \
                                 {numbers(dr), dw, numbers(dk), numbers(dv), du, nullptr}, d_state, workspace,       \
                                 stream);                                                                              \
  }

RWKV_WKV5_CHUNKED_FORM(_chunked, Form::kBySizes)
RWKV_WKV5_CHUNKED_FORM(_chunked_whole, Form::kWhole)  // to compare the forms, in tests and benchmarks
RWKV_WKV5_CHUNKED_FORM(_chunked_segments, Form::kSegments)
