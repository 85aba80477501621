// Owners of pairs of timing events and of graphs. Made by Create or Capture, dropped
// with their owner; neither copied nor moved.
#ifndef EPSERVE_RUNTIME_MICROBENCH_CUDA_HANDLES_H_
#define EPSERVE_RUNTIME_MICROBENCH_CUDA_HANDLES_H_

#include <cuda_runtime_api.h>

#include <functional>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/base/cuda_status.h"
#include "runtime/base/cuda_stream.h"

namespace epserve::runtime {

// Two events around a piece of work; recorded the same way in a stream and in a graph's capture.
class EventPair {
 public:
  EventPair() = default;
  EventPair(const EventPair&) = delete;
  EventPair& operator=(const EventPair&) = delete;
  ~EventPair() {
    if (begin_ != nullptr) (void)cudaEventDestroy(begin_);
    if (end_ != nullptr) (void)cudaEventDestroy(end_);
  }
  absl::Status Create() {
    EPS_CUDA_RETURN_IF_ERROR(cudaEventCreate(&begin_));
    EPS_CUDA_RETURN_IF_ERROR(cudaEventCreate(&end_));
    return absl::OkStatus();
  }
  absl::Status RecordBegin(cudaStream_t stream) { return Record(begin_, stream); }
  absl::Status RecordEnd(cudaStream_t stream) { return Record(end_, stream); }
  // REQUIRES: both recorded, and the stream synchronised since.
  absl::StatusOr<double> ElapsedUs() const {
    float ms = 0;
    EPS_CUDA_RETURN_IF_ERROR(cudaEventElapsedTime(&ms, begin_, end_));
    return static_cast<double>(ms) * 1e3;
  }

 private:
  static absl::Status Record(cudaEvent_t event, cudaStream_t stream) {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    EPS_CUDA_RETURN_IF_ERROR(cudaStreamIsCapturing(stream, &capture));
    const unsigned flags =
        capture == cudaStreamCaptureStatusNone ? cudaEventRecordDefault : cudaEventRecordExternal;
    EPS_CUDA_RETURN_IF_ERROR(cudaEventRecordWithFlags(event, stream, flags));
    return absl::OkStatus();
  }

  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
};

class Graph {
 public:
  Graph() = default;
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() {
    if (executable_ != nullptr) (void)cudaGraphExecDestroy(executable_);
  }
  // Captures what `enqueue` puts on the stream.
  absl::Status Capture(cudaStream_t stream, const std::function<absl::Status()>& enqueue) {
    EPS_CUDA_RETURN_IF_ERROR(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    const absl::Status enqueued = enqueue();
    cudaGraph_t graph = nullptr;
    EPS_CUDA_RETURN_IF_ERROR(cudaStreamEndCapture(stream, &graph));
    const cudaError_t made =
        enqueued.ok() ? cudaGraphInstantiate(&executable_, graph, 0) : cudaSuccess;
    (void)cudaGraphDestroy(graph);
    EPS_RETURN_IF_ERROR(enqueued);
    EPS_CUDA_RETURN_IF_ERROR(made);
    return absl::OkStatus();
  }
  absl::Status Launch(cudaStream_t stream) const {
    EPS_CUDA_RETURN_IF_ERROR(cudaGraphLaunch(executable_, stream));
    return absl::OkStatus();
  }

 private:
  cudaGraphExec_t executable_ = nullptr;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_MICROBENCH_CUDA_HANDLES_H_
