// Runs the pure state machine: owns its clock, its turn and everything that it must not know
// (payloads, streams, metrics, logs).
//
//   gRPC threads ──post──► inbox ──► the turn: Apply ─► commands ─► worker streams, replies,
//   timer thread ──due──────────────┘                               probe check, metrics
//
// One thread at a time has the turn. Whoever posts while nobody has it takes it, and empties the
// inbox before giving it up; whoever posts meanwhile just leaves. So a request or a worker's answer
// is acted on by the very thread that read it, without waking another. The timer takes the turn
// when the state machine's deadline comes.
//
// Thread-safe: every public method may be called from any thread; none waits for another request
// but Stop(). Hooks and query callbacks run in the turn, and within calls of this class: no lock
// that they take may be held around such a call.
//
// Invariants: a submitted request is completed once. After Stop() nothing is accepted: requests and
// queries are answered UNAVAILABLE at once.
#ifndef EPSERVE_SERVER_COORDINATOR_HOST_H_
#define EPSERVE_SERVER_COORDINATOR_HOST_H_

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <unordered_map>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/common/log_limit.h"
#include "server/coordinator/batch_store.h"
#include "server/coordinator/device_regions.h"
#include "server/coordinator/front_door/device_region_host.h"
#include "server/coordinator/front_door/request_sink.h"
#include "server/coordinator/metrics.h"
#include "server/coordinator/process_watch.h"
#include "server/coordinator/row_blocks.h"
#include "server/coordinator/state_machine/state_machine.h"
#include "server/coordinator/worker_stream.h"

namespace epserve::coordinator {

// The cluster at one moment, for the admin service.
struct WorkerView {
  WorkerSnapshot worker;
  std::string node;
  std::int64_t pid = 0;
  std::string backend;
  std::uint64_t expert_rows = 0;
  std::int64_t ms_since_heartbeat = 0;
};
struct ClusterView {
  Snapshot cluster;
  Metrics::RequestTotals requests;  // as the metrics have them
  runtime::Placement placement;
  std::vector<WorkerView> workers;
  std::int64_t uptime_ms = 0;
};

// How rows reach the workers: through memory that those of this machine map, or within messages.
struct RowTransport {
  bool shared = false;     // make an arena for each epoch
  std::string cluster_id;  // that the arena is named after
  RegionAccess regions;    // for workers that have the arena mapped
};

struct HostHooks {
  std::function<void(bool serving)> on_serving;
  std::function<void()> on_drained;  // nothing accepted is left after DrainCluster()
  // May not join; `comes_back`: not now.
  std::function<void(const HelloInfo& hello, const absl::Status& status, bool comes_back)>
      on_worker_refused;
};

// The word for a worker's state in the admin service and the metrics.
const char* WorkerStateName(WorkerState state, bool draining);

class Host : public RequestSink, public DeviceRegionHost, private DeviceRegionActions {
 public:
  using Clock = std::chrono::steady_clock;

  // `config.start_us` is set by Start(). REQUIRES: config.max_batch_tokens is at least
  // NumProbeTokens(num_workers); `metrics` outlives the host.
  Host(const Config& config, std::int64_t hidden, RowTransport row_transport, Metrics* metrics,
       HostHooks hooks);
  ~Host() override;  // Stops.

  void Start();
  // Answers what is left, closes every stream, ends the timer. Idempotent.
  void Stop();

  // ---- front door
  void Submit(std::unique_ptr<PendingRequest> request) override;
  void Cancel(std::uint64_t id) override;
  bool ready() const override { return ready_.load(std::memory_order_acquire); }
  void OnAnswered(absl::StatusCode code, std::chrono::nanoseconds server_time) override;

  void OpenDeviceRegion(std::shared_ptr<const ShmRegion> region, Done done) override;
  void CloseDeviceRegions(std::vector<std::uint64_t> regions, Done done) override;

  // ---- control service
  StreamId NewStreamId() { return next_stream_.fetch_add(1, std::memory_order_relaxed); }
  void OpenStream(StreamId id, std::shared_ptr<WorkerStream> stream, HelloInfo hello);
  void Report(WorkerReport report);  // StreamClosed too, as the last of its stream

  // ---- admin service
  void QueryCluster(std::function<void(absl::StatusOr<ClusterView>)> done);
  // `layer` -1: summed over the layers. NOT_FOUND: no such layer.
  void QueryExpertLoad(std::int64_t layer,
                       std::function<void(absl::StatusOr<std::vector<std::uint64_t>>)> done);
  void DrainWorker(std::string worker_id, std::function<void(absl::Status)> done);

  void DrainCluster();

  // ---- whoever takes in what comes for the host
  // Whether TellInputTaken() would be of use: requests wait for it.
  const std::atomic<bool>& wants_input_taken() const { return wants_input_taken_; }
  void TellInputTaken() { Post(InputTaken{}); }

 private:
  void TellInputTakenIfWanted();

  struct NewStream {
    StreamId id = 0;
    std::shared_ptr<WorkerStream> stream;
    HelloInfo hello;
  };
  struct CancelRequest {
    RequestId id = 0;
  };
  struct Drain {};
  using Query = std::function<void(bool stopped)>;
  using Item = std::variant<WorkerReport, std::unique_ptr<PendingRequest>, CancelRequest, NewStream,
                            Query, Drain, InputTaken>;

  struct StreamRecord {
    std::shared_ptr<WorkerStream> stream;
    HelloInfo hello;
    int rank = -1;
    std::uint64_t expert_rows = 0;
    EpochId probe_epoch = 0;
    std::vector<float> probe_output;
    EpochId heap_epoch = 0;                  // whose heap it is to have; 0: none
    std::optional<std::string> handle_type;  // of that heap, since it is there; "": not told
  };
  struct CountDown {
    void operator()(std::atomic<int>* count) const { count->fetch_sub(1); }
  };
  struct RequestRecord {
    std::unique_ptr<PendingRequest> pending;
    TimeUs arrived_us = 0;
    std::unique_ptr<std::atomic<int>, CountDown>
        large;  // counted in large_requests_ while it lives
  };

  void Post(Item item);
  static void Refuse(Item& item);  // what is posted after Stop()
  void RunTurn();                  // REQUIRES: this thread set turn_taken_
  void GiveUpTurn();               // REQUIRES: mu_ held, by the thread that has the turn
  void KeepTime();                 // the timer's thread
  void Shut();                     // in the last turn

  void Handle(WorkerReport& report);
  void Handle(std::unique_ptr<PendingRequest>& request);
  void Handle(CancelRequest& cancel);
  void Handle(NewStream& opened);
  void WatchProcess(const HelloInfo& hello);
  void Handle(Query& query);
  void Handle(Drain& drain);
  void Handle(InputTaken& taken) { ApplyEvent(taken); }
  void HandleBatchDone(WorkerReport& report, BatchDone& done);
  void AddExpertRows(std::int64_t layer, int rank, StreamId stream,
                     const std::vector<std::int64_t>& local_rows);

  // Applies the event and carries out its commands, then the events that those gave rise to. From
  // within one of those commands: leaves the event for then.
  void ApplyEvent(Event event);
  void Send(StreamId stream, StreamMessage message);
  void EraseStream(StreamId stream);
  void EndHeap(StreamId stream, EpochId epoch);  // which is closed with its epoch
  void CountHeaps();                             // for the metrics

  void SendTo(StreamId stream, StreamMessage message) override;
  void HoldBatches(bool hold) override;
  void HoldBatchesToTheirEnd() override;
  std::string NameOf(StreamId stream) const override;
  // Nothing of a client is in use, or open, at the worker any more.
  void LeaveRegions(StreamId stream);
  bool TakesPart(const ShardMessage& shard, const ShardPlan& plan) const;
  // Or says for the rank that it is done, where it takes no part.
  void SendShard(const ShardPlan& plan, ShardMessage shard);
  void SendShards(const std::vector<ShardPlan>& plans, std::vector<ShardMessage> shards);

  template <typename StreamCommand>
  void Execute(StreamCommand& command);  // commands that go to one stream as they are
  void Execute(AssignRank& command);
  void Execute(SendCreateHeap& command);
  void Execute(SendEpochStarted& command);
  void Execute(SendEpochEnded& command);
  void Execute(RejectWorker& command);
  void Execute(CloseStream& command);
  void Execute(StartProbe& command);
  void Execute(StartBatch& command);
  void Execute(SendCountMatrix& command);
  void Execute(SendDispatchTrigger& command);
  void Execute(SendCombineTrigger& command);
  void Execute(VerifyProbe& command);
  void Execute(FinishBatch& command);
  void Execute(DropBatch& command);
  void Execute(CompleteRequest& command);
  void Execute(SetServing& command);
  void Execute(BatchesHeld& command);
  void Execute(DrainWorkerDone& command);
  void Execute(ClusterDrained& command);
  void Execute(Notice& command);

  void OpenArena(EpochId epoch);
  absl::Status Deliver(const KeptBatch* batch, RequestId request, PendingRequest& pending);
  // Lets the workers close what they keep open of regions that are gone.
  void ForgetRegions();
  InferTimes TimesOf(const KeptBatch& batch, EpochId epoch, TimeUs arrived_us, bool trace) const;
  void ObserveBatch(const KeptBatch& batch);
  void UpdateGauges();
  ClusterView View() const;
  static TimeUs NowUs();

  Config config_;
  const std::int64_t hidden_;
  const RowTransport row_transport_;
  const std::shared_ptr<Lender> row_lender_ = std::make_shared<Lender>();  // of all epochs
  EpochId arena_epoch_ = 0;   // the last epoch that an arena was made for, or tried
  std::string arena_handle_;  // of arena_epoch_; empty: there is none
  Metrics* const metrics_;
  const HostHooks hooks_;
  server::LogLimit hello_limit_;
  std::atomic<bool> ready_{false};
  std::atomic<bool> wants_input_taken_{false};
  std::atomic<StreamId> next_stream_{1};

  std::mutex mu_;
  std::condition_variable changed_;
  std::vector<Item> inbox_;         // guarded by mu_
  bool turn_taken_ = true;          // guarded by mu_; until Start() nobody can take it
  bool turn_wanted_ = false;        // guarded by mu_; the timer's thread is to take the next turn
  bool stopping_ = false;           // guarded by mu_
  TimeUs deadline_us_ = kNever;     // guarded by mu_; of the state machine, while no turn is taken
  TimeUs timer_wakes_us_ = kNever;  // guarded by mu_; when the timer looks next by itself

  // Of whoever has the turn.
  std::vector<Item> taken_;
  std::unique_ptr<StateMachine> machine_;
  std::unique_ptr<BatchStore> batches_;
  DeviceRegions device_regions_{this};
  std::unordered_map<StreamId, StreamRecord> streams_;
  std::atomic<int> large_requests_{0};  // of requests_; read by those who post
  std::unordered_map<RequestId, RequestRecord> requests_;
  std::unordered_map<std::uint64_t, std::function<void(absl::Status)>> worker_drains_;
  std::uint64_t next_drain_token_ = 1;
  std::deque<Event> raised_;  // by commands; applied once the commands before are carried out
  bool applying_ = false;     // within ApplyEvent
  std::vector<std::vector<std::uint64_t>> expert_rows_;  // [layers][E]
  std::optional<Load> shown_load_;                       // what the gauges say; none: nothing yet

  std::unique_ptr<ProcessWatch> process_watch_;  // null: the leases alone decide
  std::thread timer_;
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_HOST_H_
