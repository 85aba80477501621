// A whole coordinator in the test's own process, with fake workers and a client, over real gRPC on
// ports of its own.
#ifndef EPSERVE_TESTS_SUPPORT_COORDINATOR_FIXTURE_H_
#define EPSERVE_TESTS_SUPPORT_COORDINATOR_FIXTURE_H_

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <future>
#include <memory>
#include <string>
#include <vector>

#include "epserve/v1/admin.grpc.pb.h"
#include "inference/grpc_service.grpc.pb.h"
#include "runtime/checkpoint/model_info.h"
#include "server/coordinator/coordinator.h"
#include "tests/support/fake_worker.h"
#include "tests/support/health_watch.h"

namespace epserve::testing {

struct InferCase {
  std::vector<float> hidden;           // [T, H]
  std::vector<std::int32_t> topk_ids;  // [T, K]
  std::vector<float> topk_weights;     // [T, K]
  std::int64_t num_tokens = 0;
  std::int64_t layer = 1;
  bool routed = true;
};

struct InferReply {
  grpc::Status status;
  std::vector<float> output;
  inference::ModelInferResponse response;
};

class CoordinatorFixture : public ::testing::Test {
 protected:
  static constexpr int kRanks = 3;
  static constexpr std::int64_t kHidden = 8;
  static constexpr std::int64_t kExperts = 10;
  static constexpr int kTopk = 2;

  CoordinatorFixture();

  void StartCoordinator();
  // One that held `index` of kRanks before, so that the first epoch need not wait a lease.
  FakeWorkerOptions WorkerOptions(int index) const;
  FakeWorker& StartWorker(FakeWorkerOptions options);
  void StartWorkers();       // kRanks of them
  void StartReadyCluster();  // the coordinator and its workers, ready

  // Deterministic values, different for each seed.
  InferCase MakeCase(std::int64_t num_tokens, std::uint32_t seed) const;
  std::vector<float> Expected(const InferCase& request) const;
  InferReply Infer(const InferCase& request);
  std::future<InferReply> InferLater(const InferCase& request);

  std::shared_ptr<grpc::Channel> NewChannel() const;

  bool device_counts_ = false;  // what workers say they can
  coordinator::Options options_;
  runtime::ModelInfo model_;
  coordinator::Coordinator::Pace pace_;
  std::promise<void> drained_;
  std::unique_ptr<coordinator::Coordinator> coordinator_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<inference::GRPCInferenceService::Stub> front_door_;
  std::unique_ptr<v1::Admin::Stub> admin_;
  std::unique_ptr<HealthWatch> readiness_;
  std::vector<std::unique_ptr<FakeWorker>> workers_;
};

}  // namespace epserve::testing

#endif  // EPSERVE_TESTS_SUPPORT_COORDINATOR_FIXTURE_H_
