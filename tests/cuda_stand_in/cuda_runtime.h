// What csrc/cuda/*.cu uses of CUDA, on one CPU thread: compiled by g++, a kernel runs block after block, and a block's
// threads are fibers that switch at barriers and shuffles. What is not here does not compile.
//
// Found as an error: a barrier or a shuffle that a thread has left out or exited before (a deadlock), a lane outside of
// its shuffle's mask, a launch that no device takes. Found as a wrong number: a missing barrier. Shared memory holds NaN
// before every block, blocks and warps run in an order of their own for every seed, and a warp that is chosen runs as
// far as it can. Not found: a missing fence, a race between blocks, and what exp2's approximation on a GPU costs.
#pragma once

#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static thread_local  // nothing else is: the library's thread-local memory is the block's shared one
#define CUDART_VERSION 13000

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = struct CUstream_st*;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace stand_in {

constexpr unsigned kWarpSize = 32, kMostThreads = 1024;
constexpr size_t kStackBytes = 256 << 10;

enum class State { kNew, kReady, kAtBarrier, kInShuffle, kDone };

// A stack that threads run on. A thread that never waits leaves it to the next one without a switch.
struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  ucontext_t start;
  jmp_buf place;
  bool started = false;
};

struct Thread {
  State state = State::kNew;
  Fiber* fiber = nullptr;
  unsigned mask = 0, source = 0;  // of a shuffle: who takes part, and the lane that is asked
  uint64_t given = 0, received = 0;
};

struct Machine {
  std::mt19937 random;
  dim3 grid, size, block;  // of the launch, and the index of the block that runs
  std::pair<void*, size_t> shared;
  unsigned current = 0;    // thread
  std::function<void()> kernel;
  std::vector<Thread> threads;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> idle;
  std::vector<unsigned> order;  // in which threads of a warp get their turn, and who is next
  size_t next = 0;
  std::string fault;
  cudaError_t last_error = cudaSuccess;
  jmp_buf scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;

  void run_block();
  void run_warp(unsigned first);
  bool finish_shuffles(unsigned first);
  void resume(Fiber* fiber);
  void run_threads();
  void wait(State state);
  [[noreturn]] void leave();
  [[noreturn]] void fail(const std::string& what) { fault = what, leave(); }
  std::string names(State state) const;
};

inline Machine machine;  // one launch at a time

[[gnu::used]] inline void seed(unsigned value) { machine.random.seed(value); }

// AddressSanitizer is told whose stack is in use.
inline void switching(void** left, const void* stack, size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(left, stack, bytes);
#else
  (void)left, (void)stack, (void)bytes;
#endif
}
inline void switched(void* left, const void** stack, size_t* bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(left, stack, bytes);
#else
  (void)left, (void)stack, (void)bytes;
#endif
}

inline void fiber_main() {
  switched(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_bytes);
  machine.run_threads();
}

// On a fiber: the thread that is current, and those after it that have not begun.
inline void Machine::run_threads() {
  for (;;) {
    Fiber* const mine = threads[current].fiber;
    kernel();
    threads[current].state = State::kDone;
    if (next < order.size() && threads[order[next]].state == State::kNew) {
      current = order[next++];
      threads[current].fiber = mine;
      continue;
    }
    idle.push_back(mine);
    void* left = nullptr;
    if (_setjmp(mine->place) == 0) {
      switching(&left, scheduler_stack, scheduler_stack_bytes);
      _longjmp(scheduler, 1);
    }
    switched(left, &scheduler_stack, &scheduler_stack_bytes);
  }
}

inline void Machine::wait(State state) {
  Thread& thread = threads[current];
  const unsigned me = current;
  thread.state = state;
  void* left = nullptr;
  if (_setjmp(thread.fiber->place) == 0) {
    switching(&left, scheduler_stack, scheduler_stack_bytes);
    _longjmp(scheduler, 1);
  }
  switched(left, &scheduler_stack, &scheduler_stack_bytes);
  current = me;
}

inline void Machine::leave() {  // for good
  switching(nullptr, scheduler_stack, scheduler_stack_bytes);
  _longjmp(scheduler, 1);
}

inline void Machine::resume(Fiber* fiber) {
  void* left = nullptr;
  if (_setjmp(scheduler) == 0) {
    switching(&left, fiber->stack.get(), kStackBytes);
    if (fiber->started) _longjmp(fiber->place, 1);
    fiber->started = true;
    getcontext(&fiber->start);
    fiber->start.uc_stack.ss_sp = fiber->stack.get();
    fiber->start.uc_stack.ss_size = kStackBytes;
    fiber->start.uc_link = nullptr;
    makecontext(&fiber->start, fiber_main, 0);
    setcontext(&fiber->start);
  }
  switched(left, nullptr, nullptr);
  if (!fault.empty()) throw std::runtime_error("block " + std::to_string(block.x) + ", " + fault);
}

// The threads of a state, as "0-31 64".
inline std::string Machine::names(State state) const {
  std::string found;
  for (unsigned t = 0; t < threads.size(); ++t) {
    if (threads[t].state != state) continue;
    const unsigned first = t;
    while (t + 1 < threads.size() && threads[t + 1].state == state) ++t;
    found += " " + std::to_string(first) + (t > first ? "-" + std::to_string(t) : "");
  }
  return found.empty() ? " none" : found;
}

// Those whose every participant waits for the same; whether there was one.
inline bool Machine::finish_shuffles(unsigned first) {
  bool found = false;
  const unsigned last = std::min<unsigned>(first + kWarpSize, threads.size());
  for (unsigned t = first; t < last; ++t) {
    const unsigned mask = threads[t].mask;
    if (threads[t].state != State::kInShuffle) continue;
    bool all = true;
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      if (!(mask >> lane & 1)) continue;
      all = all && first + lane < last && threads[first + lane].state == State::kInShuffle && threads[first + lane].mask == mask;
    }
    if (!all) continue;
    found = true;
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      if (!(mask >> lane & 1)) continue;
      Thread& thread = threads[first + lane];
      thread.received = threads[first + thread.source].given;
      thread.state = State::kReady;
    }
  }
  return found;
}

// Until each of its threads waits for another warp, or is done.
inline void Machine::run_warp(unsigned first) {
  do {
    order.clear();
    for (unsigned t = first; t < std::min<unsigned>(first + kWarpSize, threads.size()); ++t) {
      if (threads[t].state == State::kNew || threads[t].state == State::kReady) order.push_back(t);
    }
    std::shuffle(order.begin(), order.end(), random);
    for (next = 0; next < order.size();) {
      current = order[next++];
      Thread& thread = threads[current];
      if (thread.state == State::kNew) {
        if (idle.empty()) {
          fibers.push_back(std::make_unique<Fiber>());
          idle.push_back(fibers.back().get());
        }
        thread.fiber = idle.back();
        idle.pop_back();
      }
      resume(thread.fiber);
    }
  } while (finish_shuffles(first));
}

// The memory that is thread-local in this library: a block's shared memory.
inline std::pair<void*, size_t> find_shared() {
  static thread_local char inside;
  *const_cast<volatile char*>(&inside) = 0;  // it is allocated when it is first used
  std::pair<void*, size_t> found;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* result) {
        const auto is_here = [&](const ElfW(Phdr) & part) {
          const uintptr_t begin = info->dlpi_addr + part.p_vaddr, here = reinterpret_cast<uintptr_t>(&fiber_main);
          return part.p_type == PT_LOAD && here >= begin && here < begin + part.p_memsz;
        };
        const ElfW(Phdr)*parts = info->dlpi_phdr, *end = parts + info->dlpi_phnum;
        if (!std::any_of(parts, end, is_here)) return 0;
        const auto part = std::find_if(parts, end, [](const ElfW(Phdr) & part) { return part.p_type == PT_TLS; });
        *static_cast<std::pair<void*, size_t>*>(result) = {info->dlpi_tls_data, part->p_memsz};
        return 1;
      },
      &found);
  return found;
}

inline void Machine::run_block() {
  std::memset(shared.first, 0xff, shared.second);  // NaN
  threads.assign(size.x, Thread());
  std::vector<unsigned> warps;
  for (;;) {
    warps.clear();
    for (unsigned t = 0; t < size.x; ++t) {
      const bool runs = threads[t].state == State::kNew || threads[t].state == State::kReady;
      if (runs && (warps.empty() || warps.back() != t / kWarpSize)) warps.push_back(t / kWarpSize);
    }
    if (!warps.empty()) {
      run_warp(warps[random() % warps.size()] * kWarpSize);
      continue;
    }
    const auto all = [&](State state) {
      return std::all_of(threads.begin(), threads.end(), [&](const Thread& thread) { return thread.state == state; });
    };
    if (all(State::kDone)) return;
    if (!all(State::kAtBarrier)) {
      throw std::runtime_error("block " + std::to_string(block.x) + ", a deadlock: at a barrier, threads" +
                               names(State::kAtBarrier) + "; in a shuffle," + names(State::kInShuffle) + "; exited," +
                               names(State::kDone));
    }
    for (Thread& thread : threads) thread.state = State::kReady;
  }
}

inline bool is_valid(dim3 grid, dim3 size) {
  const auto within = [](dim3 d, unsigned x, unsigned y, unsigned z) {
    return d.x - 1 < x && d.y - 1 < y && d.z - 1 < z;  // 0 wraps around
  };
  return within(grid, 0x7fffffff, 65535, 65535) && within(size, kMostThreads, 1, 1);  // a block has one dimension here
}

// `kernel<<<configuration>>>(arguments)` is written as launch(configuration)(kernel, arguments).
struct launch {
  dim3 grid, size;
  launch(dim3 grid, dim3 size, size_t, cudaStream_t) : grid(grid), size(size) {}

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), const Arguments&... arguments) {
    machine.last_error = is_valid(grid, size) ? cudaSuccess : cudaErrorInvalidConfiguration;
    if (machine.last_error != cudaSuccess) return;
    machine.grid = grid, machine.size = size, machine.shared = find_shared();
    machine.kernel = [=] { kernel(arguments...); };
    machine.fault.clear();
    std::vector<uint64_t> blocks(uint64_t{grid.x} * grid.y);
    for (uint64_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
    std::shuffle(blocks.begin(), blocks.end(), machine.random);
    try {
      for (const uint64_t i : blocks) {
        machine.block = dim3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x), 0);
        machine.run_block();
      }
    } catch (...) {  // the stacks of threads that wait are given up
      machine.idle.clear();
      machine.fibers.clear();
      throw;
    }
  }
};

// A thread's index, read anew after every switch.
struct ThreadIndex {
  struct X {
    operator unsigned() const { return machine.current; }
  } x;
};

}  // namespace stand_in

#define threadIdx stand_in::ThreadIndex()
#define blockIdx stand_in::machine.block
#define blockDim stand_in::machine.size
#define gridDim stand_in::machine.grid

inline void __syncthreads() { stand_in::machine.wait(stand_in::State::kAtBarrier); }
inline void __threadfence() {}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "what a GPU shuffles");
  auto& m = stand_in::machine;
  const unsigned lane = m.current % stand_in::kWarpSize, source = lane ^ static_cast<unsigned>(distance);
  if (source >= stand_in::kWarpSize || !(mask >> lane & 1) || !(mask >> source & 1)) {
    m.fail("thread " + std::to_string(m.current) + ": a shuffle from lane " + std::to_string(source) + ", mask " +
           std::to_string(mask));
  }
  auto& mine = m.threads[m.current];
  mine.mask = mask, mine.source = source;
  std::memcpy(&mine.given, &value, sizeof value);
  m.wait(stand_in::State::kInShuffle);
  std::memcpy(&value, &m.threads[m.current].received, sizeof value);
  return value;
}

inline int atomicAdd(int* address, int value) {
  const int before = *address;
  *address += value;
  return before;
}

inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
inline cudaError_t cudaGetLastError() { return std::exchange(stand_in::machine.last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid launch"; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  return std::memset(address, value, bytes), cudaSuccess;
}
