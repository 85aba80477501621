// What the feed-forward is measured against: cuBLAS's products of the same sizes.
#ifndef EPSERVE_RUNTIME_MICROBENCH_FFN_BASELINES_H_
#define EPSERVE_RUNTIME_MICROBENCH_FFN_BASELINES_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace epserve::runtime {

// out [rows, n] = a [rows, k] * w [n, k]^T, all bf16 in device memory, row-major, fp32
// accumulation.
struct BenchProduct {
  const void* a;
  const void* w;  // of all experts in a row, where grouped
  void* out;
  std::int64_t n;
  std::int64_t k;
};

class CublasBaselines {
 public:
  static absl::StatusOr<std::unique_ptr<CublasBaselines>> Create(cudaStream_t stream);
  virtual ~CublasBaselines() = default;

  virtual absl::Status EnqueueDense(const BenchProduct& product, std::int64_t rows) = 0;
  // Expert e takes the rows [offsets[e], offsets[e + 1]): known to the host, unlike in the
  // feed-forward. Uploads the groups' pointers first: PrepareGrouped, once a product.
  virtual absl::Status PrepareGrouped(const BenchProduct& product,
                                      const std::vector<std::int32_t>& offsets) = 0;
  // The product prepared `index`-th.
  virtual absl::Status EnqueueGrouped(int index) = 0;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_MICROBENCH_FFN_BASELINES_H_
