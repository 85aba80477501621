#include "client/command/bench.h"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/command/bench_region.h"
#include "client/command/bench_report.h"
#include "client/command/bench_trace.h"
#include "client/command/format.h"
#include "client/command/interruption.h"
#include "client/command/load_generator.h"
#include "client/command/progress.h"
#include "client/command/random_batch.h"
#include "client/command/spare_cores.h"
#include "client/cpp/admin_client.h"
#include "client/cpp/client.h"
#include "client/cpp/status.h"
#include "nlohmann/json.hpp"

namespace epserve::client {

namespace {

// Enough that the service does not see one batch over and over, few enough to make at once.
constexpr int kInputs = 16;
// Of requests in shared memory fewer are made where they are large, but for two.
constexpr std::int64_t kSharedBytes = std::int64_t{512} << 20;

int NumInputs(const BenchOptions& options, std::int64_t hidden) {
  if (options.memory == BenchMemory::kMessages) return kInputs;
  const auto element = static_cast<std::int64_t>(ElementSize(RowType(options.dtype)));
  const std::int64_t bytes = 2 * options.tokens * hidden * element;
  const auto fitting = static_cast<int>(
      std::clamp<std::int64_t>(kSharedBytes / std::max<std::int64_t>(bytes, 1), 2, kInputs));
  // Each has a region of its own, which no two requests under way are to share.
  return options.memory == BenchMemory::kCuda ? std::max(fitting, options.concurrency) : fitting;
}

struct Served {
  std::string name;
  ModelDescription model;
  ClusterState cluster;
};

absl::StatusOr<Served> Ask(const BenchOptions& options, InferenceClient& client) {
  const absl::Duration timeout = absl::Seconds(options.timeout_s);
  Served served{.name = options.model};
  if (served.name.empty()) {
    EPC_ASSIGN_OR_RETURN(served.name, client.OnlyModel(timeout));
  }
  EPC_ASSIGN_OR_RETURN(served.model, client.DescribeModel(served.name, timeout));
  EPC_ASSIGN_OR_RETURN(served.cluster,
                       AdminClient(options.server, options.security).GetClusterStatus(timeout));
  if (served.cluster.num_experts < served.model.topk) {
    return absl::InternalError(absl::StrCat("the service says it has ", served.cluster.num_experts,
                                            " experts, fewer than K ", served.model.topk));
  }
  return served;
}

std::vector<InferRequest> MakeInputs(const BenchOptions& options, const Served& served) {
  RandomBatch random(options.seed, served.model.hidden, served.cluster.num_experts,
                     served.model.topk);
  std::vector<InferRequest> inputs;
  for (int i = 0, num = NumInputs(options, served.model.hidden); i < num; ++i) {
    InferRequest request;
    request.model = served.name;
    request.layer = options.layer;
    request.timeout = absl::Seconds(options.timeout_s);
    request.trace = !options.trace_path.empty();
    request.hidden_states = random.HiddenStates(RowType(options.dtype), options.tokens);
    if (!options.server_routes) {
      request.topk_ids = IdTensor(ElementType::kI32, random.Ids(options.tokens), served.model.topk);
      request.topk_weights = WeightTensor(random.Weights(options.tokens), served.model.topk);
    }
    inputs.push_back(std::move(request));
  }
  return inputs;
}

LoadResult Warm(InferenceClient& client, const std::vector<InferRequest>& inputs,
                const BenchOptions& options) {
  LoadPlan plan;
  plan.concurrency = options.concurrency;
  plan.streaming = options.streaming;
  plan.requests = options.warmup;
  Progress progress("warming up");
  return RunLoad(client, inputs, plan, [&](std::int64_t ended, double) {
    progress.Update(static_cast<double>(ended) / static_cast<double>(options.warmup),
                    absl::StrCat(ended, " of ", options.warmup, " requests"));
  });
}

LoadResult Measure(InferenceClient& client, const std::vector<InferRequest>& inputs,
                   const BenchOptions& options) {
  LoadPlan plan;
  plan.concurrency = options.concurrency;
  plan.streaming = options.streaming;
  plan.rate = options.rate;
  if (options.duration_s > 0) {
    plan.duration = absl::Seconds(options.duration_s);
  } else {
    plan.requests = options.requests;
  }
  Progress progress("measuring");
  return RunLoad(client, inputs, plan, [&](std::int64_t ended, double seconds) {
    const double fraction =
        options.duration_s > 0 ? seconds / options.duration_s
                               : static_cast<double>(ended) / static_cast<double>(options.requests);
    const double per_second = static_cast<double>(ended) / std::max(seconds, 1e-3);
    progress.Update(
        fraction,
        absl::StrFormat("%s requests, %.0f/s, %s tokens/s", FormatCount(ended), per_second,
                        FormatCount(static_cast<std::uint64_t>(
                            per_second * static_cast<double>(options.tokens)))));
  });
}

// The load generator is not to take the service's cores: on a small machine one thread is the best.
int AsyncThreads(int concurrency) {
  const auto cores = static_cast<int>(std::thread::hardware_concurrency());
  return std::clamp(cores / 4, 1, concurrency);
}

// The service may be on this machine, and look as well.
std::int64_t BusyPollUs(const BenchOptions& options, int num_workers, int async_threads) {
  constexpr int kUsualSlots = 2;
  return options.busy_poll_us.value_or(DefaultBusyPollUs(
      AvailableCores(), LookingThreads(num_workers, kUsualSlots) + async_threads));
}

}  // namespace

absl::Status RunBench(const BenchOptions& options) {
  if (!options.trace_path.empty()) EPC_RETURN_IF_ERROR(CheckBenchTrace(options.trace_path));
  EPC_ASSIGN_OR_RETURN(const auto interruption, Interruption::Create());
  ClientOptions client_options{.target = options.server, .security = options.security};
  EPC_ASSIGN_OR_RETURN(const Served served, [&] {
    InferenceClient client(client_options);
    return Ask(options, client);
  }());
  client_options.retry.max_attempts = options.attempts;
  client_options.async_threads = AsyncThreads(options.concurrency);
  const std::int64_t busy_poll_us =
      BusyPollUs(options, served.cluster.expected_workers, client_options.async_threads);
  client_options.busy_poll = absl::Microseconds(busy_poll_us);
  InferenceClient client(client_options);
  std::vector<InferRequest> inputs = MakeInputs(options, served);
  BenchRegions regions(interruption.get());  // until every request has ended
  if (options.memory == BenchMemory::kSystem) {
    EPC_RETURN_IF_ERROR(regions.MoveToSystem(&client, options.shm_key_prefix, &inputs));
  } else if (options.memory == BenchMemory::kCuda) {
    EPC_RETURN_IF_ERROR(regions.MoveToCuda(&client, options.cuda_device, &inputs));
  }
  // One request first: what is wrong with all of them is said once, and at once.
  const auto first = client.Infer(inputs.front());
  if (!first.ok() && !options.allow_errors) return first.status();
  if (options.warmup > 0) {
    const LoadResult warm = Warm(client, inputs, options);
    if (!warm.first_message.empty() && !options.allow_errors) {
      const auto& [code, message] = *warm.first_message.begin();
      return absl::UnavailableError(
          absl::StrCat("a warm-up request failed: ", code, ": ", message));
    }
  }
  const LoadResult measured = Measure(client, inputs, options);
  const BenchReport report = MakeBenchReport(measured, options.tokens);
  if (!options.trace_path.empty()) {
    EPC_RETURN_IF_ERROR(WriteBenchTrace(options.trace_path, measured.samples));
  }
  if (options.json) {
    std::printf("%s\n", BenchJson(options, busy_poll_us, report).dump().c_str());
  } else {
    const Terminal terminal = Terminal::Of(stdout);
    std::printf("%s\n",
                terminal
                    .Paint(Color::kBold,
                           absl::StrCat(options.tokens, " tokens a request, ", options.dtype,
                                        options.rate > 0
                                            ? absl::StrCat(", ", options.rate, " requests/s")
                                            : absl::StrCat(", concurrency ", options.concurrency)))
                    .c_str());
    std::printf("\n%s", RenderBenchReport(report, terminal).c_str());
  }
  if (report.requests > report.succeeded && !options.allow_errors) {
    return absl::UnavailableError(absl::StrCat(report.requests - report.succeeded, " of ",
                                               report.requests, " requests failed"));
  }
  return absl::OkStatus();
}

}  // namespace epserve::client
