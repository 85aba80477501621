// The coordinator over real gRPC: workers that may not join, die, lie, stall or come late.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <latch>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "runtime/base/log.h"
#include "tests/support/coordinator_fixture.h"

namespace epserve::testing {
namespace {

using ::testing::HasSubstr;

using CoordinatorFaultsTest = CoordinatorFixture;

TEST_F(CoordinatorFaultsTest, HelloThatDiffersIsRejectedByNameOfWhatDiffers) {
  ASSERT_NO_FATAL_FAILURE(StartCoordinator());
  const std::vector<std::pair<std::string, std::function<void(v1::Hello&)>>> cases = {
      {"version", [](v1::Hello& hello) { hello.set_version("9.9.9"); }},
      {"cluster_id", [](v1::Hello& hello) { hello.set_cluster_id("other"); }},
      {"fingerprint", [](v1::Hello& hello) { hello.mutable_model()->set_fingerprint("bad"); }},
      {"max_batch_tokens", [](v1::Hello& hello) { hello.set_max_batch_tokens(13); }},
      {"num_slots", [](v1::Hello& hello) { hello.set_num_slots(5); }},
      {"give both the same --slots", [](v1::Hello& hello) { hello.clear_num_slots(); }},
      {"backend", [](v1::Hello& hello) { hello.set_backend("abacus"); }},
      {"worker_id", [](v1::Hello& hello) { hello.clear_worker_id(); }},
      {"worker_id 'w\\n0'", [](v1::Hello& hello) { hello.set_worker_id("w\n0"); }},
      {"of 65 bytes", [](v1::Hello& hello) { hello.set_worker_id(std::string(65, 'w')); }},
      {"incarnation", [](v1::Hello& hello) { hello.clear_incarnation(); }},
  };
  for (const auto& [name, change] : cases) {
    FakeWorkerOptions options = WorkerOptions(0);
    change(options.hello);
    FakeWorker& worker = StartWorker(std::move(options));
    v1::CoordinatorMessage message;
    ASSERT_TRUE(worker.WaitFor(v1::CoordinatorMessage::kRejected, &message)) << name;
    EXPECT_EQ(message.rejected().code(), static_cast<int>(absl::StatusCode::kInvalidArgument));
    EXPECT_THAT(message.rejected().message(), HasSubstr(name));
    ASSERT_TRUE(worker.WaitClosed());
    EXPECT_EQ(worker.status().error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  }
  grpc::ClientContext context;
  v1::ClusterStatus status;
  ASSERT_TRUE(admin_->GetClusterStatus(&context, {}, &status).ok());
  EXPECT_EQ(status.workers_size(), 0);
}

TEST_F(CoordinatorFaultsTest, PatchVersionMayDiffer) {
  FakeWorkerOptions options = WorkerOptions(0);
  options.hello.set_version("0.1.99");
  ASSERT_NO_FATAL_FAILURE(StartCoordinator());
  EXPECT_TRUE(StartWorker(std::move(options)).WaitFor(v1::CoordinatorMessage::kAssignment));
}

TEST_F(CoordinatorFaultsTest, StreamThatDoesNotBeginWithHelloIsClosed) {
  ASSERT_NO_FATAL_FAILURE(StartCoordinator());
  auto stub = v1::Control::NewStub(channel_);
  grpc::ClientContext context;
  auto stream = stub->Connect(&context);
  v1::WorkerMessage message;
  message.mutable_loaded()->set_rank(0);
  stream->Write(message);
  v1::CoordinatorMessage answer;
  EXPECT_FALSE(stream->Read(&answer));
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::FAILED_PRECONDITION);
}

TEST_F(CoordinatorFaultsTest, StreamWithoutHelloIsClosedInTimeAndJoinedOnesStay) {
  pace_.hello_timeout_ms = 3000;  // The workers, too, must say theirs by then.
  ASSERT_NO_FATAL_FAILURE(StartReadyCluster());
  auto stub = v1::Control::NewStub(channel_);
  grpc::ClientContext context;
  auto stream = stub->Connect(&context);
  v1::CoordinatorMessage answer;
  EXPECT_FALSE(stream->Read(&answer));
  const grpc::Status status = stream->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_THAT(status.error_message(), HasSubstr("no Hello"));
  // The workers' streams are older.
  EXPECT_TRUE(Infer(MakeCase(3, 1)).status.ok());
}

TEST_F(CoordinatorFaultsTest, LostWorkerIsLoggedFieldByField) {
  ::testing::internal::CaptureStderr();
  ASSERT_NO_FATAL_FAILURE(StartReadyCluster());
  workers_[1]->Kill();
  EXPECT_TRUE(readiness_->WaitFor(false));
  runtime::FlushLog();
  EXPECT_THAT(::testing::internal::GetCapturedStderr(),
              HasSubstr(" worker_lost worker=w1 rank=1 reason=\"its stream closed\"\n"));
}

TEST_F(CoordinatorFaultsTest, SecondHelloOnOneStreamClosesIt) {
  ASSERT_NO_FATAL_FAILURE(StartReadyCluster());
  v1::WorkerMessage message;
  *message.mutable_hello() = WorkerOptions(0).hello;
  workers_[0]->Send(message);
  ASSERT_TRUE(workers_[0]->WaitClosed());
  EXPECT_EQ(workers_[0]->status().error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_TRUE(readiness_->WaitFor(false));
}

TEST_F(CoordinatorFaultsTest, WorkerLostMidBatchFailsRequestsUnavailableAndReturnsToServe) {
  options_.lease_ms = 300'000;  // Much longer than this test waits for anything.
  ASSERT_NO_FATAL_FAILURE(StartCoordinator());
  auto reached = std::make_shared<std::latch>(1);
  FakeWorkerOptions silent = WorkerOptions(1);
  silent.on_shard = [reached](const v1::Shard& shard, v1::BatchDone*) {
    if (shard.batch() == 1) return true;
    reached->count_down();
    return false;
  };
  StartWorker(WorkerOptions(0));
  FakeWorker& dying = StartWorker(std::move(silent));
  StartWorker(WorkerOptions(2));
  ASSERT_TRUE(readiness_->WaitFor(true));
  auto in_flight = InferLater(MakeCase(6, 1));
  reached->wait();
  const auto begin = std::chrono::steady_clock::now();
  dying.Kill();
  const InferReply reply = in_flight.get();
  EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(60));
  EXPECT_TRUE(readiness_->WaitFor(false));
  EXPECT_TRUE(workers_[0]->WaitFor(v1::CoordinatorMessage::kEpochEnded));

  // The same process comes back: its lease need not run out.
  FakeWorkerOptions returned = WorkerOptions(1);
  returned.hello.set_last_epoch(8);
  StartWorker(std::move(returned));
  ASSERT_TRUE(readiness_->WaitFor(true));
  const InferCase request = MakeCase(6, 2);
  EXPECT_EQ(Infer(request).output, Expected(request));
}

TEST_F(CoordinatorFaultsTest, OutputOfTheWrongSizeIsInternalAndEndsTheEpoch) {
  ASSERT_NO_FATAL_FAILURE(StartCoordinator());
  FakeWorkerOptions wrong = WorkerOptions(2);
  wrong.on_shard = [](const v1::Shard& shard, v1::BatchDone* done) {
    if (shard.batch() > 1) done->mutable_output()->resize(done->output().size() - 4);
    return true;
  };
  StartWorker(WorkerOptions(0));
  StartWorker(WorkerOptions(1));
  FakeWorker& liar = StartWorker(std::move(wrong));
  ASSERT_TRUE(readiness_->WaitFor(true));
  const InferReply reply = Infer(MakeCase(6, 1));
  EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::INTERNAL);
  EXPECT_THAT(reply.status.error_message(), HasSubstr("60 bytes"));
  EXPECT_TRUE(readiness_->WaitFor(false));
  EXPECT_TRUE(workers_[0]->WaitFor(v1::CoordinatorMessage::kEpochEnded));
  EXPECT_TRUE(liar.WaitClosed());
}

TEST_F(CoordinatorFaultsTest, ErrorOfOneWorkerFailsItsBatchAlone) {
  ASSERT_NO_FATAL_FAILURE(StartCoordinator());
  FakeWorkerOptions failing = WorkerOptions(0);
  failing.on_shard = [](const v1::Shard& shard, v1::BatchDone* done) {
    if (shard.batch() == 2) {
      done->set_code(static_cast<int>(absl::StatusCode::kInternal));
      done->set_message("weights lost");
      done->clear_output();
    }
    return true;
  };
  StartWorker(std::move(failing));
  StartWorker(WorkerOptions(1));
  StartWorker(WorkerOptions(2));
  ASSERT_TRUE(readiness_->WaitFor(true));
  const InferReply failed = Infer(MakeCase(6, 1));
  EXPECT_EQ(failed.status.error_code(), grpc::StatusCode::INTERNAL);
  EXPECT_THAT(failed.status.error_message(), HasSubstr("weights lost"));
  const InferCase request = MakeCase(6, 2);
  EXPECT_EQ(Infer(request).output, Expected(request));
}

TEST_F(CoordinatorFaultsTest, MessagesOfAnOldEpochOrUnknownBatchChangeNothing) {
  ASSERT_NO_FATAL_FAILURE(StartReadyCluster());
  v1::CoordinatorMessage started;
  ASSERT_TRUE(workers_[0]->WaitFor(v1::CoordinatorMessage::kEpochStarted, &started));
  const std::uint64_t epoch = started.epoch_started().epoch();
  for (const auto& [of_epoch, of_batch] :
       {std::pair<std::uint64_t, std::uint64_t>{epoch - 1, 1}, {epoch, 1}, {epoch, 999}}) {
    v1::WorkerMessage stale;
    stale.mutable_batch_done()->set_epoch(of_epoch);
    stale.mutable_batch_done()->set_batch(of_batch);
    stale.mutable_batch_done()->set_code(static_cast<int>(absl::StatusCode::kAborted));
    stale.mutable_batch_done()->set_message("late");
    workers_[0]->Send(stale);
    stale.mutable_batch_done()->set_code(0);
    stale.mutable_batch_done()->set_output("junk");
    workers_[0]->Send(stale);
  }
  const InferCase request = MakeCase(6, 1);
  EXPECT_EQ(Infer(request).output, Expected(request));
  EXPECT_EQ(readiness_->seen(), (std::vector<bool>{false, true}));
}

TEST_F(CoordinatorFaultsTest, WorkerWithoutHeartbeatIsLost) {
  options_.lease_ms = 300;
  ASSERT_NO_FATAL_FAILURE(StartCoordinator());
  StartWorker(WorkerOptions(0));
  StartWorker(WorkerOptions(1));
  FakeWorkerOptions mute = WorkerOptions(2);
  mute.heartbeat_ms = 0;
  FakeWorker& worker = StartWorker(std::move(mute));
  ASSERT_TRUE(worker.WaitClosed());
  EXPECT_TRUE(readiness_->WaitFor(false));
  EXPECT_EQ(Infer(MakeCase(1, 1)).status.error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST_F(CoordinatorFaultsTest, FourthWorkerStandsByAndTakesOverALostRank) {
  options_.lease_ms = 2000;
  ASSERT_NO_FATAL_FAILURE(StartReadyCluster());
  FakeWorkerOptions spare = WorkerOptions(3);
  spare.hello.set_last_epoch(0);
  spare.hello.set_held_rank(-1);
  FakeWorker& standby = StartWorker(std::move(spare));
  ASSERT_TRUE(standby.WaitFor(v1::CoordinatorMessage::kStandby));
  workers_[1]->Kill();
  ASSERT_TRUE(readiness_->WaitFor(false));
  v1::CoordinatorMessage assigned;
  ASSERT_TRUE(standby.WaitFor(v1::CoordinatorMessage::kAssignment, &assigned));
  EXPECT_EQ(assigned.assignment().rank(), 1);
  ASSERT_TRUE(readiness_->WaitFor(true));
  const InferCase request = MakeCase(6, 1);
  EXPECT_EQ(Infer(request).output, Expected(request));
}

}  // namespace
}  // namespace epserve::testing
