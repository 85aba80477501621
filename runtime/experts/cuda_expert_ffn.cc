#include "runtime/experts/cuda_expert_ffn.h"

#include <cstddef>

#include "absl/strings/str_cat.h"
#include "runtime/base/cuda_status.h"
#include "runtime/experts/cuda_swiglu.h"

namespace epserve::runtime {
namespace {

constexpr std::int64_t kBf16Bytes = 2;
// What cuBLAS documents for Hopper; given to it, so that it allocates nothing later.
constexpr std::size_t kCublasWorkspaceBytes = 32u << 20;

absl::Status CublasStatus(cublasStatus_t status, const char* call) {
  if (status == CUBLAS_STATUS_SUCCESS) return absl::OkStatus();
  const std::string message =
      absl::StrCat("expert ffn: ", call, " failed: ", cublasGetStatusString(status));
  return status == CUBLAS_STATUS_ALLOC_FAILED ? absl::ResourceExhaustedError(message)
                                              : absl::InternalError(message);
}

}  // namespace

// C [m rows, n] = A [m rows, k] times the transpose of each expert's W [n, k]; all row-major bf16.
struct CudaExpertFfn::Product {
  const std::byte* weights;
  const std::byte* in;
  std::byte* out;
  std::int64_t n;
  std::int64_t k;
  std::span<const std::int64_t> rows;
  int index;  // 0: gate and up, 1: down
};

std::uint64_t CudaExpertFfn::WorkspaceBytes(const Config& config) {
  return static_cast<std::uint64_t>(config.max_rows * config.intermediate * 3 * kBf16Bytes +
                                    config.num_local_experts * 6 * 8) +
         kCublasWorkspaceBytes;
}

absl::StatusOr<std::unique_ptr<CudaExpertFfn>> CudaExpertFfn::Create(const Config& config) {
  if (config.hidden < 8 || config.hidden % 8 != 0 || config.intermediate < 8 ||
      config.intermediate % 8 != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("expert ffn: hidden ", config.hidden, " and intermediate ",
                     config.intermediate, " must be positive multiples of 8 on the cuda backend"));
  }
  std::unique_ptr<CudaExpertFfn> ffn(new CudaExpertFfn(config));
  EPS_RETURN_IF_ERROR(CublasStatus(cublasCreate(&ffn->handle_), "cublasCreate"));
  const std::size_t pointer_bytes = static_cast<std::size_t>(config.num_local_experts) * 6 * 8 + 8;
  EPS_ASSIGN_OR_RETURN(ffn->gate_up_, DeviceBuffer::Create(config.max_rows * 2 *
                                                           config.intermediate * kBf16Bytes));
  EPS_ASSIGN_OR_RETURN(ffn->activated_, DeviceBuffer::Create(config.max_rows *
                                                             config.intermediate * kBf16Bytes));
  EPS_ASSIGN_OR_RETURN(ffn->pointers_, DeviceBuffer::Create(pointer_bytes));
  EPS_ASSIGN_OR_RETURN(ffn->host_pointers_, PinnedBuffer::Create(pointer_bytes));
  EPS_ASSIGN_OR_RETURN(ffn->cublas_workspace_, DeviceBuffer::Create(kCublasWorkspaceBytes));
  EPS_RETURN_IF_ERROR(CublasStatus(
      cublasSetWorkspace(ffn->handle_, ffn->cublas_workspace_.as<void>(), kCublasWorkspaceBytes),
      "cublasSetWorkspace"));
  return ffn;
}

CudaExpertFfn::~CudaExpertFfn() {
  if (handle_ != nullptr) (void)cublasDestroy(handle_);
}

absl::Status CudaExpertFfn::Run(const CudaLayerWeights& layer,
                                std::span<const std::int64_t> rows_per_expert, const void* inputs,
                                void* outputs, cudaStream_t stream) {
  std::int64_t rows = 0;
  for (const std::int64_t count : rows_per_expert) rows += count;
  if (static_cast<std::int64_t>(rows_per_expert.size()) != config_.num_local_experts ||
      rows > config_.max_rows) {
    return absl::InvalidArgumentError(absl::StrCat(
        "expert ffn: ", rows, " rows for ", rows_per_expert.size(), " experts; made for at most ",
        config_.max_rows, " rows and ", config_.num_local_experts, " experts"));
  }
  if (rows == 0) return absl::OkStatus();
  EPS_RETURN_IF_ERROR(CublasStatus(cublasSetStream(handle_, stream), "cublasSetStream"));
  // cublasSetStream puts the workspace back to the handle's own.
  EPS_RETURN_IF_ERROR(CublasStatus(
      cublasSetWorkspace(handle_, cublas_workspace_.as<void>(), kCublasWorkspaceBytes),
      "cublasSetWorkspace"));
  EPS_RETURN_IF_ERROR(Multiply({static_cast<const std::byte*>(layer.gate_up),
                                static_cast<const std::byte*>(inputs), gate_up_.as<std::byte>(),
                                2 * config_.intermediate, config_.hidden, rows_per_expert, 0},
                               stream));
  EPS_RETURN_IF_ERROR(LaunchSwiglu(gate_up_.as<void>(), activated_.as<void>(), rows,
                                   config_.intermediate, stream));
  return Multiply({static_cast<const std::byte*>(layer.down), activated_.as<std::byte>(),
                   static_cast<std::byte*>(outputs), config_.hidden, config_.intermediate,
                   rows_per_expert, 1},
                  stream);
}

absl::Status CudaExpertFfn::Multiply(const Product& product, cudaStream_t stream) {
  // cuBLAS is column-major: row-major C = A W^T is its C^T = W A^T, so W comes first, transposed.
  std::vector<cublasOperation_t> transpose_weights, keep_rows;
  std::vector<int> m, n, k, weight_stride, in_stride, out_stride, group_sizes;
  std::vector<float> one, zero;
  const std::int64_t experts = config_.num_local_experts;
  void** const host = host_pointers_.as<void*>() + product.index * 3 * experts;
  std::int64_t row = 0;
  std::int64_t group = 0;
  for (std::int64_t e = 0; e < experts; ++e) {
    const std::int64_t count = product.rows[e];
    if (count == 0) continue;
    host[group] = const_cast<std::byte*>(product.weights + e * product.n * product.k * kBf16Bytes);
    host[experts + group] = const_cast<std::byte*>(product.in + row * product.k * kBf16Bytes);
    host[2 * experts + group] = product.out + row * product.n * kBf16Bytes;
    ++group;
    transpose_weights.push_back(CUBLAS_OP_T);
    keep_rows.push_back(CUBLAS_OP_N);
    m.push_back(static_cast<int>(product.n));
    n.push_back(static_cast<int>(count));
    k.push_back(static_cast<int>(product.k));
    weight_stride.push_back(static_cast<int>(product.k));
    in_stride.push_back(static_cast<int>(product.k));
    out_stride.push_back(static_cast<int>(product.n));
    group_sizes.push_back(1);
    one.push_back(1.0f);
    zero.push_back(0.0f);
    row += count;
  }
  void** const device = pointers_.as<void*>() + product.index * 3 * experts;
  EPS_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(device, host, 3 * experts * sizeof(void*),
                                           cudaMemcpyHostToDevice, stream));
  return CublasStatus(
      cublasGemmGroupedBatchedEx(
          handle_, transpose_weights.data(), keep_rows.data(), m.data(), n.data(), k.data(),
          one.data(), device, CUDA_R_16BF, weight_stride.data(), device + experts, CUDA_R_16BF,
          in_stride.data(), zero.data(), device + 2 * experts, CUDA_R_16BF, out_stride.data(),
          static_cast<int>(group), group_sizes.data(), CUBLAS_COMPUTE_32F),
      "cublasGemmGroupedBatchedEx");
}

}  // namespace epserve::runtime
