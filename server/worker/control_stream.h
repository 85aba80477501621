// One connection to the coordinator's Control.Connect stream: from dialling to its end. A new one
// is made for every attempt, with a channel of its own, so that no state of a failed attempt delays
// the next one.
//
// One thread polls gRPC, reads, converts and hands messages to the handler; whoever sends writes
// from its own thread where nothing else is being written, and takes the write's end there too,
// which saves two wake-ups per batch. After a shard or a count matrix nothing is read until what
// answers it has gone out, or about a millisecond has passed: gRPC's window update then rides on
// the answer, and is no message of its own that wakes the coordinator.
//
// Thread-safe. Handler calls come from the polling thread, one at a time, and must not block, with
// one exception: OnMessage may take its time with a shard or a count matrix, to carry out the
// batch. Where that is long, another thread polls on and makes further calls meanwhile; see
// poll_turn.h. Handlers may call Send and Cancel, but must not destroy the stream.
#ifndef EPSERVE_SERVER_WORKER_CONTROL_STREAM_H_
#define EPSERVE_SERVER_WORKER_CONTROL_STREAM_H_

#include <grpcpp/alarm.h>
#include <grpcpp/grpcpp.h>

#include <array>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "epserve/v1/control.grpc.pb.h"
#include "epserve/v1/control.pb.h"
#include "server/common/busy_poll.h"
#include "server/common/immediate_event.h"
#include "server/common/tls.h"
#include "server/worker/control_messages.h"
#include "server/worker/poll_turn.h"

namespace epserve::worker {

// The coordinator, and how to be known to it.
struct ControlEndpoint {
  std::string target;  // "host:port" or "unix:path"
  server::TlsFiles tls;
  std::string tls_server_name;  // that its certificate must have; empty: the target's host
  std::string secret_file;      // its first line is shown with the call; empty: none
  std::chrono::microseconds busy_poll{0};  // looked for so long for a message before a sleep
};

class ControlStream {
 public:
  struct Tick {
    absl::Duration next;  // until the next heartbeat
    absl::Status status;  // not OK: gives the stream up with this reason
    Heartbeat heartbeat;
  };

  class Handler {
   public:
    virtual ~Handler() = default;
    virtual void OnMessage(CoordinatorMessage message) = 0;
    // Asked for the first time as soon as the stream is open.
    virtual Tick OnHeartbeatDue() = 0;
    // The last call to begin, exactly once; nothing is sent or read afterwards. Never OK: an
    // orderly end by the coordinator is UNAVAILABLE too.
    virtual void OnClosed(const absl::Status& status) = 0;
  };

  // Starts to connect; `hello` is the first message. `handler` must outlive the stream.
  ControlStream(const ControlEndpoint& endpoint, Hello hello, Handler* handler);
  // Cancels and waits for the last handler call.
  ~ControlStream();
  ControlStream(const ControlStream&) = delete;
  ControlStream& operator=(const ControlStream&) = delete;

  // Sends in order of calls. Dropped where the stream has ended or is closing.
  void Send(WorkerMessage message);
  // Asks for a heartbeat now, ahead of its time.
  void HurryHeartbeat();
  // Writes what is queued, ends this side, and waits up to `timeout` for the coordinator to end its
  // own; then cancels. Not to be called from the handler.
  void CloseAfterFlush(absl::Duration timeout);
  void Cancel();

 private:
  using Stream = grpc::ClientAsyncReaderWriter<v1::WorkerMessage, v1::CoordinatorMessage>;

  void ShowSecret(const ControlEndpoint& endpoint);
  void Run();
  bool PollToTheEnd();
  // Next, but no longer than a read may be put off. False: the queue has ended.
  bool NextEvent(void** tag, bool* ok);
  // False, also of the next two: the other thread polls now.
  bool OnEvent(void* tag, bool ok);
  bool OnHandedOver();
  bool OnRead(bool ok);
  void OnStarted(bool ok);
  void OnFinished();
  bool DelayRead(v1::CoordinatorMessage::MessageCase kind);
  void StartDelayedReadLocked();
  void OnWritten(bool ok);
  // Whether the write has ended at once, and so.
  std::optional<bool> WriteLocked(const v1::WorkerMessage& proto);
  void ContinueWritingLocked(bool ok);
  void HandOverLocked(const server::ImmediateEvent& event);
  void SetHandOverAlarmLocked();
  void OnAlarm(bool ok);
  void RequestFinish();
  void SendProto(v1::WorkerMessage proto);
  void SetAlarm(absl::Duration delay);
  void GiveUp(absl::Status reason);

  Handler* const handler_;
  grpc::ClientContext context_;
  grpc::CompletionQueue queue_;
  std::unique_ptr<v1::Control::Stub> stub_;
  std::unique_ptr<Stream> stream_;

  PollTurn turn_;

  // Of the thread that has the turn.
  server::BusyPoll busy_poll_;
  v1::CoordinatorMessage incoming_;
  grpc::Alarm alarm_;
  grpc::Status final_status_;
  absl::Status gave_up_;
  bool finish_requested_ = false;

  std::mutex mutex_;
  std::condition_variable ended_changed_;
  std::deque<v1::WorkerMessage> outgoing_;  // Guarded by mutex_, as all below.
  bool writing_ = true;                     // A write is on its way; true until the stream is open.
  bool closing_ = false;                    // No more messages are taken.
  bool half_closed_ = false;                // The end of this side was sent or can no longer be.
  bool finished_ = false;                   // The call is over; no operation may be started.
  // Threads that are not done with the handler. One that is kept by it may outlast OnClosed, and
  // must not be the one to destroy the stream.
  int num_running_ = 2;
  bool hurry_ = false;
  bool read_delayed_ = false;                       // Nothing is read until an answer has gone out.
  std::chrono::steady_clock::time_point read_due_;  // by then at the latest
  int owed_answers_ = 0;                            // shards read without a BatchDone, about
  int prompt_reads_ = 0;                            // reads that are not put off
  std::deque<server::ImmediateEvent> handed_over_;  // that other threads have come by
  grpc::Alarm hand_over_alarm_;

  std::array<std::thread, 2> threads_;  // one polls, the other stands by
};

}  // namespace epserve::worker

#endif  // EPSERVE_SERVER_WORKER_CONTROL_STREAM_H_
