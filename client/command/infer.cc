#include "client/command/infer.h"

#include <cstdio>
#include <map>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/command/format.h"
#include "client/cpp/client.h"
#include "client/cpp/safetensors_file.h"
#include "client/cpp/status.h"

namespace epserve::client {

namespace {

// Takes `name` out of `tensors`.
std::optional<Tensor> Take(std::map<std::string, Tensor>& tensors, const std::string& name) {
  const auto found = tensors.find(name);
  if (found == tensors.end()) return std::nullopt;
  Tensor tensor = std::move(found->second);
  tensors.erase(found);
  return tensor;
}

}  // namespace

absl::Status RunInfer(const InferOptions& options) {
  EPC_ASSIGN_OR_RETURN(auto tensors, ReadSafetensors(options.input_path));
  InferRequest request;
  std::optional<Tensor> hidden = Take(tensors, "hidden_states");
  if (!hidden) {
    return absl::InvalidArgumentError(
        absl::StrCat("input '", options.input_path, "' has no tensor hidden_states"));
  }
  request.hidden_states = std::move(*hidden);
  request.topk_ids = Take(tensors, "topk_ids");
  request.topk_weights = Take(tensors, "topk_weights");
  if (!tensors.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("input '", options.input_path, "' has a tensor '", tensors.begin()->first,
                     "'; give hidden_states, topk_ids and topk_weights alone"));
  }
  request.layer = options.layer;
  request.timeout = absl::Seconds(options.timeout_s);
  request.model = options.model;

  ClientOptions client_options;
  client_options.security = options.security;
  client_options.target = options.server;
  client_options.retry.max_attempts = options.attempts;
  InferenceClient client(client_options);
  if (request.model.empty()) {
    EPC_ASSIGN_OR_RETURN(request.model, client.OnlyModel(request.timeout));
  }
  const absl::Time started = absl::Now();
  EPC_ASSIGN_OR_RETURN(InferResult result, client.Infer(request));
  const double took_us = absl::ToDoubleMicroseconds(absl::Now() - started);
  const std::string shape = ShapeString(result.hidden_states.shape);
  const char* type = SafetensorsName(result.hidden_states.type);
  std::map<std::string, Tensor> output;
  output.emplace("hidden_states", std::move(result.hidden_states));
  EPC_RETURN_IF_ERROR(WriteSafetensors(options.output_path, output));
  std::printf("wrote %s: hidden_states %s %s, %s, of which experts %s\n",
              options.output_path.c_str(), type, shape.c_str(), FormatMicroseconds(took_us).c_str(),
              FormatMicroseconds(static_cast<double>(result.parameters["epserve_ffn_us"])).c_str());
  return absl::OkStatus();
}

}  // namespace epserve::client
