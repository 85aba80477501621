#include "server/coordinator/front_door/infer_service.h"

#include <gmock/gmock.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tests/server/coordinator/front_door/infer_service_fixture.h"

namespace epserve::coordinator {
namespace {

using absl::StatusCode;
using grpc::ClientContext;
using inference::ModelInferRequest;
using inference::ModelInferResponse;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;

TEST_F(InferServiceTest, LiveAlwaysAndReadyAsTheSinkSays) {
  for (const bool ready : {false, true}) {
    sink_.is_ready.store(ready);
    ClientContext live_context, ready_context, model_context;
    inference::ServerLiveResponse live;
    ASSERT_TRUE(stub_->ServerLive(&live_context, {}, &live).ok());
    EXPECT_TRUE(live.live());
    inference::ServerReadyResponse server;
    ASSERT_TRUE(stub_->ServerReady(&ready_context, {}, &server).ok());
    EXPECT_EQ(server.ready(), ready);
    inference::ModelReadyRequest request;
    request.set_name("tiny");
    inference::ModelReadyResponse model;
    ASSERT_TRUE(stub_->ModelReady(&model_context, request, &model).ok());
    EXPECT_EQ(model.ready(), ready);
  }
}

TEST_F(InferServiceTest, ServerMetadataNamesItsExtensions) {
  ClientContext context;
  inference::ServerMetadataResponse response;
  ASSERT_TRUE(stub_->ServerMetadata(&context, {}, &response).ok());
  EXPECT_EQ(response.name(), "epserve");
  EXPECT_THAT(response.version(), Not(IsEmpty()));
  EXPECT_THAT(response.extensions(), ElementsAre("model_configuration", "statistics",
                                                 "system_shared_memory", "cuda_shared_memory"));
}

TEST_F(InferServiceTest, ModelMetadataGivesFullShapes) {
  ClientContext context;
  inference::ModelMetadataRequest request;
  request.set_name("tiny");
  inference::ModelMetadataResponse response;
  ASSERT_TRUE(stub_->ModelMetadata(&context, request, &response).ok());
  EXPECT_EQ(response.name(), "tiny");
  EXPECT_THAT(response.versions(), ElementsAre("1"));
  ASSERT_EQ(response.inputs_size(), 3);
  EXPECT_EQ(response.inputs(0).name(), "hidden_states");
  EXPECT_THAT(response.inputs(0).shape(), ElementsAre(-1, 4));
  EXPECT_EQ(response.inputs(1).datatype(), "INT32");
  EXPECT_THAT(response.inputs(2).shape(), ElementsAre(-1, 2));
  ASSERT_EQ(response.outputs_size(), 1);
  EXPECT_EQ(response.outputs(0).name(), "hidden_states");
}

TEST_F(InferServiceTest, ModelConfigIsSetWithoutABatchDimension) {
  ClientContext context;
  inference::ModelConfigRequest request;
  request.set_name("tiny");
  request.set_version("1");
  inference::ModelConfigResponse response;
  ASSERT_TRUE(stub_->ModelConfig(&context, request, &response).ok());
  ASSERT_TRUE(response.has_config());
  EXPECT_EQ(response.config().max_batch_size(), 0);
  ASSERT_EQ(response.config().input_size(), 3);
  EXPECT_THAT(response.config().input(1).dims(), ElementsAre(-1, 2));
  EXPECT_FALSE(response.config().input(1).optional()) << "this model has no router";
  EXPECT_FALSE(response.config().model_transaction_policy().decoupled());
}

TEST_F(InferServiceTest, RepositoryIndexGivesTheModelsState) {
  inference::RepositoryIndexRequest ready_only;
  ready_only.set_ready(true);
  ClientContext first, second, third;
  inference::RepositoryIndexResponse response;
  ASSERT_TRUE(stub_->RepositoryIndex(&first, ready_only, &response).ok());
  ASSERT_EQ(response.models_size(), 1);
  EXPECT_EQ(response.models(0).state(), "READY");
  sink_.is_ready.store(false);
  ASSERT_TRUE(stub_->RepositoryIndex(&second, {}, &response).ok());
  ASSERT_EQ(response.models_size(), 1);
  EXPECT_EQ(response.models(0).state(), "UNAVAILABLE");
  ASSERT_TRUE(stub_->RepositoryIndex(&third, ready_only, &response).ok());
  EXPECT_EQ(response.models_size(), 0);
}

TEST_F(InferServiceTest, UnknownModelIsNotFoundEverywhere) {
  ClientContext contexts[4];
  inference::ModelReadyRequest ready;
  ready.set_name("other");
  inference::ModelReadyResponse ready_reply;
  inference::ModelMetadataRequest metadata;
  metadata.set_name("other");
  inference::ModelMetadataResponse metadata_reply;
  inference::ModelConfigRequest config;
  config.set_name("tiny");
  config.set_version("2");
  inference::ModelConfigResponse config_reply;
  ModelInferRequest infer = ValidMessage();
  infer.set_model_name("other");
  ModelInferResponse infer_reply;
  for (const grpc::Status& status : {stub_->ModelReady(&contexts[0], ready, &ready_reply),
                                     stub_->ModelMetadata(&contexts[1], metadata, &metadata_reply),
                                     stub_->ModelConfig(&contexts[2], config, &config_reply),
                                     stub_->ModelInfer(&contexts[3], infer, &infer_reply)}) {
    EXPECT_EQ(status.error_code(), grpc::StatusCode::NOT_FOUND);
    EXPECT_THAT(status.error_message(), HasSubstr("is not served"));
  }
}

TEST_F(InferServiceTest, StatisticsCountWhatEndedAndWhereItsTimeWent) {
  sink_.HandleBy([](std::unique_ptr<PendingRequest> request) {
    if (request->request.num_tokens == 0) return request->Complete({absl::AbortedError("no"), {}});
    Echo(std::move(request));
  });
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(Infer(ValidMessage()).ok());
  ASSERT_FALSE(Infer(ModelInferRequest()).ok());
  for (const char* name : {"", "tiny"}) {
    ClientContext context;
    inference::ModelStatisticsRequest request;
    request.set_name(name);
    inference::ModelStatisticsResponse response;
    const grpc::Status status = stub_->ModelStatistics(&context, request, &response);
    ASSERT_TRUE(status.ok()) << status.error_message();
    ASSERT_EQ(response.model_stats_size(), 1);
    const inference::ModelStatistics& model = response.model_stats(0);
    EXPECT_EQ(model.name(), TestModel().name);
    EXPECT_EQ(model.version(), "1");
    EXPECT_EQ(model.inference_count(), 3u);
    EXPECT_EQ(model.execution_count(), 3u);
    EXPECT_GT(model.last_inference(), 0u);
    const inference::InferStatistics& times = model.inference_stats();
    EXPECT_EQ(times.success().count(), 3u);
    EXPECT_EQ(times.fail().count(), 1u);
    // Echo's times: 1 queue, 2 assign, 3 counts, 4 dispatch, 5 ffn, 6 combine, microseconds.
    EXPECT_EQ(times.queue().count(), 3u);
    EXPECT_EQ(times.queue().ns(), 3u * 1000);
    EXPECT_EQ(times.compute_input().ns(), 3u * 9000);
    EXPECT_EQ(times.compute_infer().ns(), 3u * 5000);
    EXPECT_EQ(times.compute_output().ns(), 3u * 6000);
  }
  ClientContext context;
  inference::ModelStatisticsRequest other;
  other.set_name("other");
  inference::ModelStatisticsResponse response;
  EXPECT_EQ(stub_->ModelStatistics(&context, other, &response).error_code(),
            grpc::StatusCode::NOT_FOUND);
}

TEST_F(InferServiceTest, BytesThatAreNoMessageGetAMessageFromEveryMethod) {
  grpc::GenericStub generic(channel_);
  const auto* service =
      inference::ModelInferRequest::descriptor()->file()->FindServiceByName("GRPCInferenceService");
  for (int i = 0; i < service->method_count(); ++i) {
    if (service->method(i)->client_streaming()) continue;
    const std::string method = "/" + service->full_name() + "/" + service->method(i)->name();
    const grpc::Slice slice("\x0a\xff\xff garbage");
    const grpc::ByteBuffer garbage(&slice, 1);
    grpc::ByteBuffer reply;
    ClientContext context;
    grpc::CompletionQueue queue;
    const auto call = generic.PrepareUnaryCall(&context, method, garbage, &queue);
    call->StartCall();
    grpc::Status status;
    call->Finish(&reply, &status, &status);
    void* tag = nullptr;
    bool ok = false;
    ASSERT_TRUE(queue.Next(&tag, &ok)) << method;
    EXPECT_FALSE(status.ok()) << method;
    EXPECT_THAT(status.error_message(), Not(IsEmpty())) << method;
  }
}

TEST_F(InferServiceTest, RawRequestComesBackWithRowsIdAndTimes) {
  sink_.HandleBy(Echo);
  ModelInferRequest request = ValidMessage();
  (*request.mutable_parameters())["triton_enable_empty_final_response"].set_bool_param(true);
  (*request.mutable_parameters())["layer"].set_int64_param(5);
  request.add_outputs()->set_name("hidden_states");
  ModelInferResponse response;
  const grpc::Status status = Infer(request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(response.model_name(), "tiny");
  EXPECT_EQ(response.model_version(), "1");
  EXPECT_EQ(response.id(), "request-1");
  ASSERT_EQ(response.outputs_size(), 1);
  EXPECT_EQ(response.outputs(0).name(), "hidden_states");
  EXPECT_EQ(response.outputs(0).datatype(), "FP32");
  EXPECT_THAT(response.outputs(0).shape(), ElementsAre(3, 4));
  EXPECT_FALSE(response.outputs(0).has_contents());
  EXPECT_THAT(response.raw_output_contents(), ElementsAre(request.raw_input_contents(0)));
  const std::map<std::string, std::int64_t> expected = {
      {"epserve_queue_us", 1},    {"epserve_assign_us", 2}, {"epserve_counts_us", 3},
      {"epserve_dispatch_us", 4}, {"epserve_ffn_us", 5},    {"epserve_combine_us", 6},
      {"epserve_epoch", 77}};
  for (const auto& [name, value] : expected) {
    EXPECT_EQ(response.parameters().at(name).int64_param(), value) << name;
  }
  EXPECT_GE(response.parameters().at("epserve_server_us").int64_param(), 0);
  EXPECT_EQ(response.parameters_size(), 8);
  EXPECT_THAT(sink_.WaitForAnswers(1), ElementsAre(StatusCode::kOk));
}

TEST_F(InferServiceTest, TypedRequestComesBackRaw) {
  sink_.HandleBy(Echo);
  ModelInferRequest request = ValidMessage();
  request.clear_raw_input_contents();
  for (int i = 0; i < 12; ++i) {
    request.mutable_inputs(0)->mutable_contents()->add_fp32_contents(static_cast<float>(i));
  }
  request.mutable_inputs(1)->set_datatype("INT64");
  for (int i = 0; i < 6; ++i) {
    request.mutable_inputs(1)->mutable_contents()->add_int64_contents(i);
    request.mutable_inputs(2)->mutable_contents()->add_fp32_contents(0.5f);
  }
  ModelInferResponse response;
  const grpc::Status status = Infer(request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_THAT(response.raw_output_contents(), ElementsAre(ValidRequest().raw[0]));
}

TEST_F(InferServiceTest, BothRawAndTypedContentsAreRefused) {
  ModelInferRequest request = ValidMessage();
  request.mutable_inputs(1)->mutable_contents()->add_int_contents(1);
  const grpc::Status status = Infer(request);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("topk_ids"));
}

TEST_F(InferServiceTest, NoTokensComeBackAsOneEmptyEntry) {
  sink_.HandleBy(Echo);
  ModelInferRequest request = ValidMessage();
  for (int i = 0; i < 3; ++i) {
    request.mutable_inputs(i)->set_shape(0, 0);
    request.set_raw_input_contents(i, "");
  }
  ModelInferResponse response;
  const grpc::Status status = Infer(request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_THAT(response.outputs(0).shape(), ElementsAre(0, 4));
  EXPECT_THAT(response.raw_output_contents(), ElementsAre(""));
}

TEST_F(InferServiceTest, RefusedRequestNeverReachesTheSink) {
  sink_.HandleBy([](std::unique_ptr<PendingRequest>) { ADD_FAILURE() << "submitted"; });
  ModelInferRequest request = ValidMessage();
  request.mutable_inputs(0)->set_shape(1, 5);
  const grpc::Status status = Infer(request);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("[3,5]"));
  EXPECT_THAT(sink_.WaitForAnswers(1), ElementsAre(StatusCode::kInvalidArgument));
}

TEST_F(InferServiceTest, CountsOfTensorsAndParametersAreCappedOnTheWire) {
  ModelInferRequest many_inputs = ValidMessage();
  for (int i = 0; i < 10000; ++i) many_inputs.add_inputs();
  ModelInferRequest many_outputs = ValidMessage();
  for (int i = 0; i < 10000; ++i) many_outputs.add_outputs();
  ModelInferRequest many_raw = ValidMessage();
  for (int i = 0; i < 10000; ++i) many_raw.add_raw_input_contents();
  ModelInferRequest many_parameters = ValidMessage();
  ModelInferRequest many_tensor_parameters = ValidMessage();
  ModelInferRequest many_strings = ValidMessage();
  for (int i = 0; i < 10000; ++i) {
    const std::string name = "triton_" + std::to_string(i);
    (*many_parameters.mutable_parameters())[name].set_bool_param(true);
    (*many_tensor_parameters.mutable_inputs(0)->mutable_parameters())[name].set_bool_param(true);
    many_strings.mutable_inputs(0)->mutable_contents()->add_bytes_contents("");
  }
  const std::pair<const ModelInferRequest*, const char*> cases[] = {
      {&many_inputs, "more than the limit of 16 inputs"},
      {&many_outputs, "more than the limit of 16 outputs"},
      {&many_raw, "more than the limit of 16 raw_input_contents entries"},
      {&many_parameters, "more than the limit of 64 parameters"},
      {&many_tensor_parameters, "more than the limit of 64 tensor parameters"},
      {&many_strings, "more than the limit of 16 bytes_contents entries"}};
  for (const auto& [request, words] : cases) {
    const grpc::Status status = Infer(*request);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_THAT(status.error_message(), HasSubstr(words));
  }
}

TEST_F(InferServiceTest, MessagePastTheLimitIsRefused) {
  ModelInferRequest request = ValidMessage();
  request.set_raw_input_contents(0, std::string(kMaxMessageBytes + 1, 'x'));
  EXPECT_EQ(Infer(request).error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
}

TEST_F(InferServiceTest, CompressedMessageIsRefusedBeforeItIsUnpacked) {
  ModelInferRequest request = ValidMessage();
  request.set_raw_input_contents(0, std::string(16 << 20, 'x'));
  ClientContext context;
  context.set_compression_algorithm(GRPC_COMPRESS_GZIP);
  ModelInferResponse response;
  const grpc::Status status = stub_->ModelInfer(&context, request, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNIMPLEMENTED);
  EXPECT_THAT(status.error_message(), Not(IsEmpty()));
}

TEST_F(InferServiceTest, SinksErrorReachesTheCallerNeverWithoutAMessage) {
  sink_.HandleBy([](std::unique_ptr<PendingRequest> request) {
    request->Complete({absl::UnavailableError(request->request.layer == 3 ? "" : "no worker"), {}});
  });
  ModelInferRequest request = ValidMessage();
  grpc::Status status = Infer(request);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(status.error_message(), "UNAVAILABLE");
  (*request.mutable_parameters())["layer"].set_int64_param(4);
  EXPECT_EQ(Infer(request).error_message(), "no worker");
}

TEST_F(InferServiceTest, FullQueueTellsWhenToRetry) {
  for (const std::int64_t given_ms : {0, 1234}) {
    sink_.HandleBy([given_ms](std::unique_ptr<PendingRequest> request) {
      request->Complete({absl::ResourceExhaustedError("queue full"), {}, given_ms});
    });
    ClientContext context;
    ModelInferResponse response;
    const grpc::Status status = stub_->ModelInfer(&context, ValidMessage(), &response);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
    const auto& trailer = context.GetServerTrailingMetadata();
    const auto pushback = trailer.find("grpc-retry-pushback-ms");
    ASSERT_NE(pushback, trailer.end());
    EXPECT_EQ(pushback->second, given_ms == 0 ? "50" : "1234");
  }
}

TEST_F(InferServiceTest, OtherErrorsCarryNoPushback) {
  sink_.HandleBy([](std::unique_ptr<PendingRequest> request) {
    request->Complete({absl::UnavailableError("no worker"), {}, 1234});
  });
  ClientContext context;
  ModelInferResponse response;
  EXPECT_FALSE(stub_->ModelInfer(&context, ValidMessage(), &response).ok());
  EXPECT_EQ(context.GetServerTrailingMetadata().count("grpc-retry-pushback-ms"), 0u);
}

TEST_F(InferServiceTest, RequestDroppedByTheSinkIsAnsweredInternal) {
  sink_.HandleBy([](std::unique_ptr<PendingRequest> request) { request.reset(); });
  const grpc::Status status = Infer(ValidMessage());
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INTERNAL);
  EXPECT_THAT(status.error_message(), HasSubstr("dropped"));
}

TEST_F(InferServiceTest, OkWithoutRowsIsAnsweredInternal) {
  sink_.HandleBy([](std::unique_ptr<PendingRequest> request) { request->Complete(Ok()); });
  const grpc::Status status = Infer(ValidMessage());
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INTERNAL);
  EXPECT_THAT(status.error_message(), HasSubstr("0 output bytes, not 48"));
}

TEST_F(InferServiceTest, OnlyTheFirstCompletionCounts) {
  sink_.HandleBy([](std::unique_ptr<PendingRequest> request) {
    request->Complete({absl::UnavailableError("first"), {}});
    request->Complete({absl::InternalError("second"), {}});
  });
  EXPECT_EQ(Infer(ValidMessage()).error_message(), "first");
  EXPECT_THAT(sink_.WaitForAnswers(1), ElementsAre(StatusCode::kUnavailable));
}

TEST_F(InferServiceTest, IdsAreUniqueAndFromOne) {
  std::vector<std::uint64_t> ids;
  sink_.HandleBy([&ids](std::unique_ptr<PendingRequest> request) {
    ids.push_back(request->id);
    Echo(std::move(request));
  });
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(Infer(ValidMessage()).ok());
  ASSERT_EQ(sink_.WaitForAnswers(3).size(), 3u);
  EXPECT_THAT(ids, ElementsAre(1, 2, 3));
}

}  // namespace
}  // namespace epserve::coordinator
