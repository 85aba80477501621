#include "runtime/microbench/rank_run.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "runtime/alltoallv/host_exchange.h"
#include "runtime/base/status.h"
#include "runtime/microbench/workload.h"
#ifdef EPSERVE_WITH_CUDA
#include "runtime/microbench/cuda_rank_run.h"
#endif

namespace epserve::runtime {
namespace {

constexpr int kSlot = 0;

std::int64_t NowNs() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

class HostBenchRank {
 public:
  HostBenchRank(const Coordination& coordination, int rank)
      : coordination_(coordination),
        params_(coordination.params()),
        rank_(rank),
        config_(BenchExchangeConfig(params_, rank)),
        counts_(CountAll(params_, config_.placement)),
        workload_(MakeWorkload(params_, rank)),
        out_(workload_.x.size()) {}

  absl::Status Run() {
    EPS_RETURN_IF_ERROR(OpenHeaps());
    RankEntry& entry = coordination_.rank(rank_);
    const std::uint64_t row_bytes = params_.hidden * DataTypeBytes(params_.dtype);
    entry.dispatch_bytes = (counts_.NumSent(rank_) - counts_.at(rank_, rank_)) * row_bytes;
    entry.combine_bytes = (counts_.NumReceived(rank_) - counts_.at(rank_, rank_)) * row_bytes;
    entry.heap_bytes = exchange_->heap_bytes();
    for (int i = -params_.warmup; i < params_.iterations; ++i) {
      // The first and the last are verified, so that a wrong warm-up or drift would show.
      EPS_RETURN_IF_ERROR(Iterate(i, i == -params_.warmup || i == params_.iterations - 1));
    }
    return coordination_.Barrier(&barriers_);  // Nobody unmaps while another still reads.
  }

 private:
  absl::Status OpenHeaps() {
    EPS_ASSIGN_OR_RETURN(exchange_, HostExchange::Create(config_));
    RankEntry& entry = coordination_.rank(rank_);
    const std::string& handle = exchange_->handle();
    if (handle.size() > sizeof(entry.handle)) {
      return absl::InternalError(absl::StrCat("control block: a handle of ", handle.size(),
                                              " bytes exceeds ", sizeof(entry.handle)));
    }
    std::memcpy(entry.handle, handle.data(), handle.size());
    entry.handle_bytes = static_cast<std::uint32_t>(handle.size());
    EPS_RETURN_IF_ERROR(coordination_.Barrier(&barriers_));
    std::vector<std::string> handles;
    for (int rank = 0; rank < params_.num_ranks; ++rank) {
      const RankEntry& peer = coordination_.rank(rank);
      handles.emplace_back(peer.handle, peer.handle_bytes);
    }
    EPS_RETURN_IF_ERROR(exchange_->OpenPeers(handles));
    EPS_RETURN_IF_ERROR(coordination_.Barrier(&barriers_));
    exchange_->Seal();
    return absl::OkStatus();
  }

  // The barrier before takes the skew between ranks out of the phase; the one after keeps those who
  // are done from taking the cores from those who are not, where there are more ranks than cores.
  template <typename Function>
  absl::Status Timed(Phase phase, int iteration, Function function) {
    EPS_RETURN_IF_ERROR(coordination_.Barrier(&barriers_));
    TimeSpan span;
    span.begin_ns = NowNs();
    EPS_RETURN_IF_ERROR(function());
    span.end_ns = NowNs();
    if (iteration >= 0) coordination_.span(phase, iteration, rank_) = span;
    return coordination_.Barrier(&barriers_);
  }

  // The same bytes to the same memory, one plain memcpy for each peer.
  absl::Status CopyPlainly() {
    const std::uint64_t row_bytes = params_.hidden * DataTypeBytes(params_.dtype);
    for (int step = 1; step < params_.num_ranks; ++step) {
      const int peer = (rank_ + step) % params_.num_ranks;
      const std::span<std::byte> region = exchange_->ReceiveRegion(peer, kSlot);
      std::memcpy(region.data() + counts_.ReceiveOffset(rank_, peer) * row_bytes,
                  workload_.x.data(), counts_.at(rank_, peer) * row_bytes);
    }
    return absl::OkStatus();
  }

  absl::Status Iterate(int iteration, bool verify) {
    EPS_RETURN_IF_ERROR(Timed(Phase::kCopy, iteration, [this] { return CopyPlainly(); }));
    DispatchArgs args;
    args.slot = kSlot;
    args.sequence = ++sequence_;
    args.dtype = params_.dtype;
    args.x = workload_.x.data();
    args.topk_ids = workload_.topk_ids.data();
    args.topk_weights = workload_.topk_weights.data();
    args.num_tokens = params_.tokens_per_rank;
    args.topk = params_.topk;
    args.counts = &counts_;
    EPS_RETURN_IF_ERROR(
        Timed(Phase::kDispatch, iteration, [&] { return exchange_->Dispatch(args); }));
    RunStandInExperts(params_, config_.placement.first_expert[rank_], exchange_->Received(kSlot));
    if (verify) std::fill(out_.begin(), out_.end(), std::byte{0xff});  // NaN in every type.
    EPS_RETURN_IF_ERROR(Timed(Phase::kCombine, iteration,
                              [this] { return exchange_->Combine(kSlot, out_.data()); }));
    return verify ? Verify() : absl::OkStatus();
  }

  absl::Status Verify() {
    const double error = MaxRelativeError(params_, workload_, out_);
    RankEntry& entry = coordination_.rank(rank_);
    entry.verified_tokens += params_.tokens_per_rank;
    entry.max_relative_error = std::max(entry.max_relative_error, error);
    if (error <= ErrorLimit(params_.dtype)) return absl::OkStatus();
    return absl::InternalError(absl::StrCat("verify: a token's relative error ", error, " exceeds ",
                                            ErrorLimit(params_.dtype)));
  }

  const Coordination& coordination_;
  const BenchParams params_;
  const int rank_;
  const ExchangeConfig config_;
  const CountMatrix counts_;
  const Workload workload_;
  std::vector<std::byte> out_;
  std::unique_ptr<HostExchange> exchange_;
  std::uint64_t barriers_ = 0;
  std::uint64_t sequence_ = 0;
};

absl::Status RunBackendRank(const Coordination& coordination, int rank) {
  switch (coordination.params().backend) {
    case BenchBackend::kHost:
      return HostBenchRank(coordination, rank).Run();
    case BenchBackend::kCuda:
    case BenchBackend::kNccl:
#ifdef EPSERVE_WITH_CUDA
      return RunCudaBenchRank(coordination, rank);
#else
      return absl::UnimplementedError("no device backend is in this build");
#endif
  }
  return absl::InternalError("unknown backend");
}

}  // namespace

ExchangeConfig BenchExchangeConfig(const BenchParams& params, int rank) {
  ExchangeConfig config;
  config.cluster_id = absl::StrCat("microbench-", params.owner_pid);
  config.epoch = 1;
  config.rank = rank;
  config.num_ranks = params.num_ranks;
  config.max_batch_tokens = params.tokens_per_rank * params.num_ranks;
  config.hidden = params.hidden;
  config.max_topk = params.topk;
  config.num_slots = 1;
  config.placement = EvenPlacement(params.num_experts, params.num_ranks);
  config.peer_timeout = absl::Milliseconds(params.peer_timeout_ms);
  return config;
}

absl::Status RunBenchRank(const Coordination& coordination, int rank) {
  if (rank < 0 || rank >= coordination.params().num_ranks) {
    return absl::InvalidArgumentError(
        absl::StrCat("rank ", rank, " is outside [0, ", coordination.params().num_ranks, ")"));
  }
  const absl::Status status = RunBackendRank(coordination, rank);
  if (!status.ok()) {
    RankEntry& entry = coordination.rank(rank);
    const std::string text = status.ToString();
    std::memcpy(entry.error, text.data(), std::min(text.size(), sizeof(entry.error) - 1));
  }
  return status;
}

}  // namespace epserve::runtime
