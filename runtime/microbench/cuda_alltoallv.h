// One rank of the all-to-all benchmark on a GPU: dispatch, combine and the plain push of the same
// bytes, each after a barrier of all GPUs, timed with events.
#ifndef EPSERVE_RUNTIME_MICROBENCH_CUDA_ALLTOALLV_H_
#define EPSERVE_RUNTIME_MICROBENCH_CUDA_ALLTOALLV_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "runtime/alltoallv/cuda_exchange.h"

namespace epserve::runtime {

struct CudaAlltoallvConfig {
  CudaExchangeConfig exchange;
  CudaExchange::Path path = CudaExchange::Path::kPrefill;
  std::int64_t tokens = 4096;  // a rank
  int topk = 8;
  std::int64_t experts = 256;
  DataType dtype = DataType::kBf16;
  RowPayload payload = RowPayload::kCopy;
  int iterations = 50;
  int warmup = 10;
  unsigned seed = 1;
};

struct CudaAlltoallvTimes {
  std::vector<double> dispatch_us;  // [iterations]
  std::vector<double> combine_us;
  std::vector<double> pair_us;             // decode: dispatch and combine in one replay
  std::vector<double> dispatch_copy_us;    // the plain push of dispatch's remote bytes
  std::vector<double> combine_copy_us;     // and of combine's
  std::int64_t dispatch_remote_bytes = 0;  // this rank sends
  std::int64_t combine_remote_bytes = 0;
  double relative_error = 0;  // L2, of the last batch against a CPU reference
};

// `meet` blocks until every rank's process has called it. The heap's peers are opened inside.
absl::StatusOr<CudaAlltoallvTimes> RunCudaAlltoallvRank(const CudaAlltoallvConfig& config,
                                                        const std::function<absl::Status()>& meet);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_MICROBENCH_CUDA_ALLTOALLV_H_
