// The coordinator over real gRPC: joining, serving, merging, and its services, with fake workers.
#include "server/coordinator/coordinator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <latch>
#include <memory>
#include <string>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "runtime/base/unique_fd.h"
#include "tests/support/coordinator_fixture.h"

namespace epserve::testing {
namespace {

using ::testing::AnyOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

using CoordinatorTest = CoordinatorFixture;

TEST_F(CoordinatorTest, IsReadyOnceEveryWorkerHasJoinedAndTheProbeWasRight) {
  ASSERT_NO_FATAL_FAILURE(StartCoordinator());
  ASSERT_TRUE(readiness_->WaitFor(false));
  EXPECT_EQ(CheckHealth(channel_, "liveness"), 1);
  EXPECT_EQ(CheckHealth(channel_, ""), 2);
  StartWorkers();
  ASSERT_TRUE(readiness_->WaitFor(true));
  EXPECT_EQ(CheckHealth(channel_, ""), 1);
  EXPECT_THAT(readiness_->seen(), ElementsAre(false, true));
  for (auto& worker : workers_) {
    EXPECT_EQ(worker->NumReceived(v1::CoordinatorMessage::kShard, 1), 1) << "the probe";
    EXPECT_TRUE(worker->WaitFor(v1::CoordinatorMessage::kLease));
  }
}

TEST_F(CoordinatorTest, ProbeShardsCarryDocumentedRowsAndRouting) {
  ASSERT_NO_FATAL_FAILURE(StartReadyCluster());
  v1::CoordinatorMessage message;
  ASSERT_TRUE(workers_[1]->WaitFor(v1::CoordinatorMessage::kShard, &message));
  EXPECT_EQ(message.shard().num_tokens(), 2);
  EXPECT_EQ(message.shard().layer(), 1);
  EXPECT_EQ(message.shard().batch(), 1u);
  EXPECT_EQ(message.shard().row_type(), v1::ROW_TYPE_FP32);
  EXPECT_EQ(message.shard().hidden().size(), 2 * kHidden * sizeof(float));
  EXPECT_EQ(message.shard().counts().rows_size(), kRanks * kRanks);
}

TEST_F(CoordinatorTest, WrongProbeEndsItsEpochAndTheNextRightOneServes) {
  ASSERT_NO_FATAL_FAILURE(StartCoordinator());
  FakeWorkerOptions wrong_once = WorkerOptions(1);
  auto first = std::make_shared<bool>(true);
  wrong_once.on_probe_output = [first](v1::PeersOpened* opened) {
    if (std::exchange(*first, false)) opened->set_probe_output(0, opened->probe_output(0) + 1.0f);
  };
  StartWorker(WorkerOptions(0));
  FakeWorker& wrong = StartWorker(std::move(wrong_once));
  StartWorker(WorkerOptions(2));
  v1::CoordinatorMessage ended;
  ASSERT_TRUE(wrong.WaitFor(v1::CoordinatorMessage::kEpochEnded, &ended));
  EXPECT_THAT(ended.epoch_ended().reason(), HasSubstr("probe"));
  ASSERT_TRUE(readiness_->WaitFor(true));
  EXPECT_EQ(wrong.NumReceived(v1::CoordinatorMessage::kShard, 2), 2);
}

class CoordinatorRoutingTest : public CoordinatorFixture,
                               public ::testing::WithParamInterface<std::tuple<bool, bool>> {};

TEST_P(CoordinatorRoutingTest, EverySizeComesBackRight) {
  const auto [routed, separate] = GetParam();
  options_.separate_triggers = separate;
  ASSERT_NO_FATAL_FAILURE(StartReadyCluster());
  for (std::int64_t num_tokens : {0, 1, 2, 3, 7, 12}) {
    InferCase request = MakeCase(num_tokens, static_cast<std::uint32_t>(num_tokens) + 1);
    request.routed = routed;
    request.layer = num_tokens % 2 == 0 ? 1 : 3;
    const InferReply reply = Infer(request);
    ASSERT_TRUE(reply.status.ok()) << reply.status.error_message();
    EXPECT_EQ(reply.output, Expected(request)) << num_tokens << " tokens";
  }
}

INSTANTIATE_TEST_SUITE_P(RoutedAndTrigger, CoordinatorRoutingTest,
                         ::testing::Combine(::testing::Bool(), ::testing::Bool()));

TEST_F(CoordinatorTest, WorkersThatExchangeCountsAreSentNoMatrix) {
  options_.count_exchange = "device";
  device_counts_ = true;
  ASSERT_NO_FATAL_FAILURE(StartReadyCluster());
  for (const bool routed : {true, false}) {
    InferCase request = MakeCase(7, 1);
    request.routed = routed;
    const InferReply reply = Infer(request);
    ASSERT_TRUE(reply.status.ok()) << reply.status.error_message();
    EXPECT_EQ(reply.output, Expected(request));
  }
  v1::CoordinatorMessage probe;
  ASSERT_TRUE(workers_[0]->WaitFor(v1::CoordinatorMessage::kShard, &probe));
  EXPECT_TRUE(probe.shard().device_counts());
  EXPECT_FALSE(probe.shard().has_counts());
  EXPECT_EQ(workers_[0]->NumReceived(v1::CoordinatorMessage::kShard, 3), 3);
  EXPECT_EQ(workers_[0]->NumReceived(v1::CoordinatorMessage::kCountMatrix, 0), 0);
}

TEST_F(CoordinatorTest, WorkerThatCannotExchangeCountsIsRejectedWhereAllMust) {
  options_.count_exchange = "device";
  ASSERT_NO_FATAL_FAILURE(StartCoordinator());
  FakeWorker& worker = StartWorker(WorkerOptions(0));
  v1::CoordinatorMessage rejected;
  ASSERT_TRUE(worker.WaitFor(v1::CoordinatorMessage::kRejected, &rejected));
  EXPECT_EQ(rejected.rejected().code(), static_cast<int>(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(rejected.rejected().message(), HasSubstr("do not exchange counts"));
}

TEST_F(CoordinatorTest, MergedRequestsEachGetTheirOwnRows) {
  options_.batch_window_us = 10'000'000;  // Only a full batch starts.
  ASSERT_NO_FATAL_FAILURE(StartReadyCluster());
  const InferCase first = MakeCase(5, 1);
  const InferCase second = MakeCase(4, 2);
  const InferCase third = MakeCase(3, 3);
  auto later_first = InferLater(first);
  auto later_second = InferLater(second);
  const InferReply third_reply = Infer(third);
  const InferReply first_reply = later_first.get();
  const InferReply second_reply = later_second.get();
  for (const InferReply* reply : {&first_reply, &second_reply, &third_reply}) {
    ASSERT_TRUE(reply->status.ok()) << reply->status.error_message();
  }
  EXPECT_EQ(first_reply.output, Expected(first));
  EXPECT_EQ(second_reply.output, Expected(second));
  EXPECT_EQ(third_reply.output, Expected(third));
  EXPECT_EQ(workers_[0]->NumReceived(v1::CoordinatorMessage::kShard, 2), 2)
      << "probe and one batch";
}

TEST_F(CoordinatorTest, MergedBatchStartsBesideOneInFlightOnceNothingElseHasCome) {
  options_.merge_queued = true;
  options_.max_batch_tokens = 80;  // so that there are batches that are not small
  ASSERT_NO_FATAL_FAILURE(StartCoordinator());
  FakeWorkerOptions silent = WorkerOptions(0);  // but for the probe
  silent.on_shard = [](const v1::Shard& shard, v1::BatchDone*) { return shard.batch() == 1; };
  StartWorker(std::move(silent));
  StartWorker(WorkerOptions(1));
  StartWorker(WorkerOptions(2));
  ASSERT_TRUE(readiness_->WaitFor(true));
  auto first = InferLater(MakeCase(70, 1));
  EXPECT_EQ(workers_[0]->NumReceived(v1::CoordinatorMessage::kShard, 2), 2);
  auto second = InferLater(MakeCase(70, 2));
  EXPECT_EQ(workers_[0]->NumReceived(v1::CoordinatorMessage::kShard, 3), 3)
      << "the second batch waits for the first one's end";
  coordinator_->Stop();
  EXPECT_EQ(first.get().status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(second.get().status.error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST_F(CoordinatorTest, WorkersWithoutRowsHearNothingOfABatch) {
  ASSERT_NO_FATAL_FAILURE(StartReadyCluster());
  InferCase request = MakeCase(1, 1);
  request.topk_ids = {0, 4};  // of ranks 0, which holds the token, and 1
  const InferReply reply = Infer(request);
  ASSERT_TRUE(reply.status.ok()) << reply.status.error_message();
  EXPECT_EQ(reply.output, Expected(request));
  request.topk_ids = {-1, -1};
  ASSERT_TRUE(Infer(request).status.ok());
  const InferReply all = Infer(MakeCase(6, 2));
  ASSERT_TRUE(all.status.ok()) << all.status.error_message();
  // Beside the probe and the last batch.
  EXPECT_EQ(workers_[0]->NumReceived(v1::CoordinatorMessage::kShard, 4), 4);
  EXPECT_EQ(workers_[1]->NumReceived(v1::CoordinatorMessage::kShard, 3), 3);
  EXPECT_EQ(workers_[2]->NumReceived(v1::CoordinatorMessage::kShard, 2), 2);
}

TEST_F(CoordinatorTest, PeersOfASingleSourceAreSentTheirShardsWithItsCounts) {
  ASSERT_NO_FATAL_FAILURE(StartReadyCluster());
  InferCase request = MakeCase(3, 1);
  request.routed = false;
  const InferReply reply = Infer(request);
  ASSERT_TRUE(reply.status.ok()) << reply.status.error_message();
  EXPECT_EQ(reply.output, Expected(request));
  // Rank 2 is the second batch's source; the fakes route all rows to experts of rank 0.
  v1::CoordinatorMessage source;
  ASSERT_TRUE(workers_[2]->WaitFor(v1::CoordinatorMessage::kShard, &source, /*skipped=*/1));
  EXPECT_EQ(source.shard().num_tokens(), 3);
  EXPECT_FALSE(source.shard().has_counts());
  EXPECT_EQ(workers_[2]->NumReceived(v1::CoordinatorMessage::kCountMatrix, 1), 1);
  v1::CoordinatorMessage peer;
  ASSERT_TRUE(workers_[0]->WaitFor(v1::CoordinatorMessage::kShard, &peer, /*skipped=*/1));
  EXPECT_EQ(peer.shard().num_tokens(), 0);
  EXPECT_TRUE(peer.shard().has_counts());
  EXPECT_EQ(workers_[0]->NumReceived(v1::CoordinatorMessage::kCountMatrix, 0), 0);
  EXPECT_EQ(workers_[1]->NumReceived(v1::CoordinatorMessage::kShard, 1), 1) << "the probe's alone";
}

TEST_F(CoordinatorTest, WorkersOnGpusTakePartInEveryBatch) {
  ASSERT_NO_FATAL_FAILURE(StartCoordinator());
  for (int i = 0; i < kRanks; ++i) {
    FakeWorkerOptions options = WorkerOptions(i);
    options.hello.set_backend("cuda");
    StartWorker(std::move(options));
  }
  ASSERT_TRUE(readiness_->WaitFor(true));
  InferCase request = MakeCase(1, 1);
  request.topk_ids = {0, 0};
  ASSERT_TRUE(Infer(request).status.ok());
  for (auto& worker : workers_) {
    EXPECT_EQ(worker->NumReceived(v1::CoordinatorMessage::kShard, 2), 2);
  }
}

TEST_F(CoordinatorTest, ReplyTellsTheTimesAndTheEpoch) {
  ASSERT_NO_FATAL_FAILURE(StartReadyCluster());
  const InferReply reply = Infer(MakeCase(6, 1));
  ASSERT_TRUE(reply.status.ok()) << reply.status.error_message();
  const auto& parameters = reply.response.parameters();
  EXPECT_EQ(parameters.at("epserve_ffn_us").int64_param(), 1);
  v1::CoordinatorMessage started;
  ASSERT_TRUE(workers_[0]->WaitFor(v1::CoordinatorMessage::kEpochStarted, &started));
  EXPECT_EQ(parameters.at("epserve_epoch").int64_param(),
            static_cast<std::int64_t>(started.epoch_started().epoch()));
}

TEST_F(CoordinatorTest, RequestBeforeReadinessIsUnavailableAndSaysHowManyExpertsLack) {
  ASSERT_NO_FATAL_FAILURE(StartCoordinator());
  const InferReply reply = Infer(MakeCase(1, 1));
  EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(reply.status.error_message(),
              HasSubstr("10 of 10 experts have no live worker (0 of 3 workers joined)"));
}

TEST_F(CoordinatorTest, AdminDescribesClusterPlacementAndLoad) {
  ASSERT_NO_FATAL_FAILURE(StartReadyCluster());
  ASSERT_TRUE(Infer(MakeCase(6, 1)).status.ok());

  grpc::ClientContext status_context;
  v1::ClusterStatus status;
  ASSERT_TRUE(admin_->GetClusterStatus(&status_context, {}, &status).ok());
  EXPECT_EQ(status.state(), "serving");
  EXPECT_EQ(status.model(), "tiny");
  EXPECT_EQ(status.version(), EPSERVE_VERSION);
  EXPECT_EQ(status.num_experts(), kExperts);
  EXPECT_EQ(status.experts_without_worker(), 0);
  EXPECT_EQ(status.requests_ok(), 1u);
  ASSERT_EQ(status.workers_size(), kRanks);
  EXPECT_EQ(status.workers(1).worker_id(), "w1");
  EXPECT_EQ(status.workers(1).node(), "node-a");
  EXPECT_EQ(status.workers(1).pid(), 1001);
  EXPECT_EQ(status.workers(1).state(), "serving");
  EXPECT_EQ(status.workers(1).backend(), "host");
  EXPECT_EQ(status.workers(1).load_fraction(), 1.0);
  EXPECT_EQ(status.workers(1).weight_bytes(), 1000u);
  EXPECT_EQ(status.workers(1).batches(), 1u);
  EXPECT_EQ(status.workers(0).expert_rows(), 4u) << "one row for each of its four experts";

  grpc::ClientContext placement_context;
  v1::Placement placement;
  ASSERT_TRUE(admin_->GetPlacement(&placement_context, {}, &placement).ok());
  ASSERT_EQ(placement.ranges_size(), kRanks);
  EXPECT_EQ(placement.ranges(0).num_experts(), 4);
  EXPECT_EQ(placement.ranges(2).first_expert(), 7);
  EXPECT_EQ(placement.ranges(2).worker_id(), "w2");

  for (const auto& [layer, rows] : {std::pair<int, std::uint64_t>{1, 1}, {3, 0}, {-1, 1}}) {
    grpc::ClientContext context;
    v1::GetExpertLoadRequest request;
    request.set_layer(layer);
    v1::ExpertLoad load;
    ASSERT_TRUE(admin_->GetExpertLoad(&context, request, &load).ok());
    ASSERT_EQ(load.rows_size(), kExperts);
    EXPECT_EQ(load.rows(9), rows) << "layer " << layer;
  }
  grpc::ClientContext unknown_context;
  v1::GetExpertLoadRequest unknown;
  unknown.set_layer(2);
  v1::ExpertLoad load;
  EXPECT_EQ(admin_->GetExpertLoad(&unknown_context, unknown, &load).error_code(),
            grpc::StatusCode::NOT_FOUND);
}

TEST_F(CoordinatorTest, DrainedWorkerIsShutDownAndTheServiceCeasesToBeReady) {
  ASSERT_NO_FATAL_FAILURE(StartReadyCluster());
  v1::DrainWorkerResponse response;
  v1::DrainWorkerRequest request;
  grpc::ClientContext unnamed_context;
  EXPECT_EQ(admin_->DrainWorker(&unnamed_context, request, &response).error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
  request.set_worker_id("nobody");
  grpc::ClientContext unknown_context;
  const grpc::Status unknown = admin_->DrainWorker(&unknown_context, request, &response);
  EXPECT_EQ(unknown.error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_THAT(unknown.error_message(), HasSubstr("'nobody'"));

  request.set_worker_id("w2");
  grpc::ClientContext context;
  const grpc::Status drained = admin_->DrainWorker(&context, request, &response);
  EXPECT_TRUE(drained.ok()) << drained.error_message();
  EXPECT_TRUE(workers_[2]->WaitFor(v1::CoordinatorMessage::kShutdown));
  EXPECT_TRUE(readiness_->WaitFor(false));
}

TEST_F(CoordinatorTest, DrainFinishesWhatIsInFlightAndRefusesWhatComes) {
  ASSERT_NO_FATAL_FAILURE(StartCoordinator());
  auto held = std::make_shared<std::latch>(1);
  auto reached = std::make_shared<std::latch>(1);
  FakeWorkerOptions holding = WorkerOptions(0);
  holding.on_shard = [held, reached](const v1::Shard& shard, v1::BatchDone*) {
    if (shard.batch() > 1) {
      reached->count_down();
      held->wait();
    }
    return true;
  };
  StartWorker(std::move(holding));
  StartWorker(WorkerOptions(1));
  StartWorker(WorkerOptions(2));
  ASSERT_TRUE(readiness_->WaitFor(true));
  const InferCase request = MakeCase(6, 1);
  auto in_flight = InferLater(request);
  reached->wait();
  coordinator_->Drain();
  ASSERT_TRUE(readiness_->WaitFor(false));
  EXPECT_EQ(Infer(MakeCase(1, 2)).status.error_code(), grpc::StatusCode::UNAVAILABLE);
  held->count_down();
  const InferReply reply = in_flight.get();
  EXPECT_TRUE(reply.status.ok()) << reply.status.error_message();
  EXPECT_EQ(reply.output, Expected(request));
  drained_.get_future().wait();
  EXPECT_EQ(workers_[0]->NumReceived(v1::CoordinatorMessage::kShutdown, 0), 0)
      << "workers outlive their coordinator";
}

TEST_F(CoordinatorTest, StopAnswersWhatIsInFlight) {
  ASSERT_NO_FATAL_FAILURE(StartCoordinator());
  auto reached = std::make_shared<std::latch>(1);
  FakeWorkerOptions silent = WorkerOptions(0);
  silent.on_shard = [reached](const v1::Shard& shard, v1::BatchDone*) {
    if (shard.batch() == 1) return true;
    reached->count_down();
    return false;
  };
  StartWorker(std::move(silent));
  StartWorker(WorkerOptions(1));
  StartWorker(WorkerOptions(2));
  ASSERT_TRUE(readiness_->WaitFor(true));
  auto in_flight = InferLater(MakeCase(6, 1));
  reached->wait();
  coordinator_->Stop();
  EXPECT_EQ(in_flight.get().status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_TRUE(workers_[0]->WaitClosed());
}

TEST_F(CoordinatorTest, UnixSocketThatIsServedIsRefusedAndItsServerServesOn) {
  const std::string address = absl::StrCat("unix:", ::testing::TempDir(), "eps-", ::getpid());
  options_.listen = {"127.0.0.1:0", address};
  ASSERT_NO_FATAL_FAILURE(StartCoordinator());
  auto second = coordinator::Coordinator::Create(
      options_, model_, [] {}, pace_);
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(second.status().message()), HasSubstr(address));
  EXPECT_THAT(std::string(second.status().message()), HasSubstr("served by another process"));
  EXPECT_EQ(
      CheckHealth(grpc::CreateChannel(address, grpc::InsecureChannelCredentials()), "liveness"), 1);
}

TEST_F(CoordinatorTest, UnixSocketThatCannotBeIsRefusedSayingWhy) {
  const auto refusal = [&](const std::string& path) {
    options_.listen = {"127.0.0.1:0", absl::StrCat("unix:", path)};
    const auto created = coordinator::Coordinator::Create(
        options_, model_, [] {}, pace_);
    return std::string(created.status().message());
  };
  const std::string nowhere = absl::StrCat(::testing::TempDir(), "eps-nowhere-", ::getpid());
  EXPECT_THAT(refusal(nowhere + "/socket"),
              ::testing::AllOf(HasSubstr("directory " + nowhere),
                               HasSubstr("No such file or directory"), HasSubstr("--listen")));
  EXPECT_THAT(refusal("/tmp/" + std::string(115, 'x')),
              HasSubstr("has 120 bytes, a Unix socket's at most 107"));
}

TEST_F(CoordinatorTest, UnixSocketThatADeadServerLeftIsTakenOver) {
  const std::string path = absl::StrCat(::testing::TempDir(), "eps-stale-", ::getpid());
  sockaddr_un stale{};
  stale.sun_family = AF_UNIX;
  ASSERT_LT(path.size(), sizeof(stale.sun_path));
  path.copy(stale.sun_path, path.size());
  {
    const runtime::UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    ASSERT_EQ(::bind(fd.get(), reinterpret_cast<sockaddr*>(&stale), sizeof(stale)), 0);
  }
  const std::string address = absl::StrCat("unix:", path);
  options_.listen = {"127.0.0.1:0", address};
  ASSERT_NO_FATAL_FAILURE(StartCoordinator());
  EXPECT_EQ(
      CheckHealth(grpc::CreateChannel(address, grpc::InsecureChannelCredentials()), "liveness"), 1);
}

TEST_F(CoordinatorTest, TakenPortsAreRefusedByName) {
  ASSERT_NO_FATAL_FAILURE(StartCoordinator());
  coordinator::Options second = options_;
  second.listen = {absl::StrCat("127.0.0.1:", coordinator_->ports().front())};
  auto created = coordinator::Coordinator::Create(
      second, model_, [] {}, pace_);
  EXPECT_EQ(created.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(created.status().message()), HasSubstr(second.listen.front()));

  second.listen = {"127.0.0.1:0"};
  second.metrics_listen = absl::StrCat("127.0.0.1:", coordinator_->metrics_port());
  created = coordinator::Coordinator::Create(
      second, model_, [] {}, pace_);
  EXPECT_EQ(created.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(created.status().message()), HasSubstr("--metrics-listen"));
}

}  // namespace
}  // namespace epserve::testing
