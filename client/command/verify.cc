#include "client/command/verify.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/command/format.h"
#include "client/command/progress.h"
#include "client/command/random_batch.h"
#include "client/command/table.h"
#include "client/cpp/admin_client.h"
#include "client/cpp/client.h"
#include "client/cpp/reference_model.h"
#include "client/cpp/status.h"
#include "nlohmann/json.hpp"

namespace epserve::client {

namespace {

// Where the last expert chosen and the first left out are closer than this, relative to their
// scores, fp32 may rightly choose the other: such tokens are counted and left out.
constexpr double kCloseChoice = 1e-6;
constexpr double kMaxSkippedFraction = 0.03;

struct Batch {
  std::string name;
  std::int64_t layer = 0;
  std::int64_t num_tokens = 0;
  bool service_routes = false;
  std::vector<std::int64_t> ids;  // [T, K] unless the service routes
};

class Verifier {
 public:
  Verifier(const VerifyOptions& options, InferenceClient& client, ReferenceModel& reference,
           std::string model, bool on_gpus)
      : options_(options),
        on_gpus_(on_gpus),
        client_(client),
        reference_(reference),
        model_(std::move(model)),
        random_(options.seed, reference.config().hidden, reference.config().num_experts,
                reference.config().topk) {}

  absl::StatusOr<std::vector<VerifyRow>> Run(const std::vector<std::int64_t>& layers) {
    const absl::Time started = absl::Now();
    Progress progress("verifying");
    std::vector<std::vector<Batch>> plans;
    std::size_t total = 0;
    for (std::size_t i = 0; i < options_.dtypes.size(); ++i) {
      plans.push_back(PlanBatches(layers));
      total += plans.back().size();
    }
    std::size_t done = 0;
    std::vector<VerifyRow> rows;
    for (std::size_t i = 0; i < plans.size(); ++i) {
      VerifyRow row;
      row.dtype = options_.dtypes[i];
      row.limit = options_.max_error > 0 ? options_.max_error : ErrorLimit(row.dtype, on_gpus_);
      for (const Batch& batch : plans[i]) {
        EPC_RETURN_IF_ERROR(Check(batch, row));
        ++done;
        progress.Update(static_cast<double>(done) / static_cast<double>(total),
                        absl::StrCat(row.dtype, ", ", done, " of ", total, " batches, ",
                                     FormatSeconds(absl::ToDoubleSeconds(absl::Now() - started))));
      }
      rows.push_back(row);
    }
    return rows;
  }

 private:
  std::vector<Batch> PlanBatches(const std::vector<std::int64_t>& layers) {
    std::vector<Batch> plan;
    for (const std::int64_t layer : layers) {
      for (std::int64_t i = 0; i < options_.batches; ++i) {
        plan.push_back({"random", layer, options_.tokens, false, random_.Ids(options_.tokens)});
        if (reference_.has_router()) {
          plan.push_back({"routed by the service", layer, options_.tokens, true, {}});
        }
      }
    }
    AddEdges(layers.front(), plan);
    return plan;
  }

  void AddEdges(std::int64_t layer, std::vector<Batch>& plan) {
    const std::int64_t topk = reference_.config().topk;
    const std::int64_t tokens = options_.tokens;
    plan.push_back({"no tokens", layer, 0, false, {}});
    plan.push_back({"one token", layer, 1, false, random_.Ids(1)});
    const std::int64_t few = std::min<std::int64_t>(3, tokens);
    plan.push_back({"few tokens", layer, few, false, random_.Ids(few)});
    Batch unused = {"unused slots", layer, tokens, false, random_.Ids(tokens)};
    for (std::size_t i = 0; i < unused.ids.size(); i += 2) unused.ids[i] = -1;
    plan.push_back(std::move(unused));
    plan.push_back({"no expert at all", layer, few, false,
                    std::vector<std::int64_t>(static_cast<std::size_t>(few * topk), -1)});
    Batch twice = {"an id twice", layer, tokens, false, random_.Ids(tokens)};
    for (std::int64_t t = 0; t < tokens; ++t) {
      twice.ids[t * topk + topk - 1] = twice.ids[t * topk];
    }
    plan.push_back(std::move(twice));
    Batch one = {"all on one expert", layer, tokens, false,
                 std::vector<std::int64_t>(static_cast<std::size_t>(tokens * topk), -1)};
    for (std::int64_t t = 0; t < tokens; ++t)
      one.ids[t * topk] = reference_.config().num_experts - 1;
    plan.push_back(std::move(one));
    if (reference_.has_router()) {
      plan.push_back({"no tokens, routed by the service", layer, 0, true, {}});
      plan.push_back({"one token, routed by the service", layer, 1, true, {}});
    }
  }

  absl::Status Check(const Batch& batch, VerifyRow& row) {
    const std::int64_t topk = reference_.config().topk;
    InferRequest request;
    request.model = model_;
    request.layer = batch.layer;
    request.timeout = absl::Seconds(options_.timeout_s);
    request.hidden_states = random_.HiddenStates(RowType(row.dtype), batch.num_tokens);
    const std::vector<double> x = ToDoubles(request.hidden_states);
    std::vector<std::int64_t> ids = batch.ids;
    std::vector<double> weights;
    std::vector<bool> skip;
    if (batch.service_routes) {
      EPC_ASSIGN_OR_RETURN(const std::vector<TokenRoute> routes, reference_.Route(batch.layer, x));
      for (const TokenRoute& route : routes) {
        ids.insert(ids.end(), route.ids.begin(), route.ids.end());
        weights.insert(weights.end(), route.weights.begin(), route.weights.end());
        skip.push_back(route.margin < kCloseChoice);
      }
      row.routed_tokens += batch.num_tokens;
      row.skipped_tokens += std::count(skip.begin(), skip.end(), true);
    } else {
      weights = random_.Weights(batch.num_tokens);
      // Both types of ids are used in turn.
      const ElementType type = row.batches % 2 == 0 ? ElementType::kI32 : ElementType::kI64;
      request.topk_ids = IdTensor(type, ids, topk);
      request.topk_weights = WeightTensor(weights, topk);
    }
    const auto named = [&](const absl::Status& status) {
      return absl::Status(status.code(),
                          absl::StrCat("batch '", batch.name, "' of layer ", batch.layer, " in ",
                                       row.dtype, ": ", status.message()));
    };
    const auto result = client_.Infer(request);
    if (!result.ok()) return named(result.status());
    // The first batch of each type is sent twice: the same request gives the same bits.
    if (row.batches == 0) {
      const auto again = client_.Infer(request);
      if (!again.ok()) return named(again.status());
      if (again->hidden_states.bytes != result->hidden_states.bytes) {
        return named(absl::InternalError("sent twice, it came back with different bits"));
      }
    }
    EPC_ASSIGN_OR_RETURN(const std::vector<double> expected,
                         reference_.Compute(batch.layer, x, ids, weights));
    const double error = RelativeL2Error(ToDoubles(result->hidden_states), expected,
                                         reference_.config().hidden, skip);
    ++row.batches;
    row.tokens += batch.num_tokens;
    if (error >= row.largest_error) {
      row.largest_error = error;
      row.worst_batch = absl::StrCat(batch.name, ", layer ", batch.layer);
    }
    return absl::OkStatus();
  }

  const VerifyOptions& options_;
  const bool on_gpus_;
  InferenceClient& client_;
  ReferenceModel& reference_;
  const std::string model_;
  RandomBatch random_;
};

void PrintTable(const std::vector<VerifyRow>& rows) {
  const Terminal terminal = Terminal::Of(stdout);
  Table table({{"dtype"},
               {"batches", Align::kRight},
               {"tokens", Align::kRight},
               {"routed here", Align::kRight},
               {"skipped", Align::kRight},
               {"largest error", Align::kRight},
               {"limit", Align::kRight},
               {""},
               {"worst batch"}});
  for (const VerifyRow& row : rows) {
    table.AddRow({row.dtype, FormatCount(static_cast<std::uint64_t>(row.batches)),
                  FormatCount(static_cast<std::uint64_t>(row.tokens)),
                  FormatCount(static_cast<std::uint64_t>(row.routed_tokens)),
                  FormatCount(static_cast<std::uint64_t>(row.skipped_tokens)),
                  FormatError(row.largest_error), FormatError(row.limit),
                  row.ok() ? Cell("ok", Color::kGreen) : Cell("WRONG", Color::kRed),
                  row.worst_batch});
  }
  std::fputs(table.Render(terminal).c_str(), stdout);
}

absl::Status Judge(const std::vector<VerifyRow>& rows) {
  for (const VerifyRow& row : rows) {
    if (!row.ok()) {
      return absl::DataLossError(
          absl::StrCat("largest relative error ", FormatError(row.largest_error), " in ", row.dtype,
                       " exceeds ", FormatError(row.limit), " (", row.worst_batch, ")"));
    }
    if (static_cast<double>(row.skipped_tokens) >
        kMaxSkippedFraction * static_cast<double>(row.routed_tokens)) {
      return absl::DataLossError(absl::StrCat("the router's choice was too close to compare for ",
                                              row.skipped_tokens, " of ", row.routed_tokens,
                                              " tokens in ", row.dtype, ", which exceeds 3 %"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<std::int64_t>> ChooseLayers(const VerifyOptions& options,
                                                       const ReferenceConfig& config) {
  for (const std::int64_t layer : options.layers) {
    if (std::find(config.layers.begin(), config.layers.end(), layer) == config.layers.end()) {
      return absl::NotFoundError(absl::StrCat("--layers: layer ", layer,
                                              " has no experts; those with experts are ",
                                              config.layers.front(), " to ", config.layers.back()));
    }
  }
  return options.layers.empty() ? config.layers : options.layers;
}

// Whether rows are computed in bf16, as GPU backends do. A caller that may not ask (no operator) is
// held to the stricter limits.
bool ServedOnGpus(const VerifyOptions& options) {
  const auto cluster = AdminClient(options.server, options.security)
                           .GetClusterStatus(absl::Seconds(options.timeout_s));
  return cluster.ok() && !cluster->workers.empty() && cluster->workers.front().backend != "host" &&
         !cluster->workers.front().backend.empty();
}

}  // namespace

double ErrorLimit(const std::string& dtype, bool on_gpus) {
  return dtype == "fp32" && !on_gpus ? 1e-5 : 1e-2;
}

nlohmann::ordered_json VerifyJson(const std::vector<VerifyRow>& rows) {
  nlohmann::ordered_json results = nlohmann::ordered_json::array();
  for (const VerifyRow& row : rows) {
    // JSON has no infinity; a NaN in an answer becomes null.
    nlohmann::ordered_json error = nullptr;
    if (std::isfinite(row.largest_error)) error = row.largest_error;
    results.push_back({{"dtype", row.dtype},
                       {"batches", row.batches},
                       {"tokens", row.tokens},
                       {"routed_tokens", row.routed_tokens},
                       {"skipped_tokens", row.skipped_tokens},
                       {"largest_relative_error", error},
                       {"limit", row.limit},
                       {"ok", row.ok()},
                       {"worst_batch", row.worst_batch}});
  }
  return {{"ok", Judge(rows).ok()}, {"results", results}};
}

absl::Status RunVerify(const VerifyOptions& options) {
  EPC_ASSIGN_OR_RETURN(const auto reference, ReferenceModel::Open(options.checkpoint_dir));
  EPC_ASSIGN_OR_RETURN(const std::vector<std::int64_t> layers,
                       ChooseLayers(options, reference->config()));
  InferenceClient client(ClientOptions{.target = options.server, .security = options.security});
  const absl::Duration timeout = absl::Seconds(options.timeout_s);
  std::string model = options.model;
  if (model.empty()) {
    EPC_ASSIGN_OR_RETURN(model, client.OnlyModel(timeout));
  }
  EPC_ASSIGN_OR_RETURN(const ModelDescription served, client.DescribeModel(model, timeout));
  if (served.hidden != reference->config().hidden || served.topk != reference->config().topk) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the service has H ", served.hidden, " and K ", served.topk, ", the checkpoint '",
        options.checkpoint_dir, "' H ", reference->config().hidden, " and K ",
        reference->config().topk, "; give the checkpoint that is served"));
  }
  EPC_ASSIGN_OR_RETURN(
      const std::vector<VerifyRow> rows,
      Verifier(options, client, *reference, model, ServedOnGpus(options)).Run(layers));
  if (options.json) {
    std::printf("%s\n", VerifyJson(rows).dump().c_str());
  } else {
    PrintTable(rows);
  }
  return Judge(rows);
}

}  // namespace epserve::client
