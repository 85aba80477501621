// The engine of the cuda and nccl backends. See engine.h for life cycle and thread safety.
//
// One stream a slot. Two slots' kernels may wait for peers at once while a third computes: so
// waiting kernels may never fill the GPU, and streams may not share a hardware queue, where one
// slot's waiting kernel would hold up another slot's. The first is seen to by DeviceTransport, the
// second by PrepareProcess: a process can have 32 queues, and an exchange 16 slots at most.
#include "runtime/engine/cuda_engine.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "runtime/base/cuda_status.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"
#include "runtime/engine/cuda_device.h"
#include "runtime/engine/cuda_regions.h"
#include "runtime/engine/cuda_slot.h"
#include "runtime/engine/cuda_weights.h"
#include "runtime/engine/device_transport.h"
#include "runtime/engine/engine_base.h"
#include "runtime/engine/epoch_exchange.h"
#include "runtime/symmetric/handle_socket.h"

namespace epserve::runtime {
namespace {

// What a batch may take on the device beyond its waits for peers, before the GPU is taken to hang.
constexpr absl::Duration kComputeTimeout = absl::Minutes(1);
// What is left on the device ends in once its waits have been aborted.
constexpr absl::Duration kDrainTimeout = absl::Seconds(20);

DeviceTransport TransportOf(const EngineOptions& options, const cudaDeviceProp& device) {
  return {.options = options.cuda,
          .payload = options.cuda.fp8_dispatch ? RowPayload::kFp8 : RowPayload::kCopy,
          .num_multiprocessors = device.multiProcessorCount};
}

class CudaEngine final : public EngineBase {
 public:
  CudaEngine(const EngineOptions& options, std::unique_ptr<Checkpoint> checkpoint,
             const cudaDeviceProp& device)
      : EngineBase(options, std::move(checkpoint)),
        device_name_(absl::StrCat("GPU ", options.cuda.device, " (", device.name, ")")),
        transport_(TransportOf(options, device)),
        regions_(options.cuda.device) {}
  ~CudaEngine() override;

  std::string_view backend() const override { return transport_.backend(); }

  absl::StatusOr<MemoryPlan> PlanMemory(const Placement& placement, int rank) const override;
  absl::StatusOr<std::optional<DeviceMemory>> ReadDeviceMemory() const override;
  absl::Status LoadExperts(
      const Placement& placement, int rank,
      const std::function<void(std::uint64_t, std::uint64_t)>& progress) override;

  absl::StatusOr<std::string> CreateHeap(std::uint64_t epoch) override;
  std::string handle_type() const override { return exchange_.handle_type(); }
  absl::Status OpenPeers(std::span<const std::string> handles) override;
  absl::Status UseHostRows(std::span<std::byte> memory) override;
  DeviceRegions* device_regions() override { return &regions_; }
  absl::Status ReadDevice(int slot, std::span<const DeviceRead> reads) override;
  void SealHeap() override;
  void Abort() override { exchange_.Abort(); }
  void CloseEpoch() override;

  absl::StatusOr<std::vector<float>> ReferenceExpert(std::int64_t layer, std::int64_t expert,
                                                     std::span<const float> x) const override;

  bool exchanges_counts() const override { return !options_.cuda.use_nccl; }
  absl::StatusOr<CountMatrix> ExchangeCounts(int slot) override;
  absl::Status Dispatch(int slot, const CountMatrix& counts) override;
  // A slot's buffers are for so many experts a token in a whole batch.
  bool dispatches_uncounted(int topk) const override {
    return !options_.cuda.use_nccl && topk <= model().topk;
  }
  absl::Status DispatchUncounted(int slot) override;
  absl::Status RunExperts(int slot) override;
  absl::Status Combine(int slot) override;
  absl::Status Finish(int slot, void* output, BatchTimes* times,
                      std::vector<std::int64_t>* local_expert_rows) override;
  std::span<const RoutingFault> routing_faults(int slot) const override {
    return slots_[static_cast<std::size_t>(slot)]->routing_faults();
  }
  void Discard(int slot) override;

 private:
  absl::Status StageSlot(ShardSlot& slot) override;
  ShardSlot& SlotAt(int slot) override { return *slots_[static_cast<std::size_t>(slot)]; }
  absl::StatusOr<CudaSlot*> BatchIn(const char* operation, int slot, CudaSlot::State wanted);

  static absl::Status CheckCounted(const char* operation, const CudaSlot& slot);
  absl::Status CheckCounts(const CudaSlot& slot, const CountMatrix& counts) const;
  absl::Status CheckModel(const Placement& placement, int rank) const;
  CudaSlotConfig MakeSlotConfig(const Placement& placement, int rank) const;
  absl::Status UseDevice() const {
    EPS_CUDA_RETURN_IF_ERROR(cudaSetDevice(options_.cuda.device));  // A thread's own.
    return absl::OkStatus();
  }
  absl::StatusOr<std::uint64_t> AvailableBytes() const;
  absl::Status CheckFits(const MemoryPlan& plan) const;
  absl::Duration BatchTimeout() const { return 2 * options_.peer_timeout + kComputeTimeout; }
  absl::Status CheckHangs(const char* operation) const;
  // The error of a batch's operation, as it is to be told. Ends this rank's waits.
  absl::Status Failed(const CudaSlot& slot, const absl::Status& status);
  // Ends the epoch here, without waiting for what is on the device.
  void GiveUp(const char* operation, const absl::Status& why);

  const std::string device_name_;
  const DeviceTransport transport_;
  CudaRegions regions_;

  // Set by LoadExperts, read by batches.
  CudaWeights weights_;
  std::uint64_t file_bytes_ = 0;  // that the last load read
  std::uint64_t held_bytes_ = 0;  // of the device, by weights and slots
  std::vector<std::unique_ptr<CudaSlot>> slots_;

  EpochExchange<DeviceExchange> exchange_;
  PinnedRange host_rows_;  // of the epoch
  // The GPU has not come back: nothing on it may be freed or used again.
  std::atomic<bool> hangs_ = false;
};

CudaEngine::~CudaEngine() {
  CloseEpoch();
  if (!hangs_) return;
  for (auto& slot : slots_) (void)slot.release();
  (void)new CudaWeights(std::move(weights_));
}

absl::Status CudaEngine::CheckHangs(const char* operation) const {
  if (!hangs_) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat(operation, ": ", device_name_, " hangs; restart the worker"));
}

// A batch that fails once peers count on it takes its epoch along, whatever it failed of: the peers
// would wait for their timeout. Said as such, so that they are told at once.
absl::Status CudaEngine::Failed(const CudaSlot& slot, const absl::Status& status) {
  if (status.ok() || !slot.engaged()) return status;
  exchange_.Abort();
  if (absl::IsAborted(status) || absl::IsDeadlineExceeded(status)) return status;
  return absl::UnavailableError(absl::StrCat(device_name_, ": ", status.message()));
}

absl::Status CudaEngine::CheckModel(const Placement& placement, int rank) const {
  EPS_RETURN_IF_ERROR(CheckPlacement(placement, rank));
  if (placement.num_ranks() > kMaxCudaRanks) {
    return absl::InvalidArgumentError(absl::StrCat("load experts: ", placement.num_ranks(),
                                                   " workers exceed the device backends' ",
                                                   kMaxCudaRanks, "; start fewer"));
  }
  CudaFfnShape shape = CudaWeights::ShapeOf(
      *checkpoint_, std::max<std::int64_t>(1, placement.num_local_experts(rank)));
  EPS_RETURN_IF_ERROR(CheckFfnShape(shape));
  if (options_.cuda.fp8_dispatch && model().hidden % kFp8GroupElements != 0) {
    return absl::InvalidArgumentError(absl::StrCat("load experts: hidden ", model().hidden,
                                                   " is no multiple of ", kFp8GroupElements,
                                                   ", which fp8 rows need; use "
                                                   "--dispatch-dtype=bf16"));
  }
  return absl::OkStatus();
}

CudaSlotConfig CudaEngine::MakeSlotConfig(const Placement& placement, int rank) const {
  CudaSlotConfig config;
  config.intake = MakeIntakeConfig(placement);
  config.shape = CudaWeights::ShapeOf(*checkpoint_, placement.num_local_experts(rank));
  // A whole shard of every rank: what an uncounted batch can bring at most.
  config.max_rows = config.intake.max_shard_tokens * placement.num_ranks() * model().topk;
  config.payload = transport_.payload;
  return config;
}

absl::StatusOr<MemoryPlan> CudaEngine::PlanMemory(const Placement& placement, int rank) const {
  EPS_RETURN_IF_ERROR(CheckModel(placement, rank));
  MemoryPlan plan;
  plan.weight_bytes = CudaWeights::PlanBytes(*checkpoint_, placement.num_local_experts(rank));
  plan.heap_bytes = transport_.DeviceBytes(MakeExchangeConfig(placement, rank, /*epoch=*/1));
  plan.workspace_bytes = CudaSlot::PlanBytes(MakeSlotConfig(placement, rank)) *
                         static_cast<std::uint64_t>(options_.num_slots);
  plan.held_type = absl::StrCat(std::string(DataTypeName(CudaWeights::HeldType(*checkpoint_))),
                                ", rows as ", options_.cuda.fp8_dispatch ? "fp8" : "bf16");
  return plan;
}

absl::StatusOr<std::uint64_t> CudaEngine::AvailableBytes() const {
  EPS_RETURN_IF_ERROR(UseDevice());
  std::size_t free_bytes = 0;
  std::size_t total_bytes = 0;
  EPS_CUDA_RETURN_IF_ERROR(cudaMemGetInfo(&free_bytes, &total_bytes));
  return free_bytes + held_bytes_;
}

absl::StatusOr<std::optional<DeviceMemory>> CudaEngine::ReadDeviceMemory() const {
  EPS_ASSIGN_OR_RETURN(const std::uint64_t available, AvailableBytes());
  return DeviceMemory{available, device_name_};
}

absl::Status CudaEngine::CheckFits(const MemoryPlan& plan) const {
  EPS_ASSIGN_OR_RETURN(const std::uint64_t available, AvailableBytes());
  const std::uint64_t needed = plan.weight_bytes + plan.heap_bytes + plan.workspace_bytes;
  if (needed <= available) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat(
      "load experts: ", needed, " bytes of weights, heap and workspace exceed the ", available,
      " that ", device_name_,
      " has free; spread the experts over more workers or lower --max-batch-tokens or --slots"));
}

absl::Status CudaEngine::LoadExperts(
    const Placement& placement, int rank,
    const std::function<void(std::uint64_t, std::uint64_t)>& progress) {
  EPS_ASSIGN_OR_RETURN(const MemoryPlan plan, PlanMemory(placement, rank));
  EPS_RETURN_IF_ERROR(exchange_.CheckClosed("load experts"));
  EPS_RETURN_IF_ERROR(CheckHangs("load experts"));
  EPS_RETURN_IF_ERROR(UseDevice());
  EPS_RETURN_IF_ERROR(CheckFits(plan));
  const std::int64_t first = placement.first_expert[static_cast<std::size_t>(rank)];
  const bool held = HoldsExperts(placement, rank);
  const bool same = HoldsAll(placement, rank);
  SetUnloaded();  // Until all is there again, nothing is.
  if (!same) {
    slots_.clear();
    held_bytes_ = held ? plan.weight_bytes : 0;
  }
  if (!held) {
    weights_ = {};  // Gives its memory back before more is taken.
    EPS_ASSIGN_OR_RETURN(
        weights_, CudaWeights::Load(*checkpoint_, first, placement.num_local_experts(rank),
                                    [&](std::uint64_t loaded_bytes, std::uint64_t total_bytes) {
                                      file_bytes_ = total_bytes;
                                      if (progress) progress(loaded_bytes, total_bytes);
                                    }));
    held_bytes_ = plan.weight_bytes;
  } else if (progress) {
    progress(file_bytes_, file_bytes_);
  }
  EPS_RETURN_IF_ERROR(LoadRouters());
  const CudaSlotConfig config = MakeSlotConfig(placement, rank);
  while (static_cast<int>(slots_.size()) < options_.num_slots) {
    EPS_ASSIGN_OR_RETURN(std::unique_ptr<CudaSlot> slot, CudaSlot::Create(config));
    slots_.push_back(std::move(slot));
  }
  // Buffers have been zeroed on the default stream, which the slots' are not ordered with.
  EPS_CUDA_RETURN_IF_ERROR(cudaDeviceSynchronize());
  held_bytes_ = plan.weight_bytes + plan.workspace_bytes;
  SetLoaded(placement, rank);
  return absl::OkStatus();
}

absl::StatusOr<std::string> CudaEngine::CreateHeap(std::uint64_t epoch) {
  EPS_RETURN_IF_ERROR(CheckLoaded("create heap"));
  EPS_RETURN_IF_ERROR(CheckHangs("create heap"));
  EPS_RETURN_IF_ERROR(exchange_.Begin("create heap"));
  EPS_RETURN_IF_ERROR(UseDevice());
  EPS_ASSIGN_OR_RETURN(std::shared_ptr<DeviceExchange> exchange,
                       transport_.Create(MakeExchangeConfig(placement(), rank(), epoch)));
  LogInfo("heap_created",
          {{"epoch", epoch}, {"handle_type", exchange->handle_type()}, {"device", device_name_}});
  const std::string handle = exchange->handle();
  exchange_.Open(std::move(exchange));
  return handle;
}

absl::Status CudaEngine::OpenPeers(std::span<const std::string> handles) {
  EPS_ASSIGN_OR_RETURN(const auto exchange, exchange_.Get("open peers"));
  EPS_RETURN_IF_ERROR(UseDevice());
  const absl::Time start = absl::Now();
  EPS_ASSIGN_OR_RETURN(const std::uint64_t available_before, AvailableBytes());
  EPS_RETURN_IF_ERROR(exchange->OpenPeers(handles, transport_.open_timeout()));
  EPS_ASSIGN_OR_RETURN(const std::uint64_t available_after, AvailableBytes());
  // A library's own memory shows here, and nowhere else.
  LogInfo("peers_opened",
          {{"took_ms", absl::ToInt64Milliseconds(absl::Now() - start)},
           {"device_bytes", static_cast<std::int64_t>(available_before - available_after)}});
  return absl::OkStatus();
}

absl::Status CudaEngine::UseHostRows(std::span<std::byte> memory) {
  EPS_RETURN_IF_ERROR(UseDevice());
  EPS_ASSIGN_OR_RETURN(host_rows_, PinnedRange::Pin(memory));
  return absl::OkStatus();
}

absl::Status CudaEngine::ReadDevice(int slot, std::span<const DeviceRead> reads) {
  EPS_RETURN_IF_ERROR(SlotIn("read device", slot, CudaSlot::State::kFree).status());
  EPS_RETURN_IF_ERROR(UseDevice());
  const absl::Status read = slots_[static_cast<std::size_t>(slot)]->Read(reads, kComputeTimeout);
  if (absl::IsDeadlineExceeded(read)) GiveUp("read device", read);
  return read;
}

void CudaEngine::SealHeap() {
  if (const auto exchange = exchange_.Peek()) exchange->Seal();
}

void CudaEngine::GiveUp(const char* operation, const absl::Status& why) {
  LogError("gpu_hangs", {{"operation", operation}, {"device", device_name_}, {"error", why}});
  hangs_ = true;
}

void CudaEngine::CloseEpoch() {
  std::shared_ptr<DeviceExchange> exchange = exchange_.Take();
  if (exchange == nullptr) return;  // Nothing is on the device.
  exchange->Abort();  // Whatever a failed batch has left on the device ends its waits.
  absl::Status status = hangs_ ? CheckHangs("close epoch") : UseDevice();
  for (const auto& slot : slots_) {
    if (status.ok()) status = slot->Drain(kDrainTimeout);
    slot->Disengage();
    slot->Release();
  }
  if (status.ok()) {
    host_rows_ = {};
    return;
  }
  GiveUp("close epoch", status);
  // Kernels and copies may still use the heap and the host's rows: both stay for as long as the
  // process does.
  struct Kept {
    std::shared_ptr<DeviceExchange> exchange;
    PinnedRange host_rows;
  };
  static auto* const kept = new std::vector<Kept>;
  kept->push_back({std::move(exchange), std::move(host_rows_)});
}

absl::StatusOr<std::vector<float>> CudaEngine::ReferenceExpert(std::int64_t layer,
                                                               std::int64_t expert,
                                                               std::span<const float> x) const {
  EPS_ASSIGN_OR_RETURN(const std::size_t index, CheckReference(layer, expert, x));
  // From the file again: what the probe compares has nothing in common with the packed weights.
  EPS_ASSIGN_OR_RETURN(const LayerExperts weights, checkpoint_->LoadExpert(index, expert));
  const auto hidden = static_cast<std::size_t>(model().hidden);
  const auto intermediate = static_cast<std::size_t>(model().intermediate);
  const float* gate = weights.gate_up.data();
  return PlainExpert(gate, gate + hidden * intermediate, weights.down.data(), hidden, intermediate,
                     x);
}

absl::StatusOr<CudaSlot*> CudaEngine::BatchIn(const char* operation, int slot,
                                              CudaSlot::State wanted) {
  EPS_RETURN_IF_ERROR(SlotIn(operation, slot, wanted).status());
  EPS_RETURN_IF_ERROR(UseDevice());
  CudaSlot* const found = slots_[static_cast<std::size_t>(slot)].get();
  found->SetState(CudaSlot::State::kFailed);  // Until the operation has been enqueued.
  return found;
}

absl::Status CudaEngine::StageSlot(ShardSlot& slot) {
  EPS_RETURN_IF_ERROR(UseDevice());
  return static_cast<CudaSlot&>(slot).EnqueueStage();
}

absl::StatusOr<CountMatrix> CudaEngine::ExchangeCounts(int index) {
  if (!exchanges_counts()) return Engine::ExchangeCounts(index);
  EPS_ASSIGN_OR_RETURN(CudaSlot * slot,
                       BatchIn("exchange counts", index, CudaSlot::State::kStaged));
  EPS_ASSIGN_OR_RETURN(const auto exchange, exchange_.Get("exchange counts"));
  EPS_RETURN_IF_ERROR(exchange->CheckWaits());
  EPS_RETURN_IF_ERROR(CheckCounted("exchange counts", *slot));
  EPS_ASSIGN_OR_RETURN(CountMatrix counts, slot->ExchangeCounts(*exchange, index, BatchTimeout()));
  slot->SetState(CudaSlot::State::kStaged);
  return counts;
}

absl::Status CudaEngine::CheckCounted(const char* operation, const CudaSlot& slot) {
  if (!slot.intake().routed_on_device()) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat(operation,
                   ": the shard's ids are in device memory, where nobody has counted "
                   "them; dispatch it uncounted"));
}

// Places in the peers' memory follow from the matrix, so what it says of this rank must be true.
absl::Status CudaEngine::CheckCounts(const CudaSlot& slot, const CountMatrix& counts) const {
  EPS_RETURN_IF_ERROR(ValidateCountMatrix(counts, placement(), options_.max_batch_tokens));
  for (int to = 0; to < counts.num_ranks; ++to) {
    const std::int32_t counted = slot.counts().rows_to_rank[static_cast<std::size_t>(to)];
    if (counts.at(rank(), to) == counted) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("dispatch: the count matrix has ", counts.at(rank(), to), " rows from rank ",
                     rank(), " to rank ", to, ", the shard ", counted));
  }
  return absl::OkStatus();
}

absl::Status CudaEngine::Dispatch(int index, const CountMatrix& counts) {
  EPS_ASSIGN_OR_RETURN(CudaSlot * slot, BatchIn("dispatch", index, CudaSlot::State::kStaged));
  EPS_ASSIGN_OR_RETURN(const auto exchange, exchange_.Get("dispatch"));
  EPS_RETURN_IF_ERROR(exchange->CheckWaits());
  EPS_RETURN_IF_ERROR(CheckCounted("dispatch", *slot));
  EPS_RETURN_IF_ERROR(CheckCounts(*slot, counts));
  const std::int64_t first = placement().first_expert[static_cast<std::size_t>(rank())];
  EPS_RETURN_IF_ERROR(Failed(*slot, slot->EnqueueDispatch(*exchange, index, counts, first)));
  slot->SetState(CudaSlot::State::kDispatched);
  return absl::OkStatus();
}

absl::Status CudaEngine::DispatchUncounted(int index) {
  EPS_ASSIGN_OR_RETURN(CudaSlot * slot, BatchIn("dispatch", index, CudaSlot::State::kStaged));
  if (const int topk = slot->intake().input().topk; !dispatches_uncounted(topk)) {
    return absl::InvalidArgumentError(
        absl::StrCat("dispatch: the ", std::string(backend()), " backend cannot dispatch topk ",
                     topk, " uncounted, only up to the model's ", model().topk));
  }
  EPS_ASSIGN_OR_RETURN(const auto exchange, exchange_.Get("dispatch"));
  EPS_RETURN_IF_ERROR(exchange->CheckWaits());
  EPS_RETURN_IF_ERROR(Failed(*slot, slot->EnqueueUncounted(*exchange, index)));
  slot->SetState(CudaSlot::State::kDispatched);
  return absl::OkStatus();
}

absl::Status CudaEngine::RunExperts(int index) {
  EPS_ASSIGN_OR_RETURN(CudaSlot * slot,
                       BatchIn("run experts", index, CudaSlot::State::kDispatched));
  EPS_ASSIGN_OR_RETURN(const auto exchange, exchange_.Get("run experts"));
  const bool any = placement().num_local_experts(rank()) > 0;
  const std::byte* const layer = any ? weights_.layer(slot->layer_index()) : nullptr;
  EPS_RETURN_IF_ERROR(Failed(*slot, slot->EnqueueExperts(*exchange, index, layer)));
  slot->SetState(CudaSlot::State::kComputed);
  return absl::OkStatus();
}

absl::Status CudaEngine::Combine(int index) {
  EPS_ASSIGN_OR_RETURN(CudaSlot * slot, BatchIn("combine", index, CudaSlot::State::kComputed));
  EPS_ASSIGN_OR_RETURN(const auto exchange, exchange_.Get("combine"));
  EPS_RETURN_IF_ERROR(Failed(*slot, slot->EnqueueCombine(*exchange, index)));
  slot->SetState(CudaSlot::State::kCombined);
  return absl::OkStatus();
}

absl::Status CudaEngine::Finish(int index, void* output, BatchTimes* times,
                                std::vector<std::int64_t>* local_expert_rows) {
  EPS_ASSIGN_OR_RETURN(CudaSlot * slot, BatchIn("finish", index, CudaSlot::State::kCombined));
  // Also after an Abort(): the device's own report says what was waited for.
  const std::shared_ptr<DeviceExchange> exchange = exchange_.Peek();
  if (exchange == nullptr) return absl::FailedPreconditionError("finish: no epoch is open");
  EPS_RETURN_IF_ERROR(Failed(*slot, slot->Finish(*exchange, index, output, BatchTimeout())));
  if (times != nullptr) *times = slot->times();
  if (local_expert_rows != nullptr) *local_expert_rows = slot->local_expert_rows();
  slot->Disengage();
  slot->Release();
  return absl::OkStatus();
}

void CudaEngine::Discard(int index) {
  if (index < 0 || static_cast<std::size_t>(index) >= slots_.size()) return;
  CudaSlot& slot = *slots_[static_cast<std::size_t>(index)];
  if (slot.state() == CudaSlot::State::kFree) return;
  // Peers may count on a part of this batch that will not come, and flags in the heap count whole
  // batches: this rank's epoch is over. The coordinator forms a new one.
  if (slot.engaged()) exchange_.Abort();
  absl::Status status = UseDevice();
  if (status.ok()) status = slot.Drain(kDrainTimeout);
  if (!status.ok()) GiveUp("discard", status);
  slot.Disengage();
  slot.Release();
}

absl::Status CheckOptions(const EngineOptions& options) {
  if (options.cuda.comm_blocks < 1 || options.cuda.comm_blocks > 128) {
    return absl::InvalidArgumentError(absl::StrCat(
        "create engine: comm_blocks ", options.cuda.comm_blocks, " is outside [1, 128]"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Engine>> CreateCudaEngine(const EngineOptions& options) {
  EPS_RETURN_IF_ERROR(CheckOptions(options));
  EPS_ASSIGN_OR_RETURN(const cudaDeviceProp device, FindCudaDevice(options.cuda.device));
  EPS_CUDA_RETURN_IF_ERROR(cudaSetDevice(options.cuda.device));
  EPS_RETURN_IF_ERROR(TransportOf(options, device).Prepare());
  if (!options.cuda.handle_dir.empty()) {
    EPS_ASSIGN_OR_RETURN(const int reclaimed,
                         ReclaimStaleSockets(options.cuda.handle_dir, options.cluster_id));
    if (reclaimed > 0) {
      LogInfo("stale_sockets_reclaimed",
              {{"directory", options.cuda.handle_dir}, {"count", reclaimed}});
    }
  }
  EPS_ASSIGN_OR_RETURN(std::unique_ptr<Checkpoint> checkpoint,
                       Checkpoint::Open(options.checkpoint_dir));
  auto engine = std::make_unique<CudaEngine>(options, std::move(checkpoint), device);
  // Every size is checked now, with one rank in place of those to come.
  const Placement whole = EvenPlacement(engine->model().num_experts, 1);
  EPS_RETURN_IF_ERROR(engine->PlanMemory(whole, 0).status());
  return engine;
}

}  // namespace epserve::runtime
