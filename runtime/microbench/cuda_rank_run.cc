#include "runtime/microbench/cuda_rank_run.h"

#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "runtime/alltoallv/cuda_exchange.h"
#ifdef EPSERVE_WITH_NCCL
#include "runtime/alltoallv/nccl_exchange.h"
#endif
#include "runtime/base/cuda_memory.h"
#include "runtime/microbench/cuda_bench_kernels.h"
#include "runtime/microbench/cuda_handles.h"
#include "runtime/microbench/rank_run.h"
#include "runtime/microbench/workload.h"

namespace epserve::runtime {
namespace {

using Path = DeviceExchange::Path;

// Blocks of the plain push: all multiprocessors of an H200, which carried most of 8 to 132 tried.
constexpr int kPushBlocks = 132;

template <typename T>
absl::StatusOr<DeviceBuffer> Upload(const std::vector<T>& host) {
  EPS_ASSIGN_OR_RETURN(DeviceBuffer buffer, DeviceBuffer::Create(host.size() * sizeof(T)));
  EPS_CUDA_RETURN_IF_ERROR(
      cudaMemcpy(buffer.as<T>(), host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return buffer;
}

class CudaBenchRank {
 public:
  CudaBenchRank(const Coordination& coordination, int rank)
      : coordination_(coordination),
        params_(coordination.params()),
        rank_(rank),
        path_(params_.decode ? Path::kDecode : Path::kPrefill),
        config_(MakeConfig()),
        counts_(CountAll(params_, config_.base.placement)),
        workload_(MakeWorkload(params_, rank)) {}

  absl::Status Run() {
    EPS_RETURN_IF_ERROR(Open());
    EPS_RETURN_IF_ERROR(Allocate());
    RankEntry& entry = coordination_.rank(rank_);
    entry.dispatch_bytes = RemoteBytes(/*dispatch=*/true);
    entry.combine_bytes = RemoteBytes(/*dispatch=*/false);
    entry.heap_bytes = static_cast<std::uint64_t>(heap_bytes_);
    EPS_RETURN_IF_ERROR(coordination_.Barrier(&barriers_));
    EPS_RETURN_IF_ERROR(params_.decode ? TimeDecode() : TimePrefill());
    return coordination_.Barrier(&barriers_);  // Nobody unmaps while another still writes.
  }

 private:
  CudaExchangeConfig MakeConfig() const {
    CudaExchangeConfig config;
    config.base = BenchExchangeConfig(params_, rank_);
    config.max_decode_tokens = params_.decode ? params_.tokens_per_rank : 1;
    config.max_element_bytes = static_cast<int>(DataTypeBytes(params_.dtype));
    config.comm_blocks = params_.comm_blocks;
    config.push_blocks = params_.push_blocks;
    config.line_tokens = params_.decode ? params_.line_tokens : 0;
    config.reduce_blocks = params_.reduce_blocks;
    return config;
  }

  absl::Status Open() {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
      (void)cudaGetLastError();
      return absl::UnavailableError(
          "alltoallv: the cuda and nccl backends need a GPU, and this machine has none");
    }
    EPS_CUDA_RETURN_IF_ERROR(cudaSetDevice(rank_ % devices));
    EPS_RETURN_IF_ERROR(stream_.Create());
    EPS_ASSIGN_OR_RETURN(exchange_, CreateExchange());
    // The plain push writes into a heap of its own: the exchange's holds batches. The barriers
    // between phases are its too.
    CudaExchangeConfig plain = config_;
    absl::StrAppend(&plain.base.cluster_id, "-plain");
    plain.line_tokens = 0;
    EPS_ASSIGN_OR_RETURN(plain_, CudaExchange::Create(plain));
    EPS_RETURN_IF_ERROR(OpenPeers(*exchange_));
    return OpenPeers(*plain_);
  }

  absl::StatusOr<std::unique_ptr<DeviceExchange>> CreateExchange() {
    if (params_.backend == BenchBackend::kCuda) {
      heap_bytes_ = CudaExchange::HeapBytes(config_);
      return CudaExchange::Create(config_);
    }
#ifdef EPSERVE_WITH_NCCL
    NcclExchangeConfig config;
    config.base = config_.base;
    config.max_decode_tokens = params_.decode ? params_.tokens_per_rank : 0;
    config.max_element_bytes = config_.max_element_bytes;
    config.comm_blocks = params_.comm_blocks;
    heap_bytes_ = NcclExchange::DeviceBytes(config);
    return NcclExchange::Create(config);
#else
    return absl::UnimplementedError("the nccl backend is not in this build");
#endif
  }

  // All ranks at once: every rank writes its handle, then reads the others'.
  absl::Status OpenPeers(DeviceExchange& exchange) {
    RankEntry& entry = coordination_.rank(rank_);
    const std::string& handle = exchange.handle();
    if (handle.size() > sizeof(entry.handle)) {
      return absl::InternalError(absl::StrCat("microbench: a handle of ", handle.size(),
                                              " bytes exceeds ", sizeof(entry.handle)));
    }
    std::copy(handle.begin(), handle.end(), entry.handle);
    entry.handle_bytes = static_cast<std::uint32_t>(handle.size());
    EPS_RETURN_IF_ERROR(coordination_.Barrier(&barriers_));
    std::vector<std::string> handles;
    for (int rank = 0; rank < params_.num_ranks; ++rank) {
      const RankEntry& other = coordination_.rank(rank);
      handles.emplace_back(other.handle, other.handle_bytes);
    }
    EPS_RETURN_IF_ERROR(exchange.OpenPeers(handles, config_.base.peer_timeout));
    EPS_RETURN_IF_ERROR(coordination_.Barrier(&barriers_));
    exchange.Seal();
    return absl::OkStatus();
  }

  absl::Status Allocate() {
    EPS_ASSIGN_OR_RETURN(x_, Upload(workload_.x));
    EPS_ASSIGN_OR_RETURN(ids_, Upload(workload_.topk_ids));
    EPS_ASSIGN_OR_RETURN(weights_, Upload(workload_.topk_weights));
    EPS_ASSIGN_OR_RETURN(out_, DeviceBuffer::Create(workload_.x.size()));
    const Placement& placement = config_.base.placement;
    std::int64_t pairs = 0;
    for (std::int64_t e = placement.first_expert[rank_]; e < placement.first_expert[rank_ + 1];
         ++e) {
      pairs += counts_.rows_per_expert[e];
    }
    EPS_ASSIGN_OR_RETURN(
        expert_rows_, DeviceBuffer::Create(pairs * params_.hidden * DataTypeBytes(params_.dtype)));
    tokens_ = {x_.as<void>(),
               ids_.as<std::int32_t>(),
               weights_.as<float>(),
               params_.tokens_per_rank,
               params_.topk,
               params_.dtype,
               params_.fp8 ? RowPayload::kFp8 : RowPayload::kCopy};
    return absl::OkStatus();
  }

  std::int64_t RowBytes(bool dispatch) const {
    if (dispatch && params_.fp8) return params_.hidden + params_.hidden / kFp8GroupElements * 4;
    return params_.hidden * static_cast<std::int64_t>(DataTypeBytes(params_.dtype));
  }

  // Dispatch sends this rank's rows; combine sends back what it has received.
  std::int64_t RowsTo(int peer, bool dispatch) const {
    if (peer == rank_) return 0;
    return dispatch ? counts_.at(rank_, peer) : counts_.at(peer, rank_);
  }

  std::uint64_t RemoteBytes(bool dispatch) const {
    std::int64_t rows = 0;
    for (int peer = 0; peer < params_.num_ranks; ++peer) rows += RowsTo(peer, dispatch);
    return static_cast<std::uint64_t>(rows * RowBytes(dispatch));
  }

  absl::Status EnqueueDispatch() {
    return exchange_->Dispatch(path_, 0, tokens_, &counts_, stream_.get());
  }

  absl::Status EnqueueExperts() {
    EPS_RETURN_IF_ERROR(exchange_->LayOutExperts(path_, 0, stream_.get()));
    EPS_RETURN_IF_ERROR(
        exchange_->Gather(path_, 0, tokens_, expert_rows_.as<void>(), stream_.get()));
    const Placement& placement = config_.base.placement;
    return LaunchStandInExperts(
        {expert_rows_.as<void>(), exchange_->expert_offset(path_, 0),
         static_cast<int>(placement.num_local_experts(rank_)), placement.first_expert[rank_],
         params_.num_experts, params_.hidden, params_.dtype},
        stream_.get());
  }

  absl::Status EnqueueCombine() {
    return exchange_->Combine(path_, 0, tokens_, expert_rows_.as<void>(), out_.as<void>(),
                              stream_.get());
  }

  absl::Status EnqueuePush(bool dispatch) {
    PlainPushArgs args{};
    args.source = x_.as<void>();
    args.rank = rank_;
    args.num_ranks = params_.num_ranks;
    for (int peer = 0; peer < params_.num_ranks; ++peer) {
      args.destination[peer] = plain_->PeerRows(peer);
      args.vectors[peer] = RowsTo(peer, dispatch) * RowBytes(dispatch) / 16;
    }
    return LaunchPlainPush(args, kPushBlocks, stream_.get());
  }

  absl::Status Settle() {
    EPS_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(stream_.get()));
    EPS_RETURN_IF_ERROR(plain_->CheckWaits());
    return exchange_->CheckWaits();
  }

  // A duration, as a span from 0: the GPUs' clocks are not one.
  absl::Status Keep(Phase phase, int iteration, const EventPair& events) {
    EPS_ASSIGN_OR_RETURN(const double us, events.ElapsedUs());
    if (iteration >= 0) {
      coordination_.span(phase, iteration, rank_) = {0, static_cast<std::int64_t>(us * 1e3)};
    }
    return absl::OkStatus();
  }

  absl::Status Timed(Phase phase, int iteration, const std::function<absl::Status()>& enqueue) {
    EPS_RETURN_IF_ERROR(plain_->Barrier(stream_.get()));
    EPS_RETURN_IF_ERROR(events_.RecordBegin(stream_.get()));
    EPS_RETURN_IF_ERROR(enqueue());
    EPS_RETURN_IF_ERROR(events_.RecordEnd(stream_.get()));
    EPS_RETURN_IF_ERROR(Settle());
    return Keep(phase, iteration, events_);
  }

  absl::Status TimePushes(int iteration) {
    EPS_RETURN_IF_ERROR(Timed(Phase::kCopy, iteration, [this] { return EnqueuePush(true); }));
    return Timed(Phase::kCombineCopy, iteration, [this] { return EnqueuePush(false); });
  }

  absl::Status TimePrefill() {
    EPS_RETURN_IF_ERROR(events_.Create());
    for (int i = -params_.warmup; i < params_.iterations; ++i) {
      EPS_RETURN_IF_ERROR(TimePushes(i));
      EPS_RETURN_IF_ERROR(Timed(Phase::kDispatch, i, [this] { return EnqueueDispatch(); }));
      EPS_RETURN_IF_ERROR(EnqueueExperts());
      EPS_RETURN_IF_ERROR(PoisonOutput());
      EPS_RETURN_IF_ERROR(Timed(Phase::kCombine, i, [this] { return EnqueueCombine(); }));
      if (i == -params_.warmup || i == params_.iterations - 1) EPS_RETURN_IF_ERROR(Verify());
    }
    return absl::OkStatus();
  }

  // Two graphs, replayed: one that times the phases apart, one that times both back to back.
  absl::Status TimeDecode() {
    EPS_RETURN_IF_ERROR(events_.Create());
    EventPair dispatch, combine, pair;
    EPS_RETURN_IF_ERROR(dispatch.Create());
    EPS_RETURN_IF_ERROR(combine.Create());
    EPS_RETURN_IF_ERROR(pair.Create());
    Graph apart, together;
    EPS_RETURN_IF_ERROR(apart.Capture(stream_.get(), [&]() -> absl::Status {
      EPS_RETURN_IF_ERROR(plain_->Barrier(stream_.get()));
      EPS_RETURN_IF_ERROR(dispatch.RecordBegin(stream_.get()));
      EPS_RETURN_IF_ERROR(EnqueueDispatch());
      EPS_RETURN_IF_ERROR(dispatch.RecordEnd(stream_.get()));
      EPS_RETURN_IF_ERROR(EnqueueExperts());
      EPS_RETURN_IF_ERROR(PoisonOutput());
      EPS_RETURN_IF_ERROR(plain_->Barrier(stream_.get()));
      EPS_RETURN_IF_ERROR(combine.RecordBegin(stream_.get()));
      EPS_RETURN_IF_ERROR(EnqueueCombine());
      return combine.RecordEnd(stream_.get());
    }));
    EPS_RETURN_IF_ERROR(together.Capture(stream_.get(), [&]() -> absl::Status {
      EPS_RETURN_IF_ERROR(plain_->Barrier(stream_.get()));
      EPS_RETURN_IF_ERROR(pair.RecordBegin(stream_.get()));
      EPS_RETURN_IF_ERROR(EnqueueDispatch());
      EPS_RETURN_IF_ERROR(EnqueueCombine());
      return pair.RecordEnd(stream_.get());
    }));
    for (int i = -params_.warmup; i < params_.iterations; ++i) {
      EPS_RETURN_IF_ERROR(TimePushes(i));
      EPS_RETURN_IF_ERROR(together.Launch(stream_.get()));
      EPS_RETURN_IF_ERROR(Settle());
      EPS_RETURN_IF_ERROR(Keep(Phase::kPair, i, pair));
      EPS_RETURN_IF_ERROR(apart.Launch(stream_.get()));
      EPS_RETURN_IF_ERROR(Settle());
      EPS_RETURN_IF_ERROR(Keep(Phase::kDispatch, i, dispatch));
      EPS_RETURN_IF_ERROR(Keep(Phase::kCombine, i, combine));
      if (i == -params_.warmup || i == params_.iterations - 1) EPS_RETURN_IF_ERROR(Verify());
    }
    return absl::OkStatus();
  }

  absl::Status PoisonOutput() {
    EPS_CUDA_RETURN_IF_ERROR(
        cudaMemsetAsync(out_.as<void>(), 0xff, workload_.x.size(), stream_.get()));
    return absl::OkStatus();
  }

  absl::Status Verify() {
    std::vector<std::byte> out(workload_.x.size());
    EPS_CUDA_RETURN_IF_ERROR(
        cudaMemcpy(out.data(), out_.as<void>(), out.size(), cudaMemcpyDeviceToHost));
    const double error = MaxRelativeError(params_, workload_, out);
    const double limit = params_.fp8 ? kFp8ErrorLimit : ErrorLimit(params_.dtype);
    RankEntry& entry = coordination_.rank(rank_);
    entry.verified_tokens += params_.tokens_per_rank;
    entry.max_relative_error = std::max(entry.max_relative_error, error);
    if (error <= limit) return absl::OkStatus();
    return absl::InternalError(
        absl::StrCat("verify: a token's relative error ", error, " exceeds ", limit));
  }

  static constexpr double kFp8ErrorLimit = 4e-2;  // e4m3 has three bits of mantissa.

  const Coordination& coordination_;
  const BenchParams params_;
  const int rank_;
  const Path path_;
  const CudaExchangeConfig config_;
  const CountMatrix counts_;
  const Workload workload_;
  Stream stream_;
  EventPair events_;
  std::unique_ptr<DeviceExchange> exchange_;
  std::unique_ptr<CudaExchange> plain_;
  DeviceBuffer x_, ids_, weights_, out_, expert_rows_;
  CudaTokens tokens_;
  std::int64_t heap_bytes_ = 0;  // of exchange_
  std::uint64_t barriers_ = 0;
};

}  // namespace

absl::Status RunCudaBenchRank(const Coordination& coordination, int rank) {
  return CudaBenchRank(coordination, rank).Run();
}

}  // namespace epserve::runtime
