#include "server/coordinator/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <algorithm>
#include <array>
#include <map>
#include <utility>

#include "absl/strings/ascii.h"

namespace epserve::coordinator {
namespace {

constexpr std::array<const char*, kNumPhaseMetrics> kPhaseNames = {
    "queue", "assign", "counts", "dispatch", "ffn", "combine", "reply"};
constexpr std::array<const char*, kNumRegionWays> kRegionWays = {"direct", "copied", "device"};
constexpr std::array<const char*, kNumOutputWays> kOutputWays = {"lent", "copied"};
constexpr std::array<const char*, kNumRefusalReasons> kRefusalReasons = {
    "max_connections", "access", "handshake", "half_messages", "worker"};
constexpr std::array<const char*, 6> kWorkerStates = {"loading", "loaded",  "forming",
                                                      "serving", "standby", "draining"};
constexpr char kOtherHandle[] = "other";
constexpr std::array<const char*, 5> kHandleTypes = {"shm", "fd", "fabric", "nccl", kOtherHandle};
// The highest status code (UNAUTHENTICATED) has the number 16.
constexpr int kNumStatusCodes = 17;

// Seconds: from a phase of one token (microseconds) to a prefill on a slow CPU (seconds).
prometheus::Histogram::BucketBoundaries TimeBuckets() {
  return {5e-6, 1e-5,   2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3,
          1e-2, 2.5e-2, 5e-2,   0.1,  0.25, 0.5,    1.0,  2.5,  10.0};
}

}  // namespace

std::string OutcomeLabel(absl::StatusCode code) {
  return absl::AsciiStrToLower(absl::StatusCodeToString(code));
}

struct Metrics::State {
  std::shared_ptr<prometheus::Registry> registry = std::make_shared<prometheus::Registry>();
  std::array<prometheus::Counter*, kNumStatusCodes> requests{};
  prometheus::Gauge* queue_depth = nullptr;
  prometheus::Counter* tokens = nullptr;
  std::array<prometheus::Counter*, kNumCountExchanges> batches{};
  std::array<prometheus::Counter*, kNumRegionWays> region_bytes{};
  std::array<prometheus::Counter*, kNumOutputWays> output_bytes{};
  std::array<prometheus::Histogram*, kNumPhaseMetrics> phases{};
  prometheus::Histogram* request_seconds = nullptr;
  std::vector<prometheus::Counter*> expert_rows;  // [E]
  prometheus::Gauge* epoch = nullptr;
  prometheus::Gauge* serving = nullptr;
  std::array<prometheus::Counter*, kNumRefusalReasons> refusals{};
  std::map<std::string, prometheus::Gauge*> workers;
  std::map<std::string, prometheus::Gauge*> heaps;
  prometheus::Gauge* batches_in_flight = nullptr;

  explicit State(std::int64_t num_experts) {
    auto& request_family = prometheus::BuildCounter()
                               .Name("epserve_requests_total")
                               .Help("Requests answered, by outcome")
                               .Register(*registry);
    for (int code = 0; code < kNumStatusCodes; ++code) {
      requests[code] =
          &request_family.Add({{"outcome", OutcomeLabel(static_cast<absl::StatusCode>(code))}});
    }
    queue_depth = &prometheus::BuildGauge()
                       .Name("epserve_queue_depth")
                       .Help("Requests waiting for a batch")
                       .Register(*registry)
                       .Add({});
    tokens = &prometheus::BuildCounter()
                  .Name("epserve_tokens_total")
                  .Help("Tokens of requests answered with a result")
                  .Register(*registry)
                  .Add({});
    auto& batch_family = prometheus::BuildCounter()
                             .Name("epserve_batches_total")
                             .Help("Batches answered, by how their count matrix was made")
                             .Register(*registry);
    for (int exchange = 0; exchange < kNumCountExchanges; ++exchange) {
      batches[exchange] = &batch_family.Add(
          {{"count_exchange", CountExchangeName(static_cast<CountExchange>(exchange))}});
    }
    auto& region_family = prometheus::BuildCounter()
                              .Name("epserve_region_bytes_total")
                              .Help(
                                  "Rows in clients' shared memory: direct, read and written there "
                                  "by the workers; copied, through the coordinator")
                              .Register(*registry);
    for (int way = 0; way < kNumRegionWays; ++way) {
      region_bytes[way] = &region_family.Add({{"way", kRegionWays[way]}});
    }
    auto& output_family = prometheus::BuildCounter()
                              .Name("epserve_output_bytes_total")
                              .Help(
                                  "Rows of outputs within replies: lent, sent from where the "
                                  "workers wrote them; copied, into the reply first")
                              .Register(*registry);
    for (int way = 0; way < kNumOutputWays; ++way) {
      output_bytes[way] = &output_family.Add({{"way", kOutputWays[way]}});
    }
    auto& phase_family = prometheus::BuildHistogram()
                             .Name("epserve_phase_seconds")
                             .Help("Duration of each phase; over the workers, the longest")
                             .Register(*registry);
    for (int phase = 0; phase < kNumPhaseMetrics; ++phase) {
      phases[phase] = &phase_family.Add({{"phase", kPhaseNames[phase]}}, TimeBuckets());
    }
    request_seconds = &prometheus::BuildHistogram()
                           .Name("epserve_request_seconds")
                           .Help("From a request's arrival to its answer, inside the coordinator")
                           .Register(*registry)
                           .Add({}, TimeBuckets());
    auto& expert_family = prometheus::BuildCounter()
                              .Name("epserve_expert_rows_total")
                              .Help("Rows that each expert took, over all layers")
                              .Register(*registry);
    for (std::int64_t expert = 0; expert < num_experts; ++expert) {
      expert_rows.push_back(&expert_family.Add({{"expert", std::to_string(expert)}}));
    }
    epoch = &prometheus::BuildGauge()
                 .Name("epserve_epoch")
                 .Help("Number of the present epoch; 0: none yet")
                 .Register(*registry)
                 .Add({});
    serving = &prometheus::BuildGauge()
                   .Name("epserve_serving")
                   .Help("1: requests are served, as health says of the service; 0: they are not")
                   .Register(*registry)
                   .Add({});
    auto& refusal_family = prometheus::BuildCounter()
                               .Name("epserve_refused_total")
                               .Help("Callers turned away before their request was looked at")
                               .Register(*registry);
    for (int reason = 0; reason < kNumRefusalReasons; ++reason) {
      refusals[reason] = &refusal_family.Add({{"reason", kRefusalReasons[reason]}});
    }
    auto& worker_family = prometheus::BuildGauge()
                              .Name("epserve_workers")
                              .Help("Workers joined, by state")
                              .Register(*registry);
    for (const char* name : kWorkerStates) workers[name] = &worker_family.Add({{"state", name}});
    auto& heap_family = prometheus::BuildGauge()
                            .Name("epserve_heaps")
                            .Help("Workers' heaps, by what their peers open them by")
                            .Register(*registry);
    for (const char* name : kHandleTypes) heaps[name] = &heap_family.Add({{"handle_type", name}});
    batches_in_flight = &prometheus::BuildGauge()
                             .Name("epserve_batches_in_flight")
                             .Help("Batches handed to the workers and not done")
                             .Register(*registry)
                             .Add({});
  }
};

Metrics::Metrics(std::int64_t num_experts) : state_(std::make_unique<State>(num_experts)) {}

Metrics::~Metrics() = default;

void Metrics::AddRequest(absl::StatusCode code, double seconds) {
  const int index = static_cast<int>(code);
  const bool known = index >= 0 && index < kNumStatusCodes;
  state_->requests[known ? index : static_cast<int>(absl::StatusCode::kUnknown)]->Increment();
  state_->request_seconds->Observe(seconds);
}

Metrics::RequestTotals Metrics::request_totals() const {
  RequestTotals totals;
  for (int code = 0; code < kNumStatusCodes; ++code) {
    const auto count = static_cast<std::uint64_t>(state_->requests[code]->Value());
    (code == static_cast<int>(absl::StatusCode::kOk) ? totals.ok : totals.failed) += count;
  }
  return totals;
}

void Metrics::AddTokens(std::int64_t num_tokens) {
  state_->tokens->Increment(static_cast<double>(num_tokens));
}

void Metrics::AddBatch(CountExchange exchange) {
  state_->batches[static_cast<std::size_t>(exchange)]->Increment();
}

void Metrics::AddRegionBytes(RegionWay way, std::int64_t bytes) {
  state_->region_bytes[static_cast<std::size_t>(way)]->Increment(static_cast<double>(bytes));
}

void Metrics::AddOutputBytes(OutputWay way, std::int64_t bytes) {
  state_->output_bytes[static_cast<std::size_t>(way)]->Increment(static_cast<double>(bytes));
}

void Metrics::ObservePhase(PhaseMetric phase, double seconds) {
  state_->phases[static_cast<std::size_t>(phase)]->Observe(std::max(seconds, 0.0));
}

void Metrics::AddExpertRows(std::int64_t expert, std::int64_t rows) {
  if (expert < 0 || expert >= static_cast<std::int64_t>(state_->expert_rows.size())) return;
  state_->expert_rows[static_cast<std::size_t>(expert)]->Increment(static_cast<double>(rows));
}

void Metrics::SetQueueDepth(std::int64_t depth) {
  state_->queue_depth->Set(static_cast<double>(depth));
}

void Metrics::SetEpoch(std::uint64_t epoch) { state_->epoch->Set(static_cast<double>(epoch)); }

void Metrics::SetServing(bool serving) { state_->serving->Set(serving ? 1 : 0); }

void Metrics::AddRefusal(RefusalReason reason) {
  state_->refusals[static_cast<std::size_t>(reason)]->Increment();
}

void Metrics::SetWorkers(const std::vector<std::pair<std::string, int>>& counts) {
  for (auto& [name, gauge] : state_->workers) {
    int count = 0;
    for (const auto& [state, number] : counts) {
      if (state == name) count += number;
    }
    gauge->Set(count);
  }
}

void Metrics::SetHeaps(const std::vector<std::string>& handle_types) {
  std::map<std::string, int> counts;
  for (const std::string& type : handle_types) {
    ++counts[state_->heaps.contains(type) ? type : kOtherHandle];
  }
  for (auto& [name, gauge] : state_->heaps) gauge->Set(counts[name]);
}

void Metrics::SetBatchesInFlight(std::int64_t batches) {
  state_->batches_in_flight->Set(static_cast<double>(batches));
}

std::string Metrics::Render() const {
  return prometheus::TextSerializer().Serialize(state_->registry->Collect());
}

}  // namespace epserve::coordinator
