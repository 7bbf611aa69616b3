#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif

namespace fastdpo {
namespace {

// The GNU entry point, which libgomp, libomp and libiomp5 all export.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

#if defined(__linux__)
// torch loads its own copy of an OpenMP runtime under a private name; look for it among the loaded libraries.
int find_openmp(dl_phdr_info* info, size_t, void* found) {
  const char* name = std::strrchr(info->dlpi_name, '/');
  name = name ? name + 1 : info->dlpi_name;
  if (std::strncmp(name, "libgomp", 7) && std::strncmp(name, "libomp", 6) && std::strncmp(name, "libiomp", 7)) return 0;
  void* library = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return 0;
  *static_cast<void**>(found) = dlsym(library, "GOMP_parallel");
  return *static_cast<void**>(found) != nullptr;
}

GompParallel gomp_parallel() {
  static const GompParallel function = [] {
    void* found = nullptr;
    dl_iterate_phdr(find_openmp, &found);
    return reinterpret_cast<GompParallel>(found);
  }();
  return function;
}
#else
GompParallel gomp_parallel() { return nullptr; }
#endif

constexpr int kMostThreads = 256;  // where there are fewer processors: a runtime that cannot start them all gives up

struct Work {
  const std::function<void(int64_t, int64_t)>* body;
  int64_t count, grain;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // the first one's
};

// An error that left a thread of the pool would end the process: it is the caller's, who gets it when all have stopped.
void run_pieces(void* argument) {
  Work& work = *static_cast<Work*>(argument);
  try {
    while (!work.failed) {
      const int64_t begin = work.next.fetch_add(work.grain);
      if (begin >= work.count) return;
      (*work.body)(begin, std::min(begin + work.grain, work.count));
    }
  } catch (...) {
    if (!work.failed.exchange(true)) work.error = std::current_exception();
  }
}

void run_on_threads(Work& work, int threads) {
  std::vector<std::thread> pool;
  pool.reserve(threads);
  try {
    for (int i = 1; i < threads; ++i) pool.emplace_back(run_pieces, &work);
  } catch (const std::system_error&) {  // as many as there are do the work
  }
  run_pieces(&work);
  for (std::thread& thread : pool) thread.join();
}

thread_local int64_t last_pieces = 0;

}  // namespace

void parallel_for(int64_t count, int64_t grain, int num_threads, const std::function<void(int64_t, int64_t)>& body) {
  if (count <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t pieces = last_pieces = (count + grain - 1) / grain;
  static const int most = std::max(kMostThreads, static_cast<int>(std::thread::hardware_concurrency()));
  const int threads = static_cast<int>(std::min<int64_t>(std::clamp(num_threads, 1, most), pieces));
  if (threads == 1) return body(0, count);
  Work work;
  work.body = &body;
  work.count = count;
  work.grain = grain;
  if (const GompParallel parallel = gomp_parallel()) parallel(run_pieces, &work, static_cast<unsigned>(threads), 0);
  else run_on_threads(work, threads);
  if (work.error) std::rethrow_exception(work.error);
}

int64_t pieces_of_last_loop() { return last_pieces; }

const char* parallel_backend() { return gomp_parallel() ? "openmp" : "threads"; }

}  // namespace fastdpo
