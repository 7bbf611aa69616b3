// Logits -> log-probs and back, on either machine: cuda/logits.cu launches kernels on the caller's stream,
// testing/logits_host.cpp walks the same rows on the CPU.
#pragma once

#include "structs.h"

namespace fastdpo {

#ifdef FASTDPO_HAVE_CUDA
// Return the cudaError of the launch, 0 for none. Nothing is allocated and nothing waits. `device` must be the one
// that `stream` (a cudaStream_t) belongs to.
int launch_logits_forward(const LogitsForwardArgs&, int device, void* stream);
int launch_logits_backward(const LogitsBackwardArgs&, int device, void* stream);

const char* cuda_error_text(int error);
int cuda_runtime_version();  // 13000 is 13.0: of the runtime linked in,
int cuda_driver_version();   // and the newest that this machine's driver serves; 0 without a driver
#endif

// Into how many parts a GPU with that many multiprocessors should split each row: the `splits` of both structs.
int64_t logits_splits(int64_t num_rows, int64_t vocab_size, int64_t num_multiprocessors);

// `lanes` stands for the threads of a block. For tests: the formulas of logits_row.h where there is no GPU.
void host_logits_forward(const LogitsForwardArgs&, int64_t lanes);
void host_logits_backward(const LogitsBackwardArgs&, int64_t lanes);

}  // namespace fastdpo
