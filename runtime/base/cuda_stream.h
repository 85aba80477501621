// Owners of streams and events. Made by Create, dropped with their owner; neither copied nor moved.
#ifndef EPSERVE_RUNTIME_BASE_CUDA_STREAM_H_
#define EPSERVE_RUNTIME_BASE_CUDA_STREAM_H_

#include <cuda_runtime_api.h>

#include "absl/status/status.h"
#include "runtime/base/cuda_status.h"

namespace epserve::runtime {

// Ordered with no other stream, the default one included.
class Stream {
 public:
  Stream() = default;
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() {
    if (stream_ != nullptr) (void)cudaStreamDestroy(stream_);
  }
  absl::Status Create() {
    EPS_CUDA_RETURN_IF_ERROR(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    return absl::OkStatus();
  }
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

class Event {
 public:
  Event() = default;
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() {
    if (event_ != nullptr) (void)cudaEventDestroy(event_);
  }
  absl::Status Create() {
    EPS_CUDA_RETURN_IF_ERROR(cudaEventCreate(&event_));
    return absl::OkStatus();
  }
  absl::Status Record(cudaStream_t stream) {
    EPS_CUDA_RETURN_IF_ERROR(cudaEventRecord(event_, stream));
    return absl::OkStatus();
  }
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_BASE_CUDA_STREAM_H_
