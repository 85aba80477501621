#include "runtime/microbench/cuda_alltoallv.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "absl/strings/str_cat.h"
#include "runtime/base/cuda_memory.h"
#include "runtime/microbench/cuda_plain_push.h"

namespace epserve::runtime {
namespace {

using Path = CudaExchange::Path;

// Owns a stream, an event or a graph of the runtime API.
class Stream {
 public:
  absl::Status Create() {
    EPS_CUDA_RETURN_IF_ERROR(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    return absl::OkStatus();
  }
  ~Stream() {
    if (stream_ != nullptr) (void)cudaStreamDestroy(stream_);
  }
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

class EventPair {
 public:
  absl::Status Create() {
    EPS_CUDA_RETURN_IF_ERROR(cudaEventCreate(&begin_));
    EPS_CUDA_RETURN_IF_ERROR(cudaEventCreate(&end_));
    return absl::OkStatus();
  }
  ~EventPair() {
    if (begin_ != nullptr) (void)cudaEventDestroy(begin_);
    if (end_ != nullptr) (void)cudaEventDestroy(end_);
  }
  cudaEvent_t begin() const { return begin_; }
  cudaEvent_t end() const { return end_; }
  absl::StatusOr<double> ElapsedUs() const {
    float ms = 0;
    EPS_CUDA_RETURN_IF_ERROR(cudaEventElapsedTime(&ms, begin_, end_));
    return static_cast<double>(ms) * 1e3;
  }

 private:
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
};

class Graph {
 public:
  // Captures what `enqueue` puts on the stream.
  absl::Status Capture(cudaStream_t stream, const std::function<absl::Status()>& enqueue) {
    EPS_CUDA_RETURN_IF_ERROR(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    const absl::Status enqueued = enqueue();
    cudaGraph_t graph = nullptr;
    EPS_CUDA_RETURN_IF_ERROR(cudaStreamEndCapture(stream, &graph));
    const absl::Status made = enqueued.ok()
                                  ? CudaStatus(cudaGraphInstantiate(&executable_, graph, 0),
                                               "cudaGraphInstantiate", __FILE__, __LINE__)
                                  : enqueued;
    (void)cudaGraphDestroy(graph);
    return made;
  }
  ~Graph() {
    if (executable_ != nullptr) (void)cudaGraphExecDestroy(executable_);
  }
  absl::Status Launch(cudaStream_t stream) const {
    EPS_CUDA_RETURN_IF_ERROR(cudaGraphLaunch(executable_, stream));
    return absl::OkStatus();
  }

 private:
  cudaGraphExec_t executable_ = nullptr;
};

struct RankInputs {
  std::vector<float> x;  // rounded to the type
  std::vector<std::byte> packed;
  std::vector<std::int32_t> ids;
  std::vector<float> weights;
};

// K different experts a token, uniformly; every rank can make every rank's.
RankInputs MakeInputs(const CudaAlltoallvConfig& config, int rank, bool with_rows) {
  RankInputs in;
  std::mt19937 rng(config.seed * 1000 + rank);
  std::vector<std::int32_t> experts(config.experts);
  std::iota(experts.begin(), experts.end(), 0);
  std::uniform_real_distribution<float> weight(0.1f, 1.0f);
  for (std::int64_t t = 0; t < config.tokens; ++t) {
    for (int k = 0; k < config.topk; ++k) {
      std::uniform_int_distribution<std::int64_t> pick(k, config.experts - 1);
      std::swap(experts[k], experts[pick(rng)]);
      in.ids.push_back(experts[k]);
      in.weights.push_back(weight(rng) / static_cast<float>(config.topk));
    }
  }
  if (!with_rows) return in;
  const std::size_t count = config.tokens * config.exchange.base.hidden;
  std::vector<float> raw(count);
  std::uniform_real_distribution<float> value(-1.0f, 1.0f);
  for (float& v : raw) v = value(rng);
  in.packed.resize(count * DataTypeBytes(config.dtype));
  in.x.resize(count);
  ConvertFromFloat(config.dtype, raw.data(), in.packed.data(), count);
  ConvertToFloat(config.dtype, in.packed.data(), in.x.data(), count);
  return in;
}

template <typename T>
absl::StatusOr<DeviceBuffer> Upload(const std::vector<T>& host) {
  EPS_ASSIGN_OR_RETURN(DeviceBuffer buffer, DeviceBuffer::Create(host.size() * sizeof(T)));
  EPS_CUDA_RETURN_IF_ERROR(
      cudaMemcpy(buffer.as<T>(), host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return buffer;
}

// One rank's buffers and the phases that are timed.
class RankBench {
 public:
  explicit RankBench(const CudaAlltoallvConfig& config) : config_(config) {}

  absl::StatusOr<CudaAlltoallvTimes> Run(const std::function<absl::Status()>& meet) {
    EPS_RETURN_IF_ERROR(Prepare(meet));
    CudaAlltoallvTimes times;
    times.dispatch_remote_bytes = RemoteBytes(true);
    times.combine_remote_bytes = RemoteBytes(false);
    if (config_.path == Path::kPrefill) {
      EPS_RETURN_IF_ERROR(TimePrefill(&times));
    } else {
      EPS_RETURN_IF_ERROR(TimeDecode(&times));
    }
    EPS_RETURN_IF_ERROR(meet());
    EPS_ASSIGN_OR_RETURN(times.relative_error, RelativeError());
    EPS_RETURN_IF_ERROR(meet());  // Nobody unmaps while a peer may still write.
    return times;
  }

 private:
  absl::Status Prepare(const std::function<absl::Status()>& meet) {
    const ExchangeConfig& base = config_.exchange.base;
    EPS_RETURN_IF_ERROR(stream_.Create());
    EPS_RETURN_IF_ERROR(events_.Create());
    EPS_ASSIGN_OR_RETURN(exchange_, CudaExchange::Create(config_.exchange));
    EPS_RETURN_IF_ERROR(exchange_->OpenPeers(absl::Seconds(60)));
    EPS_RETURN_IF_ERROR(meet());
    exchange_->Seal();
    counts_.num_ranks = base.num_ranks;
    counts_.rows.assign(base.num_ranks * base.num_ranks, 0);
    counts_.rows_per_expert.assign(config_.experts, 0);
    for (int r = 0; r < base.num_ranks; ++r) {
      const RankInputs in = MakeInputs(config_, r, r == base.rank);
      CountShard(in.ids, config_.topk, base.placement,
                 std::span(counts_.rows).subspan(r * base.num_ranks, base.num_ranks),
                 counts_.rows_per_expert);
      if (r == base.rank) inputs_ = in;
    }
    EPS_ASSIGN_OR_RETURN(x_, Upload(inputs_.packed));
    EPS_ASSIGN_OR_RETURN(ids_, Upload(inputs_.ids));
    EPS_ASSIGN_OR_RETURN(weights_, Upload(inputs_.weights));
    EPS_ASSIGN_OR_RETURN(out_, DeviceBuffer::Create(inputs_.packed.size()));
    std::int64_t pairs = 0;
    for (std::int64_t e = base.placement.first_expert[base.rank];
         e < base.placement.first_expert[base.rank + 1]; ++e) {
      pairs += counts_.rows_per_expert[e];
    }
    EPS_ASSIGN_OR_RETURN(expert_rows_,
                         DeviceBuffer::Create(pairs * base.hidden * DataTypeBytes(config_.dtype)));
    tokens_ = {x_.as<void>(), ids_.as<std::int32_t>(), weights_.as<float>(), config_.tokens,
               config_.topk,  config_.dtype,           config_.payload};
    return PreparePush();
  }

  // The plain push writes into memory of its own: the heaps' row areas hold the batches.
  absl::Status PreparePush() {
    const ExchangeConfig& base = config_.exchange.base;
    CudaExchangeConfig plain = config_.exchange;
    plain.base.cluster_id = absl::StrCat(base.cluster_id, "-plain");
    EPS_ASSIGN_OR_RETURN(plain_, CudaExchange::Create(plain));
    EPS_RETURN_IF_ERROR(plain_->OpenPeers(absl::Seconds(60)));
    return absl::OkStatus();
  }

  std::int64_t RemoteRows() const {
    const ExchangeConfig& base = config_.exchange.base;
    std::int64_t rows = 0;
    for (int r = 0; r < base.num_ranks; ++r) rows += r == base.rank ? 0 : counts_.at(base.rank, r);
    return rows;
  }

  std::int64_t RowBytes(bool dispatch) const {
    const std::int64_t hidden = config_.exchange.base.hidden;
    if (dispatch && config_.payload == RowPayload::kFp8) {
      return hidden + hidden / kFp8GroupElements * 4;
    }
    return hidden * static_cast<std::int64_t>(DataTypeBytes(config_.dtype));
  }

  std::int64_t RemoteBytes(bool dispatch) const {
    const ExchangeConfig& base = config_.exchange.base;
    if (dispatch) return RemoteRows() * RowBytes(true);
    std::int64_t rows = 0;  // A rank sends back what it received.
    for (int r = 0; r < base.num_ranks; ++r) rows += r == base.rank ? 0 : counts_.at(r, base.rank);
    return rows * RowBytes(false);
  }

  absl::Status EnqueuePush(bool dispatch) {
    const ExchangeConfig& base = config_.exchange.base;
    PlainPushArgs args{};
    args.source = x_.as<void>();
    args.rank = base.rank;
    args.num_ranks = base.num_ranks;
    const std::int64_t longest = config_.tokens * RowBytes(false) / 16;
    for (int r = 0; r < base.num_ranks; ++r) {
      args.destination[r] = plain_->PeerRows(r);
      const std::int64_t rows = dispatch ? counts_.at(base.rank, r) : counts_.at(r, base.rank);
      args.vectors[r] = r == base.rank ? 0 : std::min(rows * RowBytes(dispatch) / 16, longest);
    }
    return LaunchPlainPush(args, 132, stream_.get());
  }

  absl::StatusOr<double> Time(const std::function<absl::Status()>& enqueue) {
    EPS_RETURN_IF_ERROR(exchange_->Barrier(stream_.get()));
    EPS_CUDA_RETURN_IF_ERROR(cudaEventRecord(events_.begin(), stream_.get()));
    EPS_RETURN_IF_ERROR(enqueue());
    EPS_CUDA_RETURN_IF_ERROR(cudaEventRecord(events_.end(), stream_.get()));
    EPS_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(stream_.get()));
    EPS_RETURN_IF_ERROR(exchange_->CheckWaits());
    return events_.ElapsedUs();
  }

  absl::Status EnqueueDispatch() {
    return exchange_->Dispatch(config_.path, 0, tokens_, &counts_, stream_.get());
  }
  absl::Status EnqueueExperts() {
    EPS_RETURN_IF_ERROR(exchange_->LayOutExperts(config_.path, 0, stream_.get()));
    return exchange_->Gather(config_.path, 0, tokens_, expert_rows_.as<void>(), stream_.get());
  }
  absl::Status EnqueueCombine() {
    return exchange_->Combine(config_.path, 0, tokens_, expert_rows_.as<void>(), out_.as<void>(),
                              stream_.get());
  }

  absl::Status TimePrefill(CudaAlltoallvTimes* times) {
    for (int i = -config_.warmup; i < config_.iterations; ++i) {
      EPS_ASSIGN_OR_RETURN(const double dispatch, Time([this] { return EnqueueDispatch(); }));
      EPS_RETURN_IF_ERROR(EnqueueExperts());
      EPS_ASSIGN_OR_RETURN(const double combine, Time([this] { return EnqueueCombine(); }));
      EPS_ASSIGN_OR_RETURN(const double dispatch_copy, Time([this] { return EnqueuePush(true); }));
      EPS_ASSIGN_OR_RETURN(const double combine_copy, Time([this] { return EnqueuePush(false); }));
      if (i < 0) continue;
      times->dispatch_us.push_back(dispatch);
      times->combine_us.push_back(combine);
      times->dispatch_copy_us.push_back(dispatch_copy);
      times->combine_copy_us.push_back(combine_copy);
    }
    return absl::OkStatus();
  }

  // Graphs of a barrier, the work between two events, and the rest: nothing of the host in between.
  absl::Status TimeDecode(CudaAlltoallvTimes* times) {
    EventPair dispatch, combine;
    EPS_RETURN_IF_ERROR(dispatch.Create());
    EPS_RETURN_IF_ERROR(combine.Create());
    Graph split, whole;
    const auto record = [this](cudaEvent_t event) {
      return CudaStatus(cudaEventRecordWithFlags(event, stream_.get(), cudaEventRecordExternal),
                        "cudaEventRecordWithFlags", __FILE__, __LINE__);
    };
    EPS_RETURN_IF_ERROR(split.Capture(stream_.get(), [&]() -> absl::Status {
      EPS_RETURN_IF_ERROR(exchange_->Barrier(stream_.get()));
      EPS_RETURN_IF_ERROR(record(dispatch.begin()));
      EPS_RETURN_IF_ERROR(EnqueueDispatch());
      EPS_RETURN_IF_ERROR(record(dispatch.end()));
      EPS_RETURN_IF_ERROR(EnqueueExperts());
      EPS_RETURN_IF_ERROR(exchange_->Barrier(stream_.get()));
      EPS_RETURN_IF_ERROR(record(combine.begin()));
      EPS_RETURN_IF_ERROR(EnqueueCombine());
      return record(combine.end());
    }));
    EPS_RETURN_IF_ERROR(whole.Capture(stream_.get(), [&]() -> absl::Status {
      EPS_RETURN_IF_ERROR(exchange_->Barrier(stream_.get()));
      EPS_RETURN_IF_ERROR(record(dispatch.begin()));
      EPS_RETURN_IF_ERROR(EnqueueDispatch());
      EPS_RETURN_IF_ERROR(EnqueueCombine());
      return record(dispatch.end());
    }));
    for (int i = -config_.warmup; i < config_.iterations; ++i) {
      EPS_RETURN_IF_ERROR(split.Launch(stream_.get()));
      EPS_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(stream_.get()));
      EPS_RETURN_IF_ERROR(exchange_->CheckWaits());
      EPS_ASSIGN_OR_RETURN(const double dispatch_us, dispatch.ElapsedUs());
      EPS_ASSIGN_OR_RETURN(const double combine_us, combine.ElapsedUs());
      EPS_RETURN_IF_ERROR(whole.Launch(stream_.get()));
      EPS_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(stream_.get()));
      EPS_RETURN_IF_ERROR(exchange_->CheckWaits());
      EPS_ASSIGN_OR_RETURN(const double pair_us, dispatch.ElapsedUs());
      EPS_ASSIGN_OR_RETURN(const double dispatch_copy, Time([this] { return EnqueuePush(true); }));
      EPS_ASSIGN_OR_RETURN(const double combine_copy, Time([this] { return EnqueuePush(false); }));
      if (i < 0) continue;
      times->dispatch_us.push_back(dispatch_us);
      times->combine_us.push_back(combine_us);
      times->pair_us.push_back(pair_us);
      times->dispatch_copy_us.push_back(dispatch_copy);
      times->combine_copy_us.push_back(combine_copy);
    }
    return absl::OkStatus();
  }

  // The experts are the identity here: a token comes back times the sum of its weights.
  absl::StatusOr<double> RelativeError() {
    std::vector<std::byte> packed(inputs_.packed.size());
    EPS_CUDA_RETURN_IF_ERROR(
        cudaMemcpy(packed.data(), out_.as<void>(), packed.size(), cudaMemcpyDeviceToHost));
    const std::int64_t hidden = config_.exchange.base.hidden;
    std::vector<float> got(inputs_.x.size());
    ConvertToFloat(config_.dtype, packed.data(), got.data(), got.size());
    double difference = 0, norm = 0;
    for (std::int64_t t = 0; t < config_.tokens; ++t) {
      double sum = 0;
      for (int k = 0; k < config_.topk; ++k) sum += inputs_.weights[t * config_.topk + k];
      for (std::int64_t h = 0; h < hidden; ++h) {
        const double want = sum * inputs_.x[t * hidden + h];
        const double off = got[t * hidden + h] - want;
        difference += off * off;
        norm += want * want;
      }
    }
    return norm == 0 ? 0.0 : std::sqrt(difference / norm);
  }

  CudaAlltoallvConfig config_;
  Stream stream_;
  EventPair events_;
  std::unique_ptr<CudaExchange> exchange_;
  std::unique_ptr<CudaExchange> plain_;
  CountMatrix counts_;
  RankInputs inputs_;
  DeviceBuffer x_, ids_, weights_, out_, expert_rows_;
  CudaTokens tokens_;
};

}  // namespace

absl::StatusOr<CudaAlltoallvTimes> RunCudaAlltoallvRank(const CudaAlltoallvConfig& config,
                                                        const std::function<absl::Status()>& meet) {
  RankBench bench(config);
  return bench.Run(meet);
}

}  // namespace epserve::runtime
