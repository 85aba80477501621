// A Worker with a FakeEngine, run against a FakeControlService on a Unix socket in a folder of its
// own; and the coordinator's messages in one call each. For tests of the daemon as a whole.
#ifndef EPSERVE_TESTS_SERVER_WORKER_WORKER_HARNESS_H_
#define EPSERVE_TESTS_SERVER_WORKER_WORKER_HARNESS_H_

#include <gtest/gtest.h>

#include <atomic>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "server/worker/worker.h"
#include "tests/server/worker/fake_control_service.h"
#include "tests/server/worker/fake_engine.h"

namespace epserve::worker {

// What the coordinator sends. The tests' worker has rank 1 of 2; experts are 0..3 and 4..7.
v1::CoordinatorMessage AssignmentMessage(int rank = 1);
v1::CoordinatorMessage StandbyMessage();
v1::CoordinatorMessage CreateHeapMessage(std::uint64_t epoch);
v1::CoordinatorMessage OpenPeersMessage(std::uint64_t epoch);
v1::CoordinatorMessage EpochStartedMessage(std::uint64_t epoch);
v1::CoordinatorMessage EpochEndedMessage(std::uint64_t epoch);
v1::CoordinatorMessage DispatchTriggerMessage(std::uint64_t epoch, std::uint64_t batch);
v1::CoordinatorMessage CombineTriggerMessage(std::uint64_t epoch, std::uint64_t batch);
v1::CoordinatorMessage RejectedMessage(const std::string& text);
v1::CoordinatorMessage ShutdownMessage();

enum class Routing { kRouted, kByWorker };
// A shard of three tokens, each to experts 0 and 5 where routed; else the fake engine's router
// sends all to expert 0. Its count matrix comes along where routed.
v1::CoordinatorMessage ShardMessage(std::uint64_t epoch, std::uint64_t batch, int slot = 0,
                                    Routing routing = Routing::kRouted);
// The matrix of a shard that the worker routed.
v1::CoordinatorMessage CountMatrixMessage(std::uint64_t epoch, std::uint64_t batch);
// The rows of ShardMessage's `hidden`, which the fake engine gives back.
std::string ShardRows(std::uint64_t batch);

class WorkerTest : public testing::Test {
 protected:
  WorkerTest();
  // Stops the worker, and fails the test where the engine's contract was broken.
  ~WorkerTest() override;

  void StartCoordinator();
  void StopCoordinator();
  void StartWorker();

  // Takes the next session up to its hello, which it returns in *hello.
  std::shared_ptr<ControlSession> Greet(v1::Hello* hello = nullptr);
  // Greets, assigns rank 1 and waits for Loaded.
  std::shared_ptr<ControlSession> GreetAndLoad();
  // From CreateHeap to EpochStarted, with a lease given.
  void FormEpoch(ControlSession& session, std::uint64_t epoch);
  std::shared_ptr<ControlSession> Serve(std::uint64_t epoch);  // all of it
  // Sends a shard and expects its rows back.
  void RunBatch(ControlSession& session, std::uint64_t epoch, std::uint64_t batch, int slot = 0);

  absl::Status AwaitExit();

  WorkerConfig config_;
  std::atomic<std::int64_t> now_us_ = 50'000'000;  // moves only where a test moves it
  FakeEngine* engine_ = nullptr;                   // of the worker
  std::unique_ptr<FakeControlService> coordinator_;
  std::unique_ptr<Worker> worker_;

 private:
  std::string dir_;
  std::unique_ptr<FakeEngine> owned_engine_;
  std::thread thread_;
  std::future<absl::Status> exit_;
};

}  // namespace epserve::worker

#endif  // EPSERVE_TESTS_SERVER_WORKER_WORKER_HARNESS_H_
