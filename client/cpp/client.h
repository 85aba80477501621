// The C++ client of an epserve service: "here are T tokens with their routing, give me the weighted
// sum of their experts' outputs", and the questions around it.
//
// Letters: T tokens, H hidden size, K experts per token, E experts.
//
// Errors come as absl::Status with the server's code and message:
//   INVALID_ARGUMENT    the request is wrong, whoever retries; the message names value and limit
//   NOT_FOUND           no such model or layer
//   RESOURCE_EXHAUSTED  the server's queue is full; retried as RetryPolicy says. RetryPushback()
//                       of the status is when the server wants to see the request again
//   UNAVAILABLE         no server, or experts without a live worker; retried as RetryPolicy says
//   DEADLINE_EXCEEDED   the timeout has passed, over all attempts
//   CANCELLED           PendingInfer::Cancel was called
//   INTERNAL            the answer is not what the protocol promises
//
// Thread safety: an InferenceClient may be used from any number of threads at once. Dropping it
// does not end asynchronous calls: their callbacks still run.
#ifndef EPSERVE_CLIENT_CPP_CLIENT_H_
#define EPSERVE_CLIENT_CPP_CLIENT_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/cpp/channel_security.h"
#include "client/cpp/retry.h"
#include "client/cpp/tensor.h"

namespace epserve::client {

struct ClientOptions {
  std::string target = "127.0.0.1:8001";  // "host:port" or "unix:/path"
  ChannelSecurity security;               // see CheckSecurity
  RetryPolicy retry;
  // Between attempts to reach a server that is away. A link slower than this is not reached.
  absl::Duration max_reconnect_backoff = absl::Seconds(1);
  // Threads that asynchronous calls and streams end on, at least 1, each made when first needed.
  // One reads results of a few gigabytes a second, or some ten thousand small ones.
  int async_threads = 1;
  // How long such a thread looks for the next event before it sleeps, where cores are to spare: a
  // result that comes meanwhile waits for no wake-up. Above 0 each thread keeps a core busy while
  // there is traffic; an idle client sleeps all the same. At most kMaxBusyPoll.
  absl::Duration busy_poll = absl::ZeroDuration();
  static constexpr absl::Duration kMaxBusyPoll = absl::Seconds(1);
};

struct InferRequest {
  std::string model;                  // NOT empty; see InferenceClient::OnlyModel
  std::string id;                     // Comes back in the result; may be empty.
  std::optional<std::int64_t> layer;  // The model's layer number; absent: its first with experts.

  Tensor hidden_states;  // [T, H] BF16, F16 or F32; T may be 0
  // Both or neither; without them the service routes, where its checkpoint has the router.
  std::optional<Tensor> topk_ids;      // [T, K] I32 or I64, expert in [0, E), -1: none
  std::optional<Tensor> topk_weights;  // [T, K] F32, finite

  // Where the service is to leave the result; absent: it comes with the answer.
  std::optional<RegionPlace> output_place;

  // Ask for each worker's times; see InferResult::trace.
  bool trace = false;

  // For the whole call, retries and waits included. InfiniteDuration: none.
  absl::Duration timeout = absl::Seconds(30);
  // Sent with each attempt. Keys in lower case.
  std::vector<std::pair<std::string, std::string>> metadata;
};

struct InferResult {
  std::string id;
  Tensor hidden_states;  // [T, H], the input's type; its place is the request's output_place
  // The response's integer parameters, such as epserve_epoch, and in microseconds epserve_queue_us,
  // epserve_assign_us, epserve_counts_us, epserve_dispatch_us, epserve_ffn_us, epserve_combine_us,
  // epserve_server_us.
  std::map<std::string, std::int64_t> parameters;
  // Where the request asked for it: JSON with started_us (the batch went to the workers),
  // count_exchange ("coordinator", "streams" or "device": how the count matrix was made) and
  // counts_ns (what it took), and for each of `workers` its rank, start_ns (its shard had come) and
  // the durations assign_ns, counts_ns, dispatch_ns, ffn_ns, combine_ns, one after another. Times
  // are CLOCK_MONOTONIC's of the service's machine.
  std::string trace;
  int attempts = 1;  // How many it took.
};

// A call on its way. Dropping it does not cancel the call.
class PendingInfer {
 public:
  virtual ~PendingInfer() = default;
  // Asks for the end of the call, whether it is on the wire or waiting to be retried. The callback
  // still runs, once, with CANCELLED unless the call was already over. From any thread.
  virtual void Cancel() = 0;
};

struct StreamOptions {
  // Of the whole stream. InfiniteDuration: none.
  absl::Duration timeout = absl::InfiniteDuration();
  std::vector<std::pair<std::string, std::string>> metadata;  // Keys in lower case.
  // Of an asynchronous stream: how many requests may be sent and not yet answered.
  std::size_t max_under_way = 64;
};

// One stream of requests, several under way at once, whose results come in the requests' order:
// the cheapest way to send many. Nothing is retried: a request that fails is an error in its place,
// with RetryPushback() for whoever sends it again, and the stream goes on; a stream that breaks is
// UNAVAILABLE for all that it still owes.
//
// Thread safety: Send and Receive may be called by two threads at once, each by one; Cancel by any.
// Both block: Send while the service takes no more (it bounds what one stream may have under way,
// so whoever sends more than that must receive meanwhile), Receive until the next result. A service
// ends a stream whose results are left unread for longer than its --reply-timeout-ms.
class InferStream {
 public:
  virtual ~InferStream() = default;  // Cancels what is under way.
  // `request`'s timeout is not used: see StreamOptions.
  virtual absl::Status Send(const InferRequest& request) = 0;
  // The result of the oldest request that was sent and not received; FAILED_PRECONDITION: none is.
  // `spare`: as of InferenceClient::Infer.
  virtual absl::StatusOr<InferResult> Receive(TensorBytes spare) = 0;
  absl::StatusOr<InferResult> Receive() { return Receive(TensorBytes()); }
  virtual void Cancel() = 0;
};

using InferCallback = std::function<void(absl::StatusOr<InferResult>)>;

// As InferStream, without a thread that waits: each request brings the callback that its result or
// error goes to, in the requests' order, one after another.
//
//   const auto stream = client.OpenAsyncStream();
//   absl::Status sent = stream->Send(request, [](absl::StatusOr<InferResult> result) { ... });
//
// Thread safety: all of it, from any thread, callbacks included. Nothing blocks, and callbacks must
// not either: others wait for the thread that they run on.
class AsyncInferStream {
 public:
  // Cancels what is under way; the callbacks still run. May be called from one.
  virtual ~AsyncInferStream() = default;
  // OK: `done` will be called, once; else it is dropped. RESOURCE_EXHAUSTED: max_under_way requests
  // are not yet answered, and the next can be sent from the callback of one. UNAVAILABLE: the
  // stream has ended. FAILED_PRECONDITION: End was called. `request`'s timeout is not used: see
  // StreamOptions. `spare`: as of InferenceClient::Infer.
  virtual absl::Status Send(const InferRequest& request, InferCallback done, TensorBytes spare) = 0;
  absl::Status Send(const InferRequest& request, InferCallback done) {
    return Send(request, std::move(done), TensorBytes());
  }
  // Nothing more is sent; what is under way is still answered.
  virtual void End() = 0;
  // What is under way ends CANCELLED, unless it is over already.
  virtual void Cancel() = 0;
};

// What the service says of its model.
struct ModelDescription {
  std::string name;
  std::vector<std::string> versions;
  std::string platform;
  std::int64_t hidden = 0;  // H
  std::int64_t topk = 0;    // K
};

// A window of a shared-memory object, under the name that requests use.
struct RegionDescription {
  std::string name;
  std::string key;  // of shm_open
  std::uint64_t offset_bytes = 0;
  std::uint64_t size_bytes = 0;
};

// CUDA memory, under the name that requests use.
struct CudaRegionDescription {
  std::string name;
  std::string handle;  // cudaIpcMemHandle_t, 64 bytes; empty in what ListCudaRegions gives
  std::int64_t device = 0;
  std::uint64_t size_bytes = 0;  // from the beginning of the allocation that the handle leads to
};

class InferenceClient {
 public:
  explicit InferenceClient(const ClientOptions& options);
  ~InferenceClient();
  InferenceClient(const InferenceClient&) = delete;
  InferenceClient& operator=(const InferenceClient&) = delete;

  // Blocks until the answer, an error that is not retried, or the timeout. A result of a megabyte
  // or more stays in the pieces that it came in until it is asked for in one, see TensorBytes. In
  // one piece it is written to the memory of `spare`, such as an earlier result's bytes, if it is
  // large enough and nobody else holds it.
  absl::StatusOr<InferResult> Infer(const InferRequest& request, TensorBytes spare = {});

  // Returns at once. `done` is called exactly once, from a thread of this library's
  // (async_threads): it must not block, and may start further calls. `spare`: as of Infer.
  std::shared_ptr<PendingInfer> InferAsync(const InferRequest& request, InferCallback done,
                                           TensorBytes spare = {});

  // Returns at once; an error to connect shows in Send or Receive. May outlive the client.
  std::unique_ptr<InferStream> OpenStream(const StreamOptions& options = {});
  std::unique_ptr<AsyncInferStream> OpenAsyncStream(const StreamOptions& options = {});

  // Waits until the service says it is ready: a batch has gone through every worker and come back
  // right. DEADLINE_EXCEEDED with the last reason if it is not within `timeout`.
  absl::Status WaitUntilReady(absl::Duration timeout);
  absl::StatusOr<bool> IsReady(absl::Duration timeout);

  // The name of the one model that the service holds. FAILED_PRECONDITION: it holds none or many.
  absl::StatusOr<std::string> OnlyModel(absl::Duration timeout);
  absl::StatusOr<ModelDescription> DescribeModel(const std::string& model, absl::Duration timeout);

  // Shared memory of the service's machine; shared_region.h has memory that registers itself.
  // ALREADY_EXISTS: the name is taken. UNIMPLEMENTED: the service does not allow it.
  absl::Status RegisterRegion(const RegionDescription& region, absl::Duration timeout);
  // Returns once nobody uses the region any more; OK where there is none of that name.
  absl::Status UnregisterRegion(const std::string& name, absl::Duration timeout);
  absl::StatusOr<std::vector<RegionDescription>> ListRegions(absl::Duration timeout);  // by name

  // CUDA memory of the workers' machine; cuda_region.h has memory that registers itself. As above,
  // and FAILED_PRECONDITION: a worker cannot open it, and says why.
  absl::Status RegisterCudaRegion(const CudaRegionDescription& region, absl::Duration timeout);
  // Returns once no worker has the memory mapped; OK where there is none of that name.
  absl::Status UnregisterCudaRegion(const std::string& name, absl::Duration timeout);
  absl::StatusOr<std::vector<CudaRegionDescription>> ListCudaRegions(absl::Duration timeout);

 private:
  struct Core;
  std::shared_ptr<Core> core_;
};

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_CPP_CLIENT_H_
