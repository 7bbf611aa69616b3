// Parallel loops on the OpenMP pool that torch already runs, so that two pools never fight for the cores.
#pragma once

#include <cstdint>
#include <functional>

namespace fastdpo {

// Calls body(begin, end) over [0, count) in pieces of `grain`. Which thread runs a piece is not fixed, so a body
// must only write what belongs to its own indices; results are then repeatable.
void parallel_for(int64_t count, int64_t grain, int num_threads, const std::function<void(int64_t, int64_t)>& body);

// Of this thread's: more than as many threads have nothing to do.
int64_t pieces_of_last_loop();

// "openmp" when a loaded OpenMP runtime was found, otherwise "threads".
const char* parallel_backend();

}  // namespace fastdpo
