// The server's side of RPCs: every method of every service on completion queues of our own, each
// polled by one thread, messages as bytes.
//
// Why not gRPC's callback or synchronous services: each of those polls with threads of its own, and
// gRPC hands the one epoll set of a process from thread to thread after every event, so that a
// request wakes three threads where one would do (measured: 10 futex calls a request, a third of
// the coordinator's time). A process that has no other poller pays nothing of this. So health,
// reflection and channelz, which gRPC offers in those forms only, are served from here too.
//
// Thread safety: Handle() before Start(), from one thread. The calls' own rules stand at their
// methods.
#ifndef EPSERVE_SERVER_RPC_RPC_SERVER_H_
#define EPSERVE_SERVER_RPC_RPC_SERVER_H_

#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/status.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "server/rpc/buffer_guard.h"
#include "server/rpc/call_limits.h"

namespace epserve::server {

// What one call's handler is told. Calls come one after another, from the thread of the call's
// queue; they must not block. The handler lives until OnDone, the last of them.
class CallHandler {
 public:
  virtual ~CallHandler() = default;
  // The read in flight has ended. Not ok: no message will follow.
  virtual void OnReadDone(bool ok) = 0;
  // The write in flight has ended. Not ok: the caller has gone. Not told of WriteAndFinish.
  virtual void OnWriteDone(bool /*ok*/) {}
  // The caller has gone, or its deadline has passed, before Finish. Finish must still be called.
  virtual void OnCancel() {}
  // Comes now and then while the call lasts, often enough for its limits.
  virtual void OnTick(WaitClock::TimePoint /*now*/) {}
  // Finish was called and nothing is in flight: the call is gone after this.
  virtual void OnDone() = 0;
};

// One call. At most one read and one write in flight, and one Finish or WriteAndFinish, which comes
// after the last write; a read in flight then ends with ok false, or has just come in. Any thread
// may start any of them; none blocks.
class ServerCall {
 public:
  virtual ~ServerCall() = default;
  virtual void StartRead(grpc::ByteBuffer* message) = 0;  // stays valid until OnReadDone
  // The same, but for a caller that is expected to send nothing before it has heard from here:
  // takes effect once the next write has gone out, or about a millisecond later. gRPC answers each
  // message on a stream that is read at once with a window update of its own, a system call here
  // and a wake-up there; so it rides on that write. Messages that did not wait for it cost one
  // again. REQUIRES: called from within OnReadDone.
  virtual void StartReadAfterWrite(grpc::ByteBuffer* message) = 0;
  virtual void StartWrite(const grpc::ByteBuffer& message) = 0;
  virtual void WriteAndFinish(const grpc::ByteBuffer& message) = 0;  // with status OK
  virtual void Finish(const grpc::Status& status) = 0;
  virtual void TryCancel() = 0;
  // Ends the call with `status`, and drops what is on its way to the caller; the write or the
  // finish in flight then ends, and where it was a write Finish must still be called. May be called
  // until OnDone.
  virtual void GiveUpReply(const absl::Status& status) = 0;
  // Metadata, deadline, peer, identity; trailing metadata may be added before Finish.
  virtual grpc::ServerContext& context() = 0;
  // The same for all calls of one connection; callers over one Unix socket count as one.
  virtual std::uint64_t connection() const = 0;
  virtual const CallLimits& limits() const = 0;
};

class RpcServer {
 public:
  // Makes the handler of a new call; the call outlives the handler. Must not return null.
  using MakeHandler = std::function<CallHandler*(ServerCall*)>;

  RpcServer();
  ~RpcServer();  // Stops.
  RpcServer(const RpcServer&) = delete;
  RpcServer& operator=(const RpcServer&) = delete;

  // Whether a method's calls take a place among the connections of SetMaxConnections.
  enum class Places { kCounted, kFree };

  // `method` as on the wire: "/package.Service/Method". A message of more than `max_message_bytes`
  // is dropped unread: its handler is told that none will follow, and whatever status it then
  // finishes with, the caller gets INVALID_ARGUMENT.
  void Handle(const std::string& method, MakeHandler make_handler, Places places = Places::kCounted,
              std::size_t max_message_bytes = kSmallMessageBytes);
  // Asked before a call of a method that there is takes its place and its handler is made; what is
  // not OK ends the call. Must not block.
  using Authorize = std::function<absl::Status(const std::string& method, grpc::ServerContext&)>;
  void SetAuthorizer(Authorize authorize);
  // Connections that may have counted calls under way at once; further ones' are
  // RESOURCE_EXHAUSTED.
  // All callers over one Unix socket count as one.
  void SetMaxConnections(std::size_t max_connections);
  // Told the caller (gRPC's name of it) of each call that is refused for that; must not block.
  void SetOnNoPlace(std::function<void(const std::string& peer)> on_no_place);
  // What messages that are not whole may hold; without it gRPC alone bounds them.
  void SetBufferLimit(BufferGuard::Limit limit);
  void SetCallLimits(const CallLimits& limits);
  // How long a thread looks for the next event before it sleeps.
  void SetBusyPoll(std::chrono::microseconds busy);
  // While `*wanted`, a thread that has taken in all that had come for it calls `tell` before it
  // sleeps. `wanted` is valid until Stop(); neither may block.
  void SetOnInputTaken(const std::atomic<bool>* wanted, std::function<void()> tell);
  // Has gRPC listen there. `port` as AddListeningPort() has it: set by Start(), and valid until
  // then. REQUIRES: `builder` is Start()'s.
  void Listen(const std::string& address, std::shared_ptr<grpc::ServerCredentials> credentials,
              grpc::ServerBuilder* builder, int* port);
  // The services with a method here ("package.Service"), each once.
  std::vector<std::string> services() const;

  // Adds what is needed to `builder`, builds and starts. False where gRPC could not: an address
  // cannot be bound, and the caller knows which from the ports it asked for.
  bool Start(grpc::ServerBuilder* builder, int num_threads);

  // Answers further calls UNAVAILABLE, waits until those that it has are done, at most `grace`, and
  // ends all connections of Listen()'s addresses: whatever is left or on its way there gets
  // UNAVAILABLE too, from the caller's own gRPC, and never the CANCELLED that a gRPC server which
  // shuts down gives calls that it has not taken. Waits until each handler has been told OnDone.
  // Idempotent.
  void Stop(std::chrono::milliseconds grace);

 private:
  class Call;
  class Loop;
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_RPC_RPC_SERVER_H_
