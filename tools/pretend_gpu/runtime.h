// What the files of libcudart.so.13 share.
#pragma once

#include <cuda_runtime_api.h>

#include "state.h"

namespace pretend {

inline cudaError_t done(int error) {
  if (error) state().last_error = error;
  return static_cast<cudaError_t>(error);
}

}  // namespace pretend
