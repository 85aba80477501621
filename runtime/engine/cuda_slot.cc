#include "runtime/engine/cuda_slot.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "runtime/base/device_poll.h"
#include "runtime/base/limits.h"
#include "runtime/base/status.h"
#include "runtime/engine/cuda_convert.h"
#include "runtime/engine/cuda_regions.h"

namespace epserve::runtime {
namespace {

constexpr std::int64_t kBf16Bytes = 2;
constexpr std::int64_t kWidestBytes = 4;  // of a request's element
constexpr DeviceExchange::Path kPath = DeviceExchange::Path::kPrefill;

constexpr std::size_t kPartAlignment = 256;

std::int64_t ShardElements(const CudaSlotConfig& config) {
  return config.intake.max_shard_tokens * config.intake.hidden;
}

std::int64_t ShardPairs(const CudaSlotConfig& config) {
  return config.intake.max_shard_tokens * kMaxTopk;
}

std::size_t Aligned(std::size_t bytes) {
  return (bytes + kPartAlignment - 1) / kPartAlignment * kPartAlignment;
}

std::size_t InputBytes(const CudaSlotConfig& config) {
  return Aligned(static_cast<std::size_t>(ShardElements(config) * kWidestBytes)) +
         2 * Aligned(static_cast<std::size_t>(ShardPairs(config)) * 4);
}

CudaExpertFfnConfig FfnConfig(const CudaSlotConfig& config) {
  CudaExpertFfnConfig ffn;
  ffn.shape = config.shape;
  ffn.max_rows = config.max_rows;
  return ffn;
}

// Memory that the device cannot reach by itself: what malloc gives.
absl::StatusOr<bool> IsPageable(const void* memory) {
  cudaPointerAttributes attributes;
  EPS_CUDA_RETURN_IF_ERROR(cudaPointerGetAttributes(&attributes, memory));
  return attributes.type == cudaMemoryTypeUnregistered;
}

}  // namespace

CudaSlot::CudaSlot(const CudaSlotConfig& config)
    : ShardSlot(config.intake),
      config_(config),
      local_expert_rows_(static_cast<std::size_t>(config.shape.num_local_experts)) {}

std::uint64_t CudaSlot::PlanBytes(const CudaSlotConfig& config) {
  std::uint64_t bytes =
      InputBytes(config) + static_cast<std::uint64_t>(2 * ShardElements(config) * kBf16Bytes);
  if (config.shape.num_local_experts == 0) return bytes;
  bytes += static_cast<std::uint64_t>(2 * config.max_rows * config.intake.hidden * kBf16Bytes);
  return bytes + CudaExpertFfn::WorkspaceBytes(FfnConfig(config));
}

absl::StatusOr<std::unique_ptr<CudaSlot>> CudaSlot::Create(const CudaSlotConfig& config) {
  std::unique_ptr<CudaSlot> slot(new CudaSlot(config));
  EPS_RETURN_IF_ERROR(slot->Initialize());
  return slot;
}

absl::Status CudaSlot::Initialize() {
  EPS_RETURN_IF_ERROR(LoadConvertKernels());
  EPS_RETURN_IF_ERROR(LoadRoutingKernel());
  EPS_RETURN_IF_ERROR(stream_.Create());
  for (Event& mark : marks_) EPS_RETURN_IF_ERROR(mark.Create());
  const std::int64_t elements = ShardElements(config_);
  EPS_ASSIGN_OR_RETURN(staging_, PinnedBuffer::Create(InputBytes(config_)));
  EPS_ASSIGN_OR_RETURN(reports_, PinnedBuffer::Create(kMaxRoutedPieces * sizeof(RoutingReport)));
  EPS_ASSIGN_OR_RETURN(input_, DeviceBuffer::Create(InputBytes(config_)));
  EPS_ASSIGN_OR_RETURN(x_, DeviceBuffer::Create(elements * kBf16Bytes));
  EPS_ASSIGN_OR_RETURN(out_, DeviceBuffer::Create(elements * kBf16Bytes));
  if (config_.shape.num_local_experts == 0) return absl::OkStatus();
  const std::int64_t expert_bytes = config_.max_rows * config_.intake.hidden * kBf16Bytes;
  EPS_ASSIGN_OR_RETURN(expert_inputs_, DeviceBuffer::Create(expert_bytes));
  EPS_ASSIGN_OR_RETURN(expert_rows_, DeviceBuffer::Create(expert_bytes));
  EPS_ASSIGN_OR_RETURN(ffn_, CudaExpertFfn::Create(FfnConfig(config_)));
  return absl::OkStatus();
}

std::size_t CudaSlot::RowBytes() const {
  return static_cast<std::size_t>(config_.intake.hidden) * DataTypeBytes(intake().input().dtype);
}

absl::Status CudaSlot::Read(std::span<const DeviceRead> reads, absl::Duration timeout) {
  auto* const staging = staging_.as<std::byte>();
  std::size_t bytes = 0;
  for (const DeviceRead& read : reads) {
    if (read.bytes > InputBytes(config_) - bytes) {
      return absl::InvalidArgumentError(absl::StrCat("read device: ", bytes, " and ", read.bytes,
                                                     " bytes exceed the ", InputBytes(config_),
                                                     " of a shard"));
    }
    EPS_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(staging + bytes, read.source, read.bytes,
                                             cudaMemcpyDefault, stream_.get()));
    bytes += read.bytes;
  }
  EPS_RETURN_IF_ERROR(Drain(timeout));
  const std::byte* from = staging;
  for (const DeviceRead& read : reads) {
    std::memcpy(read.destination, from, read.bytes);
    from += read.bytes;
  }
  return absl::OkStatus();
}

absl::StatusOr<bool> CudaSlot::EnqueueHostRows() {
  const ShardInput& input = intake().input();
  if (NumHiddenIn(input.device_rows) == input.num_tokens) return false;
  EPS_ASSIGN_OR_RETURN(const bool pageable, IsPageable(input.hidden));
  if (pageable) {
    std::memcpy(staging_.as<void>(), input.hidden, intake().row_bytes());
    return true;
  }
  EPS_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(input_.as<void>(), input.hidden, intake().row_bytes(),
                                           cudaMemcpyDefault, stream_.get()));
  return false;
}

absl::Status CudaSlot::EnqueueStage() {
  const ShardInput& input = intake().input();
  const std::size_t row_bytes = intake().row_bytes();
  const std::size_t index_bytes = intake().ids().size_bytes();
  const std::size_t ids_at = Aligned(row_bytes);
  const std::size_t weights_at = ids_at + Aligned(index_bytes);
  auto* const device = input_.as<std::byte>();
  const bool converted = input.dtype != DataType::kBf16;
  // Used where they lie, or brought together in input_.
  const std::byte* const in_place = WholeHidden(input.device_rows, input.num_tokens);
  const std::byte* const rows = in_place != nullptr ? in_place : device;
  routing_faults_.clear();
  uncounted_ = false;
  tokens_ = {.x = converted ? x_.as<void>() : static_cast<const void*>(rows),
             .topk_ids = reinterpret_cast<const std::int32_t*>(device + ids_at),
             .topk_weights = reinterpret_cast<const float*>(device + weights_at),
             .num_tokens = input.num_tokens,
             .topk = input.topk,
             .dtype = DataType::kBf16,
             .payload = config_.payload};
  if (input.num_tokens == 0) return absl::OkStatus();
  auto* const staging = staging_.as<std::byte>();
  std::size_t staged_to = weights_at + index_bytes;
  if (intake().routed_on_device()) {
    EPS_RETURN_IF_ERROR(EnqueueDeviceRouting(reinterpret_cast<std::int32_t*>(device + ids_at),
                                             reinterpret_cast<float*>(device + weights_at)));
    staged_to = row_bytes;
  } else {
    std::memcpy(staging + ids_at, intake().topk_ids(), index_bytes);
    std::memcpy(staging + weights_at, intake().topk_weights(), index_bytes);
  }
  EPS_ASSIGN_OR_RETURN(const bool staged, EnqueueHostRows());
  if (const std::size_t staged_from = staged ? 0 : ids_at; staged_from < staged_to) {
    EPS_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(device + staged_from, staging + staged_from,
                                             staged_to - staged_from, cudaMemcpyHostToDevice,
                                             stream_.get()));
  }
  if (in_place == nullptr) {
    EPS_RETURN_IF_ERROR(GatherHidden(input.device_rows, RowBytes(), device, stream_.get()));
  }
  if (!converted) return absl::OkStatus();
  return LaunchToBf16(input.dtype, rows, x_.as<void>(), input.num_tokens * config_.intake.hidden,
                      stream_.get());
}

absl::Status CudaSlot::EnqueueDeviceRouting(std::int32_t* ids, float* weights) {
  const ShardInput& input = intake().input();
  auto* report = reports_.as<RoutingReport>();
  for (const ShardDeviceRows& piece : input.device_rows) {
    const std::int64_t at = piece.first_row * input.topk;
    EPS_RETURN_IF_ERROR(LaunchTakeRouting({.ids = piece.topk_ids,
                                           .weights = piece.topk_weights,
                                           .wide_ids = piece.wide_ids,
                                           .num_entries = piece.num_rows * input.topk,
                                           .num_experts = config_.intake.num_experts,
                                           .checked_ids = ids + at,
                                           .checked_weights = weights + at,
                                           .report = report++},
                                          stream_.get()));
  }
  return absl::OkStatus();
}

void CudaSlot::TakeRoutingFaults() {
  if (!intake().routed_on_device()) return;
  const auto* const reports = reports_.as<RoutingReport>();
  for (std::size_t piece = 0; piece < intake().input().device_rows.size(); ++piece) {
    const RoutingReport& report = reports[piece];
    if (report.kind == RoutingReport::kFine) continue;
    routing_faults_.push_back({.piece = piece,
                               .entry = report.entry,
                               .in_weights = report.kind == RoutingReport::kWrongWeight,
                               .id = report.id,
                               .weight = report.weight});
  }
}

absl::StatusOr<CountMatrix> CudaSlot::ExchangeCounts(DeviceExchange& exchange, int index,
                                                     absl::Duration timeout) {
  engaged_ = true;
  return exchange.ExchangeCounts(index, intake().input().sequence, counts(), timeout,
                                 stream_.get());
}

absl::Status CudaSlot::EnqueueDispatch(DeviceExchange& exchange, int index,
                                       const CountMatrix& counts, std::int64_t first_expert) {
  // Every rank refuses what does not fit any of them, so that none waits for another.
  for (int rank = 0; rank < counts.num_ranks; ++rank) {
    const std::int64_t pairs = counts.NumReceived(rank) * tokens_.topk;
    if (pairs <= config_.max_rows) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("dispatch: ", pairs, " rows for the experts of rank ", rank, " exceed ",
                     config_.max_rows, ", which --max-batch-tokens and the model's topk allow"));
  }
  std::copy_n(counts.rows_per_expert.begin() + first_expert, local_expert_rows_.size(),
              local_expert_rows_.begin());
  engaged_ = true;
  EPS_RETURN_IF_ERROR(Mark(kDispatchBegin));
  EPS_RETURN_IF_ERROR(exchange.Dispatch(kPath, index, tokens_, &counts, stream_.get()));
  return Mark(kDispatchEnd);
}

absl::Status CudaSlot::EnqueueUncounted(DeviceExchange& exchange, int index) {
  uncounted_ = true;
  engaged_ = true;
  EPS_RETURN_IF_ERROR(Mark(kDispatchBegin));
  EPS_RETURN_IF_ERROR(exchange.Dispatch(kPath, index, tokens_, /*counts=*/nullptr, stream_.get()));
  return Mark(kDispatchEnd);
}

absl::Status CudaSlot::EnqueueExperts(DeviceExchange& exchange, int index, const std::byte* layer) {
  if (ffn_ != nullptr) {
    EPS_RETURN_IF_ERROR(exchange.LayOutExperts(kPath, index, stream_.get()));
    EPS_RETURN_IF_ERROR(
        exchange.Gather(kPath, index, tokens_, expert_inputs_.as<void>(), stream_.get()));
    EPS_RETURN_IF_ERROR(ffn_->Run(layer, expert_inputs_.as<void>(),
                                  exchange.expert_offset(kPath, index), expert_rows_.as<void>(),
                                  stream_.get()));
  }
  return Mark(kExpertsEnd);
}

absl::Status CudaSlot::EnqueueCombine(DeviceExchange& exchange, int index) {
  EPS_RETURN_IF_ERROR(Mark(kCombineBegin));
  const ShardInput& input = intake().input();
  const bool converted = input.dtype != DataType::kBf16;
  std::byte* const in_place = WholeOutput(input.device_rows, input.num_tokens);
  std::byte* const combined = in_place != nullptr && !converted ? in_place : out_.as<std::byte>();
  EPS_RETURN_IF_ERROR(
      exchange.Combine(kPath, index, tokens_, expert_rows_.as<void>(), combined, stream_.get()));
  if (converted) {
    void* const to = in_place != nullptr ? static_cast<void*>(in_place) : input_.as<void>();
    EPS_RETURN_IF_ERROR(LaunchFromBf16(input.dtype, combined, to,
                                       input.num_tokens * config_.intake.hidden, stream_.get()));
  }
  if (in_place == nullptr) {
    EPS_RETURN_IF_ERROR(ScatterOutput(input.device_rows, RowBytes(),
                                      converted ? input_.as<std::byte>() : combined,
                                      stream_.get()));
  }
  return Mark(kCombineEnd);
}

absl::Status CudaSlot::Finish(DeviceExchange& exchange, int index, void* output,
                              absl::Duration timeout) {
  const std::size_t bytes = intake().row_bytes();
  const ShardInput& input = intake().input();
  const bool converted = input.dtype != DataType::kBf16;
  const void* result = converted ? input_.as<void>() : out_.as<void>();
  bool pageable = false;
  if (output == nullptr && NumOutputIn(input.device_rows) < input.num_tokens) {
    return absl::InvalidArgumentError("finish: output is null, and rows have no other place");
  }
  if (bytes > 0 && output != nullptr) {
    EPS_ASSIGN_OR_RETURN(pageable, IsPageable(output));
    void* const to = pageable ? staging_.as<void>() : output;
    EPS_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(to, result, bytes, cudaMemcpyDefault, stream_.get()));
  }
  EPS_RETURN_IF_ERROR(Mark(kDone));
  EPS_RETURN_IF_ERROR(WaitForDone(&exchange, timeout));
  EPS_RETURN_IF_ERROR(exchange.CheckWaits());
  if (pageable) std::memcpy(output, staging_.as<void>(), bytes);
  TakeRoutingFaults();
  if (const std::int32_t* first = exchange.counted_offset(index); uncounted_ && first != nullptr) {
    for (std::size_t e = 0; e < local_expert_rows_.size(); ++e) {
      local_expert_rows_[e] = first[e + 1] - first[e];
    }
  }
  return TakeTimes();
}

absl::Status CudaSlot::Drain(absl::Duration timeout) {
  EPS_RETURN_IF_ERROR(Mark(kDone));
  return WaitForDone(nullptr, timeout);
}

absl::Status CudaSlot::WaitForDone(DeviceExchange* exchange, absl::Duration timeout) {
  const auto limit = absl::ToChronoNanoseconds(timeout);
  for (const DevicePoll poll;; poll.Pause()) {
    const cudaError_t state = cudaEventQuery(marks_[kDone].get());
    if (state == cudaSuccess) return absl::OkStatus();
    if (state != cudaErrorNotReady) {
      return CudaStatus(state, "cudaEventQuery", __FILE__, __LINE__);
    }
    // One wait has given up: the others of the batch, one a row, need not run out one by one.
    if (exchange != nullptr && !exchange->CheckWaits().ok()) exchange->Abort();
    if (poll.waited() > limit) {
      return absl::DeadlineExceededError(
          absl::StrCat("finish: the GPU has not ended a batch within ",
                       absl::ToInt64Milliseconds(timeout), " ms; it hangs, restart the worker"));
    }
  }
}

absl::StatusOr<std::int64_t> CudaSlot::ElapsedNs(enum Mark begin, enum Mark end) const {
  float ms = 0;
  EPS_CUDA_RETURN_IF_ERROR(cudaEventElapsedTime(&ms, marks_[begin].get(), marks_[end].get()));
  return static_cast<std::int64_t>(static_cast<double>(ms) * 1e6);
}

absl::Status CudaSlot::TakeTimes() {
  EPS_ASSIGN_OR_RETURN(times().dispatch_ns, ElapsedNs(kDispatchBegin, kDispatchEnd));
  EPS_ASSIGN_OR_RETURN(times().ffn_ns, ElapsedNs(kDispatchEnd, kExpertsEnd));
  EPS_ASSIGN_OR_RETURN(times().combine_ns, ElapsedNs(kCombineBegin, kCombineEnd));
  return absl::OkStatus();
}

}  // namespace epserve::runtime
