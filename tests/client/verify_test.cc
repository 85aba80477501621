// `epserve verify`, `infer` and `bench` against a service that computes with the reference itself,
// or spoils what it computed.
#include "client/command/verify.h"

#include <mutex>

#include "client/command/bench.h"
#include "client/command/infer.h"
#include "client/command/random_batch.h"
#include "client/command/random_checkpoint.h"
#include "client/cpp/reference_model.h"
#include "client/cpp/safetensors_file.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/client/fake_service.h"
#include "tests/client/test_directory.h"

namespace epserve::client {
namespace {

using ::testing::HasSubstr;

constexpr std::int64_t kHidden = 32;
constexpr std::int64_t kTopk = 2;
constexpr std::int64_t kExperts = 8;

class VerifyTest : public ::testing::Test {
 protected:
  VerifyTest() : service_(kHidden, kTopk, kExperts) {
    MakeCheckpointOptions make;
    make.output_dir = directory_.File("checkpoint");
    make.architecture = "deepseek_v3";
    make.hidden = kHidden;
    make.intermediate = 16;
    make.num_experts = kExperts;
    make.topk = kTopk;
    EXPECT_TRUE(WriteRandomCheckpoint(make, nullptr).ok());
    auto model = ReferenceModel::Open(make.output_dir);
    EXPECT_TRUE(model.ok()) << model.status();
    model_ = std::move(model).value();
    Serve([](std::vector<double>&) {});
    options_.server = service_.target();
    options_.checkpoint_dir = make.output_dir;
    options_.dtypes = {"fp32", "bf16", "fp16"};
    options_.tokens = 8;
    options_.batches = 1;
  }

  // The service computes as the reference does, and `spoil` changes the result.
  void Serve(std::function<void(std::vector<double>&)> spoil) {
    service_.set_handler([this, spoil](grpc::ServerContext&,
                                       const inference::ModelInferRequest& request,
                                       inference::ModelInferResponse& response) {
      std::lock_guard<std::mutex> lock(mutex_);
      const std::int64_t layer = request.parameters().at("layer").int64_param();
      const auto type = *FromKserveName(request.inputs(0).datatype());
      Tensor x{type, {request.inputs(0).shape(0), kHidden}, request.raw_input_contents(0)};
      std::vector<std::int64_t> ids;
      std::vector<double> weights;
      if (request.inputs_size() == 1) {
        const auto routes = model_->Route(layer, ToDoubles(x));
        for (const TokenRoute& route : *routes) {
          ids.insert(ids.end(), route.ids.begin(), route.ids.end());
          weights.insert(weights.end(), route.weights.begin(), route.weights.end());
        }
      } else {
        const auto id_type = *FromKserveName(request.inputs(1).datatype());
        for (const double id : ToDoubles({id_type, {}, request.raw_input_contents(1)})) {
          ids.push_back(static_cast<std::int64_t>(id));
        }
        weights = ToDoubles({ElementType::kF32, {}, request.raw_input_contents(2)});
      }
      std::vector<double> y = *model_->Compute(layer, ToDoubles(x), ids, weights);
      spoil(y);
      auto* output = response.add_outputs();
      output->set_name("hidden_states");
      output->set_datatype(KserveName(type));
      for (const std::int64_t size : x.shape) output->add_shape(size);
      response.add_raw_output_contents(std::string(MakeTensor(type, x.shape, y).bytes));
      return grpc::Status::OK;
    });
  }

  TestDirectory directory_;
  std::mutex mutex_;
  std::unique_ptr<ReferenceModel> model_;
  FakeService service_;
  VerifyOptions options_;
};

TEST_F(VerifyTest, RightServicePassesInEveryType) {
  const absl::Status status = RunVerify(options_);
  EXPECT_TRUE(status.ok()) << status;
}

TEST_F(VerifyTest, ErrorOverTheLimitFailsAndSaysWhere) {
  options_.dtypes = {"fp32"};
  Serve([](std::vector<double>& y) {
    for (double& value : y) value *= 1 + 3e-5;
  });
  const absl::Status status = RunVerify(options_);
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(status.message()), HasSubstr("3.0e-05 in fp32 exceeds 1.0e-05"));
}

TEST_F(VerifyTest, LimitThatIsGivenHoldsForEveryType) {
  options_.max_error = 1e-4;
  options_.dtypes = {"fp32"};
  Serve([](std::vector<double>& y) {
    for (double& value : y) value *= 1 + 3e-5;
  });
  const absl::Status status = RunVerify(options_);
  EXPECT_TRUE(status.ok()) << status;
  options_.dtypes = {"bf16"};
  EXPECT_EQ(RunVerify(options_).code(), absl::StatusCode::kDataLoss);
}

TEST_F(VerifyTest, OneWrongRowFailsInTheCoarsestType) {
  options_.dtypes = {"bf16"};
  Serve([](std::vector<double>& y) {
    if (y.size() > kHidden) std::fill(y.begin(), y.begin() + kHidden, 0.0);
  });
  EXPECT_EQ(RunVerify(options_).code(), absl::StatusCode::kDataLoss);
}

TEST_F(VerifyTest, AnswerThatChangesFromCallToCallFails) {
  int call = 0;
  Serve([&](std::vector<double>& y) {
    for (double& value : y) value *= 1 + 1e-6 * call;
    ++call;
  });
  const absl::Status status = RunVerify(options_);
  EXPECT_THAT(std::string(status.message()), HasSubstr("different bits"));
}

TEST_F(VerifyTest, ServiceErrorNamesTheBatch) {
  service_.set_handler([](grpc::ServerContext&, const inference::ModelInferRequest&,
                          inference::ModelInferResponse&) {
    return grpc::Status(grpc::StatusCode::INTERNAL, "broken");
  });
  const absl::Status status = RunVerify(options_);
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("batch 'random' of layer 1 in fp32: broken"));
}

TEST_F(VerifyTest, CheckpointOfAnotherShapeIsRefused) {
  MakeCheckpointOptions make;
  make.output_dir = directory_.File("other");
  make.hidden = kHidden * 2;
  ASSERT_TRUE(WriteRandomCheckpoint(make, nullptr).ok());
  options_.checkpoint_dir = make.output_dir;
  EXPECT_EQ(RunVerify(options_).code(), absl::StatusCode::kFailedPrecondition);
}

TEST(VerifyJsonTest, JsonHasItsShapeAndNanIsNull) {
  VerifyRow row;
  row.dtype = "fp32";
  row.batches = 3;
  EXPECT_EQ(ErrorLimit("fp32", /*on_gpus=*/true), ErrorLimit("bf16", /*on_gpus=*/false));
  row.limit = ErrorLimit("fp32", /*on_gpus=*/false);
  row.largest_error = 1e-7;
  auto json = VerifyJson({row});
  EXPECT_EQ(json["ok"], true);
  EXPECT_EQ(json["results"][0]["largest_relative_error"], 1e-7);
  row.largest_error = std::numeric_limits<double>::infinity();
  json = VerifyJson({row});
  EXPECT_EQ(json["ok"], false);
  EXPECT_EQ(json["results"][0]["largest_relative_error"], nullptr);
}

TEST_F(VerifyTest, InferWritesWhatTheServiceAnswered) {
  RandomBatch random(5, kHidden, kExperts, kTopk);
  const std::vector<std::int64_t> ids = random.Ids(4);
  const std::vector<double> weights = random.Weights(4);
  const Tensor x = random.HiddenStates(ElementType::kF32, 4);
  const std::string input = directory_.File("in.safetensors");
  ASSERT_TRUE(WriteSafetensors(input, {{"hidden_states", x},
                                       {"topk_ids", IdTensor(ElementType::kI64, ids, kTopk)},
                                       {"topk_weights", WeightTensor(weights, kTopk)}})
                  .ok());
  InferOptions options;
  options.server = service_.target();
  options.input_path = input;
  options.output_path = directory_.File("out.safetensors");
  options.layer = 2;
  const absl::Status status = RunInfer(options);
  ASSERT_TRUE(status.ok()) << status;
  const auto output = ReadSafetensors(options.output_path);
  ASSERT_TRUE(output.ok()) << output.status();
  const auto expected = model_->Compute(2, ToDoubles(x), ids, weights);
  EXPECT_LT(RelativeL2Error(ToDoubles(output->at("hidden_states")), *expected, kHidden, {}), 1e-6);
}

TEST_F(VerifyTest, InferRefusesAFileWithoutOrWithOtherTensors) {
  InferOptions options;
  options.server = service_.target();
  options.input_path = directory_.File("in.safetensors");
  options.output_path = directory_.File("out.safetensors");
  const Tensor x = MakeTensor(ElementType::kF32, {1, 1}, {1});
  ASSERT_TRUE(WriteSafetensors(options.input_path, {{"topk_ids", x}}).ok());
  EXPECT_THAT(std::string(RunInfer(options).message()), HasSubstr("no tensor hidden_states"));
  ASSERT_TRUE(WriteSafetensors(options.input_path, {{"hidden_states", x}, {"odd", x}}).ok());
  EXPECT_THAT(std::string(RunInfer(options).message()), HasSubstr("'odd'"));
  EXPECT_FALSE(std::filesystem::exists(options.output_path));
}

class BenchTest : public VerifyTest {
 protected:
  BenchTest() {
    bench_.server = service_.target();
    bench_.tokens = 2;
    bench_.requests = 20;
    bench_.warmup = 4;
    bench_.layer = 1;
    bench_.json = true;
  }
  BenchOptions bench_;
};

TEST_F(BenchTest, ClosedLoopSendsExactlyTheRequestsAskedFor) {
  bench_.concurrency = 3;
  const absl::Status status = RunBench(bench_);
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(service_.calls(), 1 + 4 + 20);
}

TEST_F(BenchTest, OpenLoopSendsExactlyTheRequestsAskedFor) {
  bench_.rate = 2000;
  const absl::Status status = RunBench(bench_);
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(service_.calls(), 1 + 4 + 20);
}

TEST_F(BenchTest, FailedRequestsFailTheRunUnlessAllowed) {
  std::atomic<int> call{0};
  service_.set_handler([&](grpc::ServerContext& context,
                           const inference::ModelInferRequest& request,
                           inference::ModelInferResponse& response) {
    if (call.fetch_add(1) == 10) return grpc::Status(grpc::StatusCode::UNAVAILABLE, "gone");
    return FakeService::Echo(context, request, response);
  });
  const absl::Status status = RunBench(bench_);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(status.message()), HasSubstr("1 of 20 requests failed"));
  call = 0;
  bench_.allow_errors = true;
  EXPECT_TRUE(RunBench(bench_).ok());
}

}  // namespace
}  // namespace epserve::client
