#include "server/microbench/fan_out.h"

#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server.h>

#include <chrono>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "runtime/base/status.h"
#include "server/microbench/child_process.h"
#include "server/microbench/echo_client.h"
#include "server/microbench/echo_peer.h"

namespace epserve::microbench {
namespace {

// One worker's stream; the tag of its operations.
struct Link {
  grpc::GenericServerContext context;
  grpc::GenericServerAsyncReaderWriter stream{&context};
  grpc::ByteBuffer answer;
  bool open = false;
};

class FanOutServer {
 public:
  explicit FanOutServer(int num_workers) {
    for (int i = 0; i < num_workers; ++i) links_.push_back(std::make_unique<Link>());
  }
  // Ends the streams and takes back what is in flight, before the workers are ended.
  ~FanOutServer() {
    for (const auto& link : links_) {
      if (link->open) link->stream.Finish(grpc::Status::OK, link.get());
    }
    if (server_ != nullptr) server_->Shutdown(std::chrono::system_clock::now());
    if (queue_ == nullptr) return;
    queue_->Shutdown();
    void* tag = nullptr;
    bool ok = false;
    while (queue_->Next(&tag, &ok)) {
    }
  }

  absl::Status Start(const std::string& address) {
    grpc::ServerBuilder builder;
    ApplyEchoLimits(builder);
    int port = 0;
    builder.AddListeningPort(address, grpc::InsecureServerCredentials(), &port);
    builder.RegisterAsyncGenericService(&service_);
    queue_ = builder.AddCompletionQueue();
    server_ = builder.BuildAndStart();
    if (server_ == nullptr || port <= 0) {
      return absl::InternalError(absl::StrCat("rpc: address ", address, " cannot be bound"));
    }
    target_ = address.starts_with("unix:") ? address : absl::StrCat("127.0.0.1:", port);
    for (const auto& link : links_) {
      service_.RequestCall(&link->context, &link->stream, queue_.get(), queue_.get(), link.get());
    }
    for (std::size_t i = 0; i < links_.size(); ++i) {
      EPS_ASSIGN_OR_RETURN(ChildProcess worker,
                           ChildProcess::Start({"rpc-worker", absl::StrCat("--target=", target_)}));
      workers_.push_back(std::move(worker));
    }
    for (std::size_t i = 0; i < links_.size(); ++i) {
      void* tag = nullptr;
      EPS_RETURN_IF_ERROR(NextEvent(*queue_, "await a worker", &tag));
      static_cast<Link*>(tag)->open = true;
    }
    return absl::OkStatus();
  }

  // To all, and back from the last.
  absl::Status Round(const grpc::ByteBuffer& message) {
    for (const auto& link : links_) link->stream.Write(message, link.get());
    for (const auto& link : links_) link->stream.Read(&link->answer, link.get());
    for (std::size_t i = 0; i < 2 * links_.size(); ++i) {
      void* tag = nullptr;
      EPS_RETURN_IF_ERROR(NextEvent(*queue_, "a worker's answer", &tag));
    }
    for (const auto& link : links_) {
      if (link->answer.Length() == message.Length()) continue;
      return absl::InternalError(absl::StrCat("rpc: a worker answered ", message.Length(),
                                              " bytes with ", link->answer.Length()));
    }
    return absl::OkStatus();
  }

 private:
  grpc::AsyncGenericService service_;
  std::unique_ptr<grpc::ServerCompletionQueue> queue_;
  std::string target_;
  std::vector<std::unique_ptr<Link>> links_;
  std::unique_ptr<grpc::Server> server_;
  std::vector<ChildProcess> workers_;
};

}  // namespace

absl::StatusOr<runtime::Percentiles> MeasureFanOut(const std::string& address, int num_workers,
                                                   std::int64_t bytes, int warmup, int iterations) {
  FanOutServer server(num_workers);
  EPS_RETURN_IF_ERROR(server.Start(address));
  const grpc::Slice slice(std::string(static_cast<std::size_t>(bytes), 'x'));
  const grpc::ByteBuffer message(&slice, 1);
  std::vector<double> samples_us;
  for (int i = -warmup; i < iterations; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    EPS_RETURN_IF_ERROR(server.Round(message));
    if (i >= 0) samples_us.push_back(UsSince(begin));
  }
  return runtime::PercentilesOf(std::move(samples_us));
}

}  // namespace epserve::microbench
