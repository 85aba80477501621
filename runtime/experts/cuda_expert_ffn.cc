#include "runtime/experts/cuda_expert_ffn.h"

#include <cuda.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/base/cuda_memory.h"
#include "runtime/base/cuda_status.h"
#include "runtime/experts/cuda_ffn_kernels.h"

namespace epserve::runtime {
namespace {

constexpr int kHopperCapability = 9;

// What a call keeps on the device between its kernels, by byte offset.
struct Workspace {
  std::uint64_t middle = 0;  // [max_rows, I] bf16, or e4m3: silu(gate) * up
  // fp8 alone:
  std::uint64_t rows = 0;           // [max_rows, H] e4m3
  std::uint64_t row_scales = 0;     // [ceil(H / 128), max_rows] fp32
  std::uint64_t middle_scales = 0;  // [ceil(I / 128), max_rows] fp32
  std::uint64_t bytes = 0;
};

Workspace LayOutWorkspace(const CudaExpertFfnConfig& config) {
  constexpr std::uint64_t kAlignment = 256;
  const auto aligned = [](std::uint64_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  };
  const auto rows = static_cast<std::uint64_t>(config.max_rows);
  const auto hidden = static_cast<std::uint64_t>(config.shape.hidden);
  const auto intermediate = static_cast<std::uint64_t>(config.shape.intermediate);
  const auto scales = [&](std::uint64_t columns) {
    return aligned((columns + kFfnFp8Block - 1) / kFfnFp8Block * rows * sizeof(float));
  };
  Workspace w;
  w.rows = aligned(rows * intermediate * 2);
  w.bytes = w.rows;
  if (config.shape.weights == DataType::kFp8E4m3) {
    w.row_scales = w.rows + aligned(rows * hidden);
    w.middle_scales = w.row_scales + scales(hidden);
    w.bytes = w.middle_scales + scales(intermediate);
  }
  return w;
}

absl::Status CheckConfig(const CudaExpertFfnConfig& config) {
  EPS_RETURN_IF_ERROR(CheckFfnShape(config.shape));
  // A tile may run past the last row, and its end is counted in 32 bits.
  constexpr std::int64_t kMostRows = INT32_MAX - 1024;
  if (config.max_rows < 1 || config.max_rows > kMostRows) {
    return absl::InvalidArgumentError(
        absl::StrCat("expert ffn: max_rows ", config.max_rows, " is not in [1, ", kMostRows, "]"));
  }
  return absl::OkStatus();
}

absl::Status CheckPointers(const std::byte* layer, const void* x, const std::int32_t* offset,
                           const void* y) {
  const auto misaligned = [](const void* p, std::uintptr_t to) {
    return p == nullptr || reinterpret_cast<std::uintptr_t>(p) % to != 0;
  };
  const char* name = misaligned(layer, 256)  ? "layer"
                     : misaligned(x, 16)     ? "x"
                     : misaligned(offset, 4) ? "expert_offset"
                     : misaligned(y, 16)     ? "y"
                                             : nullptr;
  if (name == nullptr) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("expert ffn: ", name, " is null or misaligned"));
}

// One product's argument set: x or what is between the products, times gate_up or down.
FfnProductArgs ProductArgs(const CudaExpertFfnConfig& config, const CudaFfnLayout& layout,
                           bool down, const std::byte* layer, const std::int32_t* expert_offset) {
  const CudaFfnShape& shape = config.shape;
  FfnProductArgs args;
  args.expert_offset = expert_offset;
  args.num_experts = shape.num_local_experts;
  args.max_rows = static_cast<int>(config.max_rows);
  args.weight_rows = static_cast<int>(down ? shape.hidden : 2 * shape.intermediate);
  args.k = static_cast<int>(down ? shape.intermediate : shape.hidden);
  args.out_columns = static_cast<int>(down ? shape.hidden : shape.intermediate);
  args.weights = layer + (down ? layout.down : layout.gate_up);
  args.weight_scales =
      reinterpret_cast<const float*>(layer + (down ? layout.down_scales : layout.gate_up_scales));
  return args;
}

class PortableExpertFfn final : public CudaExpertFfn {
 public:
  PortableExpertFfn(const CudaExpertFfnConfig& config, DeviceBuffer workspace, int num_blocks)
      : config_(config),
        layout_(LayOutFfnWeights(config.shape)),
        workspace_(std::move(workspace)),
        num_blocks_(num_blocks) {}

  absl::Status Run(const std::byte* layer, const void* x, const std::int32_t* expert_offset,
                   void* y, cudaStream_t stream) override {
    EPS_RETURN_IF_ERROR(CheckPointers(layer, x, expert_offset, y));
    const DataType weights = config_.shape.weights;
    FfnProductArgs args = ProductArgs(config_, layout_, /*down=*/false, layer, expert_offset);
    args.a = x;
    args.out = workspace_.as<void>();
    EPS_RETURN_IF_ERROR(LaunchPortableFfn(weights, /*down=*/false, args, num_blocks_, stream));
    args = ProductArgs(config_, layout_, /*down=*/true, layer, expert_offset);
    args.a = workspace_.as<void>();
    args.out = y;
    return LaunchPortableFfn(weights, /*down=*/true, args, num_blocks_, stream);
  }
  std::uint64_t workspace_bytes() const override { return WorkspaceBytes(config_); }
  std::string_view kernel_name() const override {
    return config_.shape.weights == DataType::kBf16 ? "portable-mma-bf16" : "portable-mma-fp8";
  }

 private:
  const CudaExpertFfnConfig config_;
  const CudaFfnLayout layout_;
  const DeviceBuffer workspace_;
  const int num_blocks_;
};

// The driver's entry point, looked up at run time: a program that links libcuda would not even
// start on a machine without a GPU.
using EncodeTensorMap = decltype(&cuTensorMapEncodeTiled);

absl::StatusOr<EncodeTensorMap> LookUpEncodeTensorMap() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  EPS_CUDA_RETURN_IF_ERROR(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                            cudaEnableDefault, &found));
  if (found != cudaDriverEntryPointSuccess || entry == nullptr) {
    return absl::FailedPreconditionError(
        "expert ffn: this driver has no cuTensorMapEncodeTiled; CUDA 12 or newer is needed");
  }
  return reinterpret_cast<EncodeTensorMap>(entry);
}

class HopperExpertFfn final : public CudaExpertFfn {
 public:
  HopperExpertFfn(const CudaExpertFfnConfig& config, DeviceBuffer workspace, int num_blocks,
                  EncodeTensorMap encode)
      : config_(config),
        layout_(LayOutFfnWeights(config.shape)),
        parts_(LayOutWorkspace(config)),
        workspace_(std::move(workspace)),
        num_blocks_(num_blocks),
        encode_(encode) {}

  absl::Status Run(const std::byte* layer, const void* x, const std::int32_t* expert_offset,
                   void* y, cudaStream_t stream) override {
    EPS_RETURN_IF_ERROR(CheckPointers(layer, x, expert_offset, y));
    FfnProductArgs first = ProductArgs(config_, layout_, /*down=*/false, layer, expert_offset);
    FfnProductArgs second = ProductArgs(config_, layout_, /*down=*/true, layer, expert_offset);
    first.a = x;
    first.out = At<void>(parts_.middle);
    second.a = first.out;
    second.out = y;
    if (is_fp8()) {
      const FfnQuantizeArgs quantize = {x,
                                        At<void>(parts_.rows),
                                        At<float>(parts_.row_scales),
                                        expert_offset + first.num_experts,
                                        first.max_rows,
                                        first.k};
      // Eight of these small blocks fit on a multiprocessor, and there are as many as num_blocks_.
      EPS_RETURN_IF_ERROR(LaunchFfnQuantize(quantize, num_blocks_ * 8, stream));
      first.a = quantize.out;
      first.row_scales = quantize.scales;
      first.out_scales = At<float>(parts_.middle_scales);
      second.row_scales = first.out_scales;
    }
    EPS_RETURN_IF_ERROR(RunProduct(/*down=*/false, first, stream));
    return RunProduct(/*down=*/true, second, stream);
  }
  std::uint64_t workspace_bytes() const override { return WorkspaceBytes(config_); }
  std::string_view kernel_name() const override {
    return is_fp8() ? "hopper-wgmma-fp8" : "hopper-wgmma-bf16";
  }

 private:
  bool is_fp8() const { return config_.shape.weights == DataType::kFp8E4m3; }

  template <typename T>
  T* At(std::uint64_t offset) const {
    return reinterpret_cast<T*>(workspace_.as<std::byte>() + offset);
  }

  absl::Status RunProduct(bool down, const FfnProductArgs& args, cudaStream_t stream) const {
    const auto k = static_cast<std::uint64_t>(args.k);
    const std::uint64_t weight_rows =
        static_cast<std::uint64_t>(args.num_experts) * static_cast<std::uint64_t>(args.weight_rows);
    CUtensorMap rows_map, weights_map;
    EPS_RETURN_IF_ERROR(
        Encode(args.a, k, static_cast<std::uint64_t>(args.max_rows), kHopperRowBox, &rows_map));
    EPS_RETURN_IF_ERROR(Encode(args.weights, k, weight_rows, kHopperWeightBox, &weights_map));
    return LaunchHopperFfn(config_.shape.weights, down, args, rows_map, weights_map, num_blocks_,
                           stream);
  }

  // A row-major matrix [rows, k], copied by boxes of 128 bytes of K.
  absl::Status Encode(const void* matrix, std::uint64_t k, std::uint64_t rows, int box_rows,
                      CUtensorMap* map) const {
    const std::uint64_t element_bytes = DataTypeBytes(config_.shape.weights);
    const cuuint64_t sizes[] = {k, rows};
    const cuuint64_t strides[] = {k * element_bytes};
    const cuuint32_t box[] = {static_cast<cuuint32_t>(128 / element_bytes),
                              static_cast<cuuint32_t>(box_rows)};
    const cuuint32_t element_strides[] = {1, 1};
    EPS_DRIVER_RETURN_IF_ERROR(
        encode_(map, is_fp8() ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
                const_cast<void*>(matrix), sizes, strides, box, element_strides,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
    return absl::OkStatus();
  }

  const CudaExpertFfnConfig config_;
  const CudaFfnLayout layout_;
  const Workspace parts_;
  const DeviceBuffer workspace_;
  const int num_blocks_;
  const EncodeTensorMap encode_;
};

absl::StatusOr<int> ComputeCapabilityMajor() {
  int device = 0, major = 0;
  EPS_CUDA_RETURN_IF_ERROR(cudaGetDevice(&device));
  EPS_CUDA_RETURN_IF_ERROR(
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return major;
}

}  // namespace

absl::StatusOr<std::unique_ptr<CudaExpertFfn>> CudaExpertFfn::Create(
    const CudaExpertFfnConfig& config) {
  EPS_RETURN_IF_ERROR(CheckConfig(config));
  EPS_ASSIGN_OR_RETURN(const int capability, ComputeCapabilityMajor());
  if (capability < kHopperCapability ||
      (config.kernel == FfnKernel::kHopper && capability != kHopperCapability)) {
    return absl::FailedPreconditionError(
        absl::StrCat("expert ffn: compute capability ", capability, ".x is not what ",
                     config.kernel == FfnKernel::kHopper ? "the Hopper kernel needs, 9.0"
                                                         : "the kernels need, 9.0 or later"));
  }
  const DataType weights = config.shape.weights;
  if (config.kernel == FfnKernel::kPortable || capability != kHopperCapability) {
    EPS_ASSIGN_OR_RETURN(const int num_blocks, PreparePortableFfn(weights));
    EPS_ASSIGN_OR_RETURN(DeviceBuffer workspace, DeviceBuffer::Create(WorkspaceBytes(config)));
    return std::make_unique<PortableExpertFfn>(config, std::move(workspace), num_blocks);
  }
  EPS_ASSIGN_OR_RETURN(const EncodeTensorMap encode, LookUpEncodeTensorMap());
  EPS_ASSIGN_OR_RETURN(const int num_blocks, PrepareHopperFfn(weights));
  EPS_RETURN_IF_ERROR(PrepareFfnQuantize());
  EPS_ASSIGN_OR_RETURN(DeviceBuffer workspace, DeviceBuffer::Create(WorkspaceBytes(config)));
  return std::make_unique<HopperExpertFfn>(config, std::move(workspace), num_blocks, encode);
}

std::uint64_t CudaExpertFfn::WorkspaceBytes(const CudaExpertFfnConfig& config) {
  return LayOutWorkspace(config).bytes;
}

}  // namespace epserve::runtime
