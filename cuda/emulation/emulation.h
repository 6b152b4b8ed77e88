// Runs the source of a CUDA kernel on the CPU: a test tool (README.md says how to use it and what it finds).
//
// Blocks run one after the other. The threads of a block are fibers of the one thread that called launch(): each runs
// until it must wait for others, at a barrier or in a collective of its warp (shuffle, mma), then the next one goes
// on. A thread gets a stack of its own only when an earlier one waits, so threads that never wait are plain calls.
//
// All state is in `machine`; a lock lets one launch at a time use it. What goes wrong launch() returns as a code, and
// error_text() tells.

#pragma once

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#if !defined(__x86_64__) || !defined(__linux__)
#define RWKV_EMULATION_PORTABLE  // define it by hand to test the portable switch elsewhere
#endif
#if defined(RWKV_EMULATION_PORTABLE)
#include <ucontext.h>
#endif

// Hidden, so that two emulated libraries in one process share nothing.
#define RWKV_HIDDEN __attribute__((visibility("hidden")))

// ---------------------------------------------------------------------------------------------------------------------
// CUDA's words and types

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) float2 {
  float x, y;
};
struct float3 {
  float x, y, z;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

constexpr int warpSize = 32;
RWKV_HIDDEN inline uint3 threadIdx, blockIdx;
RWKV_HIDDEN inline dim3 blockDim, gridDim;

// ---------------------------------------------------------------------------------------------------------------------
// Fibers: a stack, and where its registers lie on it.

namespace RWKV_HIDDEN rwkv_emulation {

// No power of two: the frames of all threads would share few sets of the cache.
constexpr size_t kStackBytes = (64 << 10) + 320;
constexpr size_t kStackEnd = 64;  // bytes at its end that must stay as they are

[[noreturn]] inline void fiber_main();

#if !defined(RWKV_EMULATION_PORTABLE)

using Context = void*;  // the stack pointer; the registers that a call must keep lie there

extern "C" RWKV_HIDDEN void rwkv_fiber_switch(Context* save, Context to);

// Pushes the registers that a call must keep, changes stacks, pops those of the other fiber, goes on there. It jumps
// rather than returns: the processor predicts returns by a stack of its own, which would be wrong every time.
asm(R"(
  .text
  .p2align 4
  .type rwkv_fiber_switch, @function
rwkv_fiber_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
  .size rwkv_fiber_switch, .-rwkv_fiber_switch
)");

inline void switch_context(Context* save, Context* to) { rwkv_fiber_switch(save, *to); }

inline void make_context(Context* context, char* stack) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // where fiber_main would return to; it keeps the alignment that a function expects
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  *context = top;
}

#else

using Context = ucontext_t;

inline void switch_context(Context* save, Context* to) { swapcontext(save, to); }

inline void make_context(Context* context, char* stack) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = kStackBytes;
  context->uc_link = nullptr;
  makecontext(context, &fiber_main, 0);
}

#endif

// ---------------------------------------------------------------------------------------------------------------------
// The machine

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kMaxShared = 101376;
constexpr size_t kBand = 4096;        // bytes before the shared memory that must stay as they are
constexpr size_t kFence = 256 << 10;  // bytes after it, and before all stacks, that cannot be touched
constexpr int kPoison = 0xff;         // a byte of which every float is NaN and every int is -1
constexpr int kFailed = 719;          // what CUDA calls "unspecified launch failure"
constexpr int kBadLaunch = 9;         // what CUDA calls "invalid configuration argument"
constexpr int kNoMemory = 2;          // what CUDA calls "out of memory"

// What the last lane does on behalf of all lanes of a mask; lanes[i] is the operand of lane i.
using Complete = void (*)(void* const* lanes, unsigned mask);

// Sets have a bit for each lane. A lane is in one of the first four, or it is running, or it has ended.
struct Warp {
  unsigned unstarted, ready, at_barrier, in_collective;
  unsigned masks[kWarp];
  Complete completes[kWarp];
  void* operands[kWarp];
};

// A copy that has been asked for and has not arrived (emulation_mma.h).
struct Copy {
  void* to;
  const void* from;  // null: zeros
  unsigned bytes, group;
};

struct Machine {
  std::mutex lock;
  std::string error;
  uint64_t order = 0;

  const char* name = "";
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
  int n_threads = 0, n_warps = 0;

  int thread = 0;               // the running one
  unsigned running_warps = 0;   // warps with lanes that are ready or not started
  int n_at_barrier = 0, n_ended = 0;
  bool failed = false;
  pthread_t caller = {};
  sigjmp_buf fault;
  Warp warps[kMaxThreads / kWarp];
  uint3 indices[kMaxThreads];
  Context contexts[kMaxThreads], main, dropped;
  std::vector<Copy> copies[kMaxThreads];
  unsigned copy_groups[kMaxThreads];  // that a thread has committed in this block

  char* stacks = nullptr;
  std::vector<int> free_stacks;
  int new_stack = 0;  // that of the fiber that starts

  char* shared_end = nullptr;  // the shared memory ends here, what lies behind cannot be touched
  char* shared = nullptr;
  size_t shared_bytes = 0;
};

inline Machine machine;

constexpr char kStackFull[] = "a thread needs more than the 64 KB of stack that it has here";

inline void describe(const std::string& what) {
  char place[160];
  std::snprintf(place, sizeof place, ", block (%u, %u, %u): ", blockIdx.x, blockIdx.y, blockIdx.z);
  machine.error = std::string("emulation: kernel ") + machine.name + place + what;
}

// Ends the launch: all threads of the block are dropped where they stand.
[[noreturn, gnu::noinline, gnu::cold]] inline void fail(const std::string& what) {
  describe(what);
  machine.failed = true;
  switch_context(&machine.dropped, &machine.main);
  std::abort();
}

inline bool is_poison(const char* bytes, size_t n) {
  return n == 0 || (bytes[0] == static_cast<char>(kPoison) && std::memcmp(bytes, bytes + 1, n - 1) == 0);
}

inline bool descending() { return machine.order & 1; }

inline int first_of(unsigned set) { return descending() ? 31 - __builtin_clz(set) : __builtin_ctz(set); }

inline std::string names_of(unsigned lanes) {
  std::string text;
  for (; lanes; lanes &= lanes - 1) text += (text.empty() ? "" : ", ") + std::to_string(__builtin_ctz(lanes));
  return text;
}

[[noreturn, gnu::noinline, gnu::cold]] inline void explain_deadlock() {
  for (int w = 0; w < machine.n_warps; ++w) {
    const Warp& warp = machine.warps[w];
    if (!warp.in_collective) continue;
    const int lane = __builtin_ctz(warp.in_collective);
    const unsigned missing = warp.masks[lane] & ~warp.in_collective;
    fail("lane " + std::to_string(lane) + " of warp " + std::to_string(w) +
         " waits in a shuffle, __syncwarp or mma for lanes " + names_of(missing) +
         ", which have ended, wait elsewhere or do not exist; all lanes of a mask must come, with the same mask");
  }
  fail("__syncthreads was reached by " + std::to_string(machine.n_at_barrier) + " of " +
       std::to_string(machine.n_threads) + " threads, the others have ended without it");
}

inline unsigned first_bits(int n) { return n == 32 ? ~0u : (1u << n) - 1; }

inline void open_barrier() {
  machine.n_at_barrier = 0;
  for (int w = 0; w < machine.n_warps; ++w) {
    machine.warps[w].ready = machine.warps[w].at_barrier;
    machine.warps[w].at_barrier = 0;
  }
  machine.running_warps = first_bits(machine.n_warps);
}

// The thread that goes on next; the running one is in a set by now, or has ended. -1: all have ended.
inline int choose_thread() {
  int w = machine.thread / kWarp;  // the warp goes on for as long as it can
  if (!(machine.running_warps >> w & 1)) {
    if (machine.running_warps == 0) {
      if (machine.n_ended == machine.n_threads) return -1;
      if (machine.n_at_barrier != machine.n_threads) explain_deadlock();
      open_barrier();
    }
    w = first_of(machine.running_warps);
  }
  const Warp& warp = machine.warps[w];
  return w * kWarp + first_of(warp.ready | warp.unstarted);
}

// Makes it the running one; true if it has not run before.
inline bool enter(int thread) {
  machine.thread = thread;
  threadIdx = machine.indices[thread];
  Warp& warp = machine.warps[thread / kWarp];
  const unsigned bit = 1u << thread % kWarp;
  const bool is_new = warp.unstarted & bit;
  warp.unstarted &= ~bit;
  warp.ready &= ~bit;
  if (!(warp.unstarted | warp.ready)) machine.running_warps &= ~(1u << thread / kWarp);
  return is_new;
}

inline void go_to_new_fiber(Context* save) {
  machine.new_stack = machine.free_stacks.back();
  machine.free_stacks.pop_back();
  char* const stack = machine.stacks + machine.new_stack * kStackBytes;
  std::memset(stack, kPoison, kStackEnd);
  make_context(&machine.dropped, stack);
  switch_context(save, &machine.dropped);
}

// The running thread is in a set of its warp and waits there until it is ready.
inline void wait() {
  const int waiting = machine.thread;
  const int next = choose_thread();
  if (enter(next))
    go_to_new_fiber(&machine.contexts[waiting]);
  else if (next != waiting)
    switch_context(&machine.contexts[waiting], &machine.contexts[next]);
}

// Runs threads one after the other for as long as they need no other stack.
inline void fiber_main() {
  const int stack = machine.new_stack;
  for (;;) {
    machine.body(machine.arguments);
    ++machine.n_ended;
    const int next = choose_thread();
    if (next >= 0 && enter(next)) continue;
    if (!is_poison(machine.stacks + stack * kStackBytes, kStackEnd)) fail(kStackFull);
    machine.free_stacks.push_back(stack);  // nobody takes it before this fiber is left
    switch_context(&machine.dropped, next < 0 ? &machine.main : &machine.contexts[next]);
  }
}

// Waits for all lanes of the mask; the last one that comes runs `complete` on the operands of all, then all go on.
inline void collective(unsigned mask, Complete complete, void* operand) {
  const int lane = machine.thread % kWarp;
  Warp& warp = machine.warps[machine.thread / kWarp];
  const unsigned bit = 1u << lane;
  if (!(mask & bit)) fail("lane " + std::to_string(lane) + " is not in the mask that it gives");
  if (const unsigned others = warp.in_collective & mask) {
    const int other = __builtin_ctz(others);
    if (warp.masks[other] != mask || warp.completes[other] != complete)
      fail("lanes " + std::to_string(other) + " and " + std::to_string(lane) + " of warp " +
           std::to_string(machine.thread / kWarp) + " meet with different masks, or in different operations");
  }
  warp.in_collective |= bit;
  warp.masks[lane] = mask;
  warp.completes[lane] = complete;
  warp.operands[lane] = operand;
  if ((warp.in_collective & mask) == mask) {
    complete(warp.operands, mask);
    warp.in_collective &= ~mask;
    warp.ready |= mask;
    machine.running_warps |= 1u << machine.thread / kWarp;
  }
  wait();
}

// Sets machine.failed if something goes wrong.
inline void run_block() {
  machine.n_at_barrier = machine.n_ended = 0;
  for (int w = 0; w < machine.n_warps; ++w) {
    Warp& warp = machine.warps[w];
    warp.unstarted = first_bits(std::min(kWarp, machine.n_threads - w * kWarp));
    warp.ready = warp.at_barrier = warp.in_collective = 0;
  }
  machine.running_warps = first_bits(machine.n_warps);
  machine.thread = descending() ? machine.n_threads - 1 : 0;
  for (int i = 0; i < machine.n_threads; ++i) {
    machine.copies[i].clear();
    machine.copy_groups[i] = 0;
  }
  std::memset(machine.shared - kBand, kPoison, machine.shared_end - machine.shared + kBand);

  enter(choose_thread());
  go_to_new_fiber(&machine.main);

  char* const shared_stop = machine.shared + machine.shared_bytes;
  if (!machine.failed &&
      !(is_poison(machine.shared - kBand, kBand) && is_poison(shared_stop, machine.shared_end - shared_stop))) {
    describe("writes outside of the " + std::to_string(machine.shared_bytes) + " bytes of shared memory it asked for");
    machine.failed = true;
  }
}

// The handler of signals that a wrong address sends.
inline void handle_fault(int signal_number, siginfo_t* info, void*) {
  if (!pthread_equal(pthread_self(), machine.caller)) {  // not ours: end as if there were no handler
    signal(signal_number, SIG_DFL);
    return;
  }
  const char* address = static_cast<char*>(info->si_addr);
  char text[160];
  if (address >= machine.shared_end && address < machine.shared_end + kFence)
    std::snprintf(text, sizeof text, "reads or writes byte %td of %zu bytes of shared memory", address - machine.shared,
                  machine.shared_bytes);
  else
    std::snprintf(text, sizeof text, "reads or writes an address out of bounds or not aligned, %p", info->si_addr);
  if (address >= machine.stacks - kFence && address < machine.stacks)
    describe(kStackFull);
  else
    describe("thread (" + std::to_string(threadIdx.x) + ", " + std::to_string(threadIdx.y) + ", " +
             std::to_string(threadIdx.z) + ") " + text);
  siglongjmp(machine.fault, 1);
}

// While it lives, wrong addresses end the launch, not the process.
class FaultHandler {
 public:
  FaultHandler() {
    static char stack[64 << 10];  // the handler cannot run on a fiber's stack that may be full
    const stack_t alternative = {stack, 0, sizeof stack};
    struct sigaction action = {};
    action.sa_sigaction = handle_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    machine.caller = pthread_self();
    sigaltstack(&alternative, &stack_before_);
    sigaction(SIGSEGV, &action, &segv_before_);
    sigaction(SIGBUS, &action, &bus_before_);
  }
  ~FaultHandler() {
    sigaction(SIGSEGV, &segv_before_, nullptr);
    sigaction(SIGBUS, &bus_before_, nullptr);
    sigaltstack(&stack_before_, nullptr);
  }

 private:
  stack_t stack_before_;
  struct sigaction segv_before_, bus_before_;
};

inline void run_blocks(const std::vector<uint64_t>& blocks) {
  if (sigsetjmp(machine.fault, 1) != 0) {
    machine.failed = true;
    return;
  }
  for (const uint64_t number : blocks) {
    blockIdx = {static_cast<unsigned>(number % gridDim.x), static_cast<unsigned>(number / gridDim.x % gridDim.y),
                static_cast<unsigned>(number / gridDim.x / gridDim.y)};
    run_block();
    if (machine.failed) return;
  }
}

inline void free_all_stacks() {
  machine.free_stacks.clear();
  for (int i = kMaxThreads; i-- > 0;) machine.free_stacks.push_back(i);
}

// Stacks and shared memory, once; false if there is none.
inline bool map_memory() {
  if (machine.stacks) return true;
  constexpr size_t kPages = (kMaxShared + kBand + 0xffff) / 0x10000 * 0x10000;  // whole pages, be they 64 KB
  constexpr size_t kBytes = kPages + 2 * kFence + kMaxThreads * kStackBytes;
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* const mapped = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, kFlags, -1, 0);
  if (mapped == MAP_FAILED) return false;
  machine.shared_end = static_cast<char*>(mapped) + kPages;
  mprotect(machine.shared_end, 2 * kFence, PROT_NONE);
  machine.stacks = machine.shared_end + 2 * kFence;
  free_all_stacks();
  return true;
}

inline std::string first_argument(const char* text) {
  int depth = 0;
  const char* end = text;
  for (; *end && (depth || *end != ','); ++end) depth += (*end == '(' || *end == '<') - (*end == ')' || *end == '>');
  return std::string(text, end);
}

// Why a GPU would not start it; empty if it would.
inline std::string refuses(dim3 grid, dim3 block, size_t shared_bytes) {
  const auto size = [](dim3 d) {
    return std::to_string(d.x) + " x " + std::to_string(d.y) + " x " + std::to_string(d.z);
  };
  const uint64_t n_threads = uint64_t{block.x} * block.y * block.z;
  if (n_threads < 1 || n_threads > kMaxThreads || block.z > 64)
    return "a block of " + size(block) + " threads; 1 to 1024 are possible";
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    return "a grid of " + size(grid) + " blocks; at least one, at most 2147483647 x 65535 x 65535 are possible";
  if (shared_bytes > kMaxShared)
    return std::to_string(shared_bytes) + " bytes of shared memory; 101376 are possible";
  return "";
}

// text: the arguments of launch() as the source has them.
inline int run_grid(const char* text, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*),
                    void* arguments) {
  const std::lock_guard<std::mutex> guard(machine.lock);
  const std::string name = first_argument(text);
  if (const std::string reason = refuses(grid, block, shared_bytes); !reason.empty()) {
    machine.error = "emulation: kernel " + name + ": " + reason;
    return kBadLaunch;
  }
  if (!map_memory()) {
    machine.error = "emulation: there is no memory for stacks";
    return kNoMemory;
  }
  machine.name = name.c_str();
  machine.body = body;
  machine.arguments = arguments;
  machine.n_threads = static_cast<int>(block.x * block.y * block.z);
  machine.n_warps = (machine.n_threads + kWarp - 1) / kWarp;
  machine.shared_bytes = shared_bytes;
  machine.shared = machine.shared_end - (shared_bytes + 15) / 16 * 16;
  machine.failed = false;
  gridDim = grid;
  blockDim = block;
  for (unsigned i = 0; i < block.x * block.y * block.z; ++i)
    machine.indices[i] = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};

  std::vector<uint64_t> blocks(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  if (machine.order) std::shuffle(blocks.begin(), blocks.end(), std::mt19937_64(machine.order));
  const FaultHandler handler;
  run_blocks(blocks);
  if (!machine.failed) return 0;
  free_all_stacks();
  return kFailed;
}

template <typename T>
struct Same {
  using type = T;
};

}  // namespace rwkv_emulation

// 0: blocks, warps and lanes in ascending order. Otherwise blocks in a random order made from the number, and warps and
// lanes in descending order where it is odd.
extern "C" __attribute__((visibility("default"), used)) inline void rwkv_emulation_order(uint64_t order) {
  const std::lock_guard<std::mutex> guard(rwkv_emulation::machine.lock);
  rwkv_emulation::machine.order = order;
}

// ---------------------------------------------------------------------------------------------------------------------
// Barriers, shuffles and other built-in functions of CUDA

inline void __syncthreads() {
  using namespace rwkv_emulation;
  Warp& warp = machine.warps[machine.thread / kWarp];
  warp.at_barrier |= 1u << machine.thread % kWarp;
  ++machine.n_at_barrier;
  wait();
}

inline void __syncwarp(unsigned mask = ~0u) {
  rwkv_emulation::collective(mask, [](void* const*, unsigned) {}, nullptr);
}

namespace RWKV_HIDDEN rwkv_emulation {

struct Shuffle {
  uint64_t value, result;
  int source;
};

inline void complete_shuffle(void* const* lanes, unsigned mask) {
  for (unsigned left = mask; left; left &= left - 1) {
    Shuffle& to = *static_cast<Shuffle*>(lanes[__builtin_ctz(left)]);
    if (!(mask >> to.source & 1))
      fail("lane " + std::to_string(__builtin_ctz(left)) + " shuffles from lane " + std::to_string(to.source) +
           ", which is not in the mask");
    to.result = static_cast<Shuffle*>(lanes[to.source])->value;
  }
}

template <typename T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles take 4 or 8 bytes");
  Shuffle operand{0, 0, source};
  std::memcpy(&operand.value, &value, sizeof(T));
  collective(mask, complete_shuffle, &operand);
  std::memcpy(&value, &operand.result, sizeof(T));
  return value;
}

inline int lane() { return machine.thread % kWarp; }

template <typename To, typename From>
To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

}  // namespace rwkv_emulation

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
  const int lane = rwkv_emulation::lane();
  return rwkv_emulation::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int flipped, int width = warpSize) {
  const int lane = rwkv_emulation::lane(), source = lane ^ flipped;
  return rwkv_emulation::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const int lane = rwkv_emulation::lane(), source = lane - static_cast<int>(delta);
  return rwkv_emulation::shuffle(mask, value, source < (lane & ~(width - 1)) ? lane : source);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const int lane = rwkv_emulation::lane(), source = lane + static_cast<int>(delta);
  return rwkv_emulation::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source);
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline int __float_as_int(float x) { return rwkv_emulation::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return rwkv_emulation::bits_as<unsigned>(x); }
inline float __int_as_float(int x) { return rwkv_emulation::bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return rwkv_emulation::bits_as<float>(x); }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
template <typename T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

// ---------------------------------------------------------------------------------------------------------------------
// What common/gpu.cuh offers

namespace rwkv {

template <typename... Parameters>
int launch_named(const char* text, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void*,
                 typename rwkv_emulation::Same<Parameters>::type... args) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> args;
  } call{kernel, {args...}};
  const auto body = [](void* data) {
    const Call& call = *static_cast<const Call*>(data);
    std::apply(call.kernel, call.args);
  };
  return rwkv_emulation::run_grid(text, grid, block, shared_bytes, body, &call);
}

// A macro, so that messages can name the kernel as the source does.
#define launch(...) launch_named(#__VA_ARGS__, __VA_ARGS__)

inline const char* error_text(int code) { return code == 0 ? "no error" : rwkv_emulation::machine.error.c_str(); }

inline float* shared_memory() { return reinterpret_cast<float*>(rwkv_emulation::machine.shared); }

inline void meet() { __syncthreads(); }

inline float bfloat16_to_float(uint16_t bits) { return __uint_as_float(static_cast<unsigned>(bits) << 16); }

inline uint16_t float_to_bfloat16(float x) {
  if (std::isnan(x)) return 0x7fff;
  const unsigned bits = __float_as_uint(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float rough_exp(float x) {
  const float y = expf(x);
  return y < 0x1p-126f ? 0.f : y;
}
inline float rough_inverse(float x) { return 1.f / (std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x); }

// A float16 has 5 bits of exponent (bias 15) and 10 of mantissa.
inline float float16_to_float(uint16_t bits) {
  const unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) return std::copysign(static_cast<float>(mantissa) * 0x1p-24f, __uint_as_float(sign));
  return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline uint16_t float_to_float16(float x) {
  const unsigned sign = __float_as_uint(x) >> 16 & 0x8000;
  if (std::isnan(x)) return 0x7fff;
  const float size = std::fabs(x);
  if (size >= 65520.f) return static_cast<uint16_t>(sign | 0x7c00);  // halfway from the largest to the next
  // Below 2^-14 numbers lie 2^-24 apart; adding 0.5 leaves exactly those bits in a float's mantissa, rounded to even.
  if (size < 0x1p-14f) return static_cast<uint16_t>(sign | (__float_as_uint(size + 0.5f) - 0x3f000000));
  const unsigned bits = __float_as_uint(size) - (112u << 23);
  return static_cast<uint16_t>(sign | (bits + 0xfff + (bits >> 13 & 1)) >> 13);
}

}  // namespace rwkv
