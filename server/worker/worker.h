// The worker daemon: joins the coordinator, loads its experts, and takes part in epochs and batches
// until it is told to leave. What to do about each event is SessionState's; this class has the
// threads and does it.
//
// Threads: Run's own (session, epochs), the control stream's two (reads, heartbeats, small batches;
// one polls where the other is kept), one a slot (other batches), and one that loads weights while
// a load runs.
#ifndef EPSERVE_SERVER_WORKER_WORKER_H_
#define EPSERVE_SERVER_WORKER_WORKER_H_

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "runtime/engine/engine.h"
#include "server/worker/batch_executor.h"
#include "server/worker/control_messages.h"
#include "server/worker/control_stream.h"
#include "server/worker/lease.h"
#include "server/worker/memory_report.h"
#include "server/worker/reconnect_backoff.h"
#include "server/worker/row_arena_mapping.h"
#include "server/worker/session_state.h"

namespace epserve::worker {

struct WorkerConfig {
  ControlEndpoint coordinator;
  std::string worker_id;
  std::string cluster_id;
  std::string version;
  std::string node;
  std::int64_t max_batch_tokens = 4096;
  int num_slots = 2;
  absl::Duration peer_timeout = absl::Seconds(30);
  // Longest wait for the coordinator to let this worker go, once it asked to leave, and then for
  // its own batches. The default is above the coordinator's default --drain-timeout-ms.
  absl::Duration leave_timeout = absl::Seconds(15);
  // Steady clock of leases and heartbeats.
  std::function<std::int64_t()> now_us;
  std::function<absl::StatusOr<AvailableMemory>()> available_memory;
  bool progress_on_terminal = false;
  // Told when it changes whether the worker has joined and holds what it is to hold, weights or
  // nothing on standby; not ready before the first call. On Run's thread.
  std::function<void(bool)> on_ready = [](bool) {};
};

class Worker : private ControlStream::Handler, private BatchReporter {
 public:
  Worker(WorkerConfig config, std::unique_ptr<runtime::Engine> engine);
  // Waits for a load that is under way.
  ~Worker() override;
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  // Serves until asked to leave (OK), rejected, or unable to go on (why). Call once. On return no
  // batch runs, no peer is mapped and the heap is gone; a load may still be running.
  absl::Status Run();

  // Finishes what runs, tells the coordinator, and lets Run return. From any thread.
  void RequestLeave(std::string reason);

 private:
  using TimePoint = std::chrono::steady_clock::time_point;

  struct FromCoordinator {
    std::uint64_t generation = 0;
    CoordinatorMessage message;
  };
  struct StreamEnded {
    std::uint64_t generation = 0;
    absl::Status status;
  };
  struct LoadEnded {
    absl::Status status;
    std::vector<float> probe_output;
  };
  struct LeaseExpired {
    std::uint64_t epoch = 0;
  };
  struct LeaveAsked {
    std::string reason;
  };
  using Event = std::variant<FromCoordinator, StreamEnded, LoadEnded, LeaseExpired, LeaveAsked>;

  // ControlStream::Handler, on the stream's thread.
  void OnMessage(CoordinatorMessage message) override;
  ControlStream::Tick OnHeartbeatDue() override;
  void OnClosed(const absl::Status& status) override;
  // BatchReporter, on slot threads.
  void Report(WorkerMessage message) override;
  void OnLeaseExpired(std::uint64_t epoch) override;

  std::shared_ptr<ControlStream> Stream();  // null while there is none
  void Post(Event event);
  std::optional<Event> NextEvent();
  std::optional<TimePoint> NextTimer() const;

  // All below on Run's thread.
  void OnTimer();
  void TellReady(bool ready) {
    if (ready != std::exchange(ready_, ready)) config_.on_ready(ready);
  }
  void Handle(FromCoordinator& event);
  void Handle(StreamEnded& event);
  void Handle(LoadEnded& event);
  void Handle(LeaseExpired& event);
  void Handle(LeaveAsked& event);

  void Perform(const SessionState::Actions& actions);
  void Perform(SessionAction action);
  void StartLoad();
  void Load(const Assignment& assignment);
  void DoCreateHeap();
  void DoOpenPeers();
  void DoEndEpoch();
  void EpochFailed(const absl::Status& status);

  void Connect();
  void ScheduleReconnect(const absl::Status& why);
  void DropStream();
  void Leave();
  void Fail(const absl::Status& status);
  Hello MakeHello() const;

  const WorkerConfig config_;
  const std::unique_ptr<runtime::Engine> engine_;
  const std::string incarnation_;

  // Run's thread alone.
  SessionState session_;
  std::optional<absl::Status> result_;
  runtime::MemoryPlan plan_;
  std::vector<float> probe_output_;
  std::vector<std::string> peer_handles_;
  CreateHeap offered_;      // the last one
  SharedRows shared_rows_;  // of the present epoch
  std::optional<TimePoint> reconnect_at_;
  std::optional<TimePoint> leave_by_;
  ReconnectBackoff backoff_;
  bool greeted_ = false;  // The coordinator has spoken on the present stream.
  bool ready_ = false;    // as on_ready was told
  std::thread loader_;

  Lease lease_;
  std::atomic<std::int64_t> lease_duration_us_;
  std::atomic<bool> lease_is_known_ = false;        // one was granted, once
  std::atomic<std::int64_t> last_answered_us_ = 0;  // when that heartbeat was sent
  std::atomic<std::uint64_t> generation_ = 0;       // of the present stream

  std::mutex stream_mutex_;
  std::shared_ptr<ControlStream> stream_;  // Guarded by stream_mutex_; null while there is none.

  std::mutex events_mutex_;
  std::condition_variable events_changed_;
  std::deque<Event> events_;  // Guarded by events_mutex_.

  std::unique_ptr<BatchExecutor> executor_;  // Last: its threads use the members above.
};

}  // namespace epserve::worker

#endif  // EPSERVE_SERVER_WORKER_WORKER_H_
