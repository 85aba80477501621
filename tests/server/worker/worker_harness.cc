#include "tests/server/worker/worker_harness.h"

#include <gmock/gmock.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <utility>

namespace epserve::worker {
namespace {

constexpr int kTokens = 3;
constexpr int kRanks = 2;

void FillCounts(v1::CountMatrix& counts, std::uint64_t epoch, std::uint64_t batch,
                Routing routing) {
  counts.set_epoch(epoch);
  counts.set_batch(batch);
  const int to_rank_1 = routing == Routing::kRouted ? kTokens : 0;
  for (const int rows : {0, 0, kTokens, to_rank_1}) counts.add_rows(rows);
  for (int expert = 0; expert < FakeEngine::kExperts; ++expert) {
    counts.add_rows_per_expert(expert == 0 ? kTokens : expert == 5 ? to_rank_1 : 0);
  }
}

}  // namespace

v1::CoordinatorMessage AssignmentMessage(int rank) {
  v1::CoordinatorMessage message;
  message.mutable_assignment()->set_rank(rank);
  message.mutable_assignment()->set_num_ranks(kRanks);
  for (const int first : {0, 4, 8}) message.mutable_assignment()->add_first_expert(first);
  return message;
}

v1::CoordinatorMessage StandbyMessage() {
  v1::CoordinatorMessage message;
  message.mutable_standby()->set_reason("every rank is taken");
  return message;
}

v1::CoordinatorMessage CreateHeapMessage(std::uint64_t epoch) {
  v1::CoordinatorMessage message;
  message.mutable_create_heap()->set_epoch(epoch);
  return message;
}

v1::CoordinatorMessage OpenPeersMessage(std::uint64_t epoch) {
  v1::CoordinatorMessage message;
  message.mutable_open_peers()->set_epoch(epoch);
  message.mutable_open_peers()->add_handles("peer");
  message.mutable_open_peers()->add_handles("own");
  return message;
}

v1::CoordinatorMessage EpochStartedMessage(std::uint64_t epoch) {
  v1::CoordinatorMessage message;
  message.mutable_epoch_started()->set_epoch(epoch);
  return message;
}

v1::CoordinatorMessage EpochEndedMessage(std::uint64_t epoch) {
  v1::CoordinatorMessage message;
  message.mutable_epoch_ended()->set_epoch(epoch);
  message.mutable_epoch_ended()->set_reason("a worker was lost");
  return message;
}

v1::CoordinatorMessage DispatchTriggerMessage(std::uint64_t epoch, std::uint64_t batch) {
  v1::CoordinatorMessage message;
  message.mutable_dispatch_trigger()->set_epoch(epoch);
  message.mutable_dispatch_trigger()->set_batch(batch);
  return message;
}

v1::CoordinatorMessage CombineTriggerMessage(std::uint64_t epoch, std::uint64_t batch) {
  v1::CoordinatorMessage message;
  message.mutable_combine_trigger()->set_epoch(epoch);
  message.mutable_combine_trigger()->set_batch(batch);
  return message;
}

v1::CoordinatorMessage RejectedMessage(const std::string& text) {
  v1::CoordinatorMessage message;
  message.mutable_rejected()->set_code(static_cast<int>(absl::StatusCode::kInvalidArgument));
  message.mutable_rejected()->set_message(text);
  return message;
}

v1::CoordinatorMessage ShutdownMessage() {
  v1::CoordinatorMessage message;
  message.mutable_shutdown()->set_reason("drained");
  return message;
}

std::string ShardRows(std::uint64_t batch) {
  return std::string(kTokens * FakeEngine::kHidden * sizeof(float),
                     static_cast<char>('a' + batch % 26));
}

v1::CoordinatorMessage ShardMessage(std::uint64_t epoch, std::uint64_t batch, int slot,
                                    Routing routing) {
  v1::CoordinatorMessage message;
  v1::Shard& shard = *message.mutable_shard();
  shard.set_epoch(epoch);
  shard.set_batch(batch);
  shard.set_slot(slot);
  shard.set_layer(FakeEngine::kFirstLayer);
  shard.set_row_type(v1::ROW_TYPE_FP32);
  shard.set_num_tokens(kTokens);
  shard.set_topk(FakeEngine::kTopk);
  shard.set_hidden(ShardRows(batch));
  if (routing == Routing::kByWorker) return message;
  shard.set_routed(true);
  std::vector<std::int32_t> ids;
  for (int t = 0; t < kTokens; ++t) ids.insert(ids.end(), {0, 5});
  const std::vector<float> weights(ids.size(), 0.5f);
  shard.set_topk_ids(ids.data(), ids.size() * sizeof(ids[0]));
  shard.set_topk_weights(weights.data(), weights.size() * sizeof(weights[0]));
  FillCounts(*shard.mutable_counts(), epoch, batch, routing);
  return message;
}

v1::CoordinatorMessage CountMatrixMessage(std::uint64_t epoch, std::uint64_t batch) {
  v1::CoordinatorMessage message;
  FillCounts(*message.mutable_count_matrix(), epoch, batch, Routing::kByWorker);
  return message;
}

WorkerTest::WorkerTest() {
  std::string name = std::filesystem::temp_directory_path() / "epserve-worker-XXXXXX";
  dir_ = mkdtemp(name.data());
  config_.coordinator.target = "unix:" + dir_ + "/coordinator";
  config_.worker_id = "w1";
  config_.cluster_id = "test";
  config_.version = "1.2.3";
  config_.node = "here";
  config_.max_batch_tokens = 16;
  config_.num_slots = 2;
  config_.now_us = [this] { return now_us_.load(); };
  config_.available_memory = [] {
    return AvailableMemory{.memory_bytes = 1 << 20, .memory_limit = "test", .shm_bytes = 1 << 20};
  };
  owned_engine_ = std::make_unique<FakeEngine>();
  engine_ = owned_engine_.get();
  engine_->set_runs_on_any_thread(true);  // as CPU engines do
}

WorkerTest::~WorkerTest() {
  if (thread_.joinable()) {
    StopCoordinator();
    engine_->Release("load");
    worker_->RequestLeave("end of test");
    thread_.join();
    EXPECT_THAT(engine_->violations(), testing::IsEmpty());
  }
  worker_.reset();
  std::filesystem::remove_all(dir_);
}

void WorkerTest::StartCoordinator() {
  coordinator_ = std::make_unique<FakeControlService>();
  ASSERT_TRUE(coordinator_->Start(config_.coordinator.target));
}

void WorkerTest::StopCoordinator() { coordinator_.reset(); }

void WorkerTest::StartWorker() {
  worker_ = std::make_unique<Worker>(config_, std::move(owned_engine_));
  std::promise<absl::Status> exit;
  exit_ = exit.get_future();
  thread_ =
      std::thread([this, exit = std::move(exit)]() mutable { exit.set_value(worker_->Run()); });
}

std::shared_ptr<ControlSession> WorkerTest::Greet(v1::Hello* hello) {
  std::shared_ptr<ControlSession> session = coordinator_->NextSession();
  if (session == nullptr) {
    ADD_FAILURE() << "no worker connected";
    return nullptr;
  }
  const v1::WorkerMessage first = session->Next();
  EXPECT_TRUE(first.has_hello()) << first.DebugString();
  if (hello != nullptr) *hello = first.hello();
  return session;
}

std::shared_ptr<ControlSession> WorkerTest::GreetAndLoad() {
  std::shared_ptr<ControlSession> session = Greet();
  if (session == nullptr) return nullptr;
  session->Send(AssignmentMessage());
  const v1::WorkerMessage loaded = session->Next();
  EXPECT_TRUE(loaded.has_loaded()) << loaded.DebugString();
  return session;
}

void WorkerTest::FormEpoch(ControlSession& session, std::uint64_t epoch) {
  session.Send(CreateHeapMessage(epoch));
  const v1::WorkerMessage created = session.Next();
  ASSERT_TRUE(created.has_heap_created()) << created.DebugString();
  ASSERT_EQ(created.heap_created().epoch(), epoch);
  session.Send(OpenPeersMessage(epoch));
  const v1::WorkerMessage opened = session.Next();
  ASSERT_TRUE(opened.has_peers_opened()) << opened.DebugString();
  ASSERT_EQ(opened.peers_opened().epoch(), epoch);
  // A lease that was sent before EpochStarted is read before the first shard.
  ASSERT_TRUE(session.AwaitLease(epoch));
  session.Send(EpochStartedMessage(epoch));
}

std::shared_ptr<ControlSession> WorkerTest::Serve(std::uint64_t epoch) {
  StartCoordinator();
  StartWorker();
  std::shared_ptr<ControlSession> session = GreetAndLoad();
  if (session != nullptr) FormEpoch(*session, epoch);
  return session;
}

void WorkerTest::RunBatch(ControlSession& session, std::uint64_t epoch, std::uint64_t batch,
                          int slot) {
  session.Send(ShardMessage(epoch, batch, slot));
  const v1::WorkerMessage done = session.Next();
  ASSERT_TRUE(done.has_batch_done()) << done.DebugString();
  EXPECT_EQ(done.batch_done().epoch(), epoch);
  EXPECT_EQ(done.batch_done().batch(), batch);
  EXPECT_EQ(done.batch_done().code(), 0) << done.batch_done().message();
  EXPECT_EQ(done.batch_done().output(), ShardRows(batch));
}

absl::Status WorkerTest::AwaitExit() {
  if (exit_.wait_for(std::chrono::seconds(60)) != std::future_status::ready) {
    return absl::DeadlineExceededError("the worker does not end");
  }
  thread_.join();
  EXPECT_THAT(engine_->violations(), testing::IsEmpty());
  return exit_.get();
}

}  // namespace epserve::worker
