// Logits -> log-probs and back on a GPU. Both launches return the cudaError, 0 for none; nothing is allocated and
// nothing waits. `device` must be the one that `stream` (a cudaStream_t) belongs to.
#pragma once

#include "structs.h"

namespace fastdpo {

int launch_logits_forward(const LogitsForwardArgs&, int device, void* stream);
int launch_logits_backward(const LogitsBackwardArgs&, int device, void* stream);

const char* cuda_error_text(int error);
int cuda_runtime_version();  // 13000 is 13.0: of the runtime linked in,
int cuda_driver_version();   // and the newest that this machine's driver serves; 0 without a driver

}  // namespace fastdpo
