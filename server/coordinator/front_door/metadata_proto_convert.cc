#include "server/coordinator/front_door/metadata_proto_convert.h"

#include <array>
#include <cstdint>

#include "server/coordinator/front_door/request_validation.h"

namespace epserve::coordinator {
namespace {

constexpr char kPlatform[] = "epserve_moe_experts";

struct TensorDescription {
  const char* name;
  const char* datatype;
  inference::DataType config_type;
  std::int64_t columns;  // of [-1, columns]
  bool optional;
};

std::array<TensorDescription, 3> Inputs(const ServedModel& model) {
  return {{
      {kHiddenStates, "FP32", inference::TYPE_FP32, model.hidden, false},
      {kTopkIds, "INT32", inference::TYPE_INT32, model.topk, model.has_router},
      {kTopkWeights, "FP32", inference::TYPE_FP32, model.topk, model.has_router},
  }};
}

void FillTensor(const TensorDescription& description,
                inference::ModelMetadataResponse::TensorMetadata* tensor) {
  tensor->set_name(description.name);
  tensor->set_datatype(description.datatype);
  tensor->add_shape(-1);
  tensor->add_shape(description.columns);
}

}  // namespace

void FillServerMetadata(bool shm_allowed, inference::ServerMetadataResponse* response) {
  response->set_name("epserve");
  response->set_version(EPSERVE_VERSION);
  response->add_extensions("model_configuration");
  response->add_extensions("statistics");
  if (!shm_allowed) return;
  response->add_extensions("system_shared_memory");
  response->add_extensions("cuda_shared_memory");
}

void FillModelMetadata(const ServedModel& model, inference::ModelMetadataResponse* response) {
  response->set_name(model.name);
  response->add_versions(model.version);
  response->set_platform(kPlatform);
  const auto inputs = Inputs(model);
  for (const TensorDescription& input : inputs) FillTensor(input, response->add_inputs());
  FillTensor(inputs[0], response->add_outputs());
}

void FillModelConfig(const ServedModel& model, inference::ModelConfig* config) {
  config->set_name(model.name);
  config->set_platform(kPlatform);
  config->set_backend("epserve");
  config->set_max_batch_size(0);
  config->mutable_model_transaction_policy()->set_decoupled(false);
  config->mutable_response_cache()->set_enable(false);
  const auto inputs = Inputs(model);
  for (const TensorDescription& description : inputs) {
    auto* input = config->add_input();
    input->set_name(description.name);
    input->set_data_type(description.config_type);
    input->add_dims(-1);
    input->add_dims(description.columns);
    input->set_optional(description.optional);
  }
  auto* output = config->add_output();
  output->set_name(inputs[0].name);
  output->set_data_type(inputs[0].config_type);
  output->add_dims(-1);
  output->add_dims(inputs[0].columns);
}

void FillModelStatistics(const ServedModel& model, const StatisticsSnapshot& totals,
                         inference::ModelStatisticsResponse* response) {
  const auto fill = [](const DurationTotal& total, inference::StatisticDuration* out) {
    out->set_count(total.count);
    out->set_ns(total.ns);
  };
  inference::ModelStatistics* statistics = response->add_model_stats();
  statistics->set_name(model.name);
  statistics->set_version(model.version);
  statistics->set_last_inference(totals.last_inference_ms);
  statistics->set_inference_count(totals.success.count);
  statistics->set_execution_count(totals.success.count);
  inference::InferStatistics* times = statistics->mutable_inference_stats();
  fill(totals.success, times->mutable_success());
  fill(totals.fail, times->mutable_fail());
  fill(totals.queue, times->mutable_queue());
  fill(totals.compute_input, times->mutable_compute_input());
  fill(totals.compute_infer, times->mutable_compute_infer());
  fill(totals.compute_output, times->mutable_compute_output());
}

void FillRepositoryIndex(const ServedModel& model, bool ready, bool ready_only,
                         inference::RepositoryIndexResponse* response) {
  if (ready_only && !ready) return;
  auto* entry = response->add_models();
  entry->set_name(model.name);
  entry->set_version(model.version);
  entry->set_state(ready ? "READY" : "UNAVAILABLE");
  if (!ready) entry->set_reason("the workers of the present epoch are not ready");
}

}  // namespace epserve::coordinator
