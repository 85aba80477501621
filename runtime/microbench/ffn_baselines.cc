#include "runtime/microbench/ffn_baselines.h"

#include <cublas_v2.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/base/cuda_memory.h"
#include "runtime/base/cuda_status.h"

namespace epserve::runtime {
namespace {

absl::Status CublasStatus(cublasStatus_t status, const char* call) {
  if (status == CUBLAS_STATUS_SUCCESS) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("cublas: ", call, ": ", cublasGetStatusString(status)));
}

// cuBLAS counts columns first: what is row-major here is transposed there.
class Baselines final : public CublasBaselines {
 public:
  ~Baselines() override {
    if (handle_ != nullptr) (void)cublasDestroy(handle_);
  }

  absl::Status Open(cudaStream_t stream) {
    EPS_RETURN_IF_ERROR(CublasStatus(cublasCreate(&handle_), "create"));
    return CublasStatus(cublasSetStream(handle_, stream), "set stream");
  }

  absl::Status EnqueueDense(const BenchProduct& p, std::int64_t rows) override {
    const float one = 1.0f, zero = 0.0f;
    const int n = static_cast<int>(p.n), k = static_cast<int>(p.k);
    return CublasStatus(
        cublasGemmEx(handle_, CUBLAS_OP_T, CUBLAS_OP_N, n, static_cast<int>(rows), k, &one, p.w,
                     CUDA_R_16BF, k, p.a, CUDA_R_16BF, k, &zero, p.out, CUDA_R_16BF, n,
                     CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
        "dense product");
  }

  absl::Status PrepareGrouped(const BenchProduct& p,
                              const std::vector<std::int32_t>& offsets) override {
    Groups g;
    std::vector<const void*> pointers[3];
    for (std::size_t e = 0; e + 1 < offsets.size(); ++e) {
      const int rows = offsets[e + 1] - offsets[e];
      if (rows == 0) continue;
      g.rows.push_back(rows);
      constexpr std::int64_t kBytes = 2;  // of a bf16
      const std::int64_t to[3] = {static_cast<std::int64_t>(e) * p.n * p.k, offsets[e] * p.k,
                                  offsets[e] * p.n};
      const void* const from[3] = {p.w, p.a, p.out};
      for (int i = 0; i < 3; ++i) {
        pointers[i].push_back(static_cast<const std::byte*>(from[i]) + to[i] * kBytes);
      }
    }
    for (int i = 0; i < 3; ++i) {
      const std::size_t bytes = pointers[i].size() * sizeof(void*);
      EPS_ASSIGN_OR_RETURN(g.pointers[i], DeviceBuffer::Create(bytes));
      EPS_CUDA_RETURN_IF_ERROR(
          cudaMemcpy(g.pointers[i].as<void>(), pointers[i].data(), bytes, cudaMemcpyHostToDevice));
    }
    const std::size_t count = g.rows.size();
    g.n.assign(count, static_cast<int>(p.n));
    g.k.assign(count, static_cast<int>(p.k));
    prepared_.push_back(std::move(g));
    return absl::OkStatus();
  }

  absl::Status EnqueueGrouped(int index) override {
    const Groups& g = prepared_[static_cast<std::size_t>(index)];
    const std::size_t count = g.rows.size();
    const std::vector<cublasOperation_t> transposed(count, CUBLAS_OP_T), plain(count, CUBLAS_OP_N);
    const std::vector<float> one(count, 1.0f), zero(count, 0.0f);
    const std::vector<int> single(count, 1);
    return CublasStatus(cublasGemmGroupedBatchedEx(
                            handle_, transposed.data(), plain.data(), g.n.data(), g.rows.data(),
                            g.k.data(), one.data(), g.pointers[0].as<const void*>(), CUDA_R_16BF,
                            g.k.data(), g.pointers[1].as<const void*>(), CUDA_R_16BF, g.k.data(),
                            zero.data(), g.pointers[2].as<void*>(), CUDA_R_16BF, g.n.data(),
                            static_cast<int>(count), single.data(), CUBLAS_COMPUTE_32F),
                        "grouped product");
  }

 private:
  struct Groups {
    std::vector<int> rows, n, k;
    DeviceBuffer pointers[3];  // of weights, rows and results
  };

  cublasHandle_t handle_ = nullptr;
  std::vector<Groups> prepared_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<CublasBaselines>> CublasBaselines::Create(cudaStream_t stream) {
  auto baselines = std::make_unique<Baselines>();
  EPS_RETURN_IF_ERROR(baselines->Open(stream));
  return baselines;
}

}  // namespace epserve::runtime
