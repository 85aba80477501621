#include "server/microbench/echo_peer.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/security/server_credentials.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstdint>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace epserve::microbench {
namespace {

constexpr int kWindowBytes = 16 << 20;
constexpr int kFrameBytes = 1 << 20;
// Calls that the server is ready to take at once.
constexpr int kWaitingCalls = 128;

// One call that is answered with its own bytes; deletes itself.
class EchoCall {
 public:
  EchoCall(grpc::AsyncGenericService* service, grpc::ServerCompletionQueue* queue)
      : service_(service), queue_(queue), stream_(&context_) {
    service->RequestCall(&context_, &stream_, queue, queue, this);
  }

  void Proceed(bool ok) {
    switch (state_) {
      case State::kAccepting:
        if (!ok) return delete this;
        new EchoCall(service_, queue_);
        is_stream_ = context_.method() == kStreamMethod;
        return Read();
      case State::kReading:
        if (!ok) return Finish();
        if (is_stream_) {
          state_ = State::kWriting;
          return stream_.Write(message_, this);
        }
        state_ = State::kFinishing;
        return stream_.WriteAndFinish(message_, grpc::WriteOptions(), grpc::Status::OK, this);
      case State::kWriting:
        return ok ? Read() : Finish();
      case State::kFinishing:
        delete this;
    }
  }

 private:
  enum class State { kAccepting, kReading, kWriting, kFinishing };

  void Read() {
    state_ = State::kReading;
    stream_.Read(&message_, this);
  }
  void Finish() {
    state_ = State::kFinishing;
    stream_.Finish(grpc::Status::OK, this);
  }

  grpc::AsyncGenericService* const service_;
  grpc::ServerCompletionQueue* const queue_;
  grpc::GenericServerContext context_;
  grpc::GenericServerAsyncReaderWriter stream_;
  grpc::ByteBuffer message_;
  bool is_stream_ = false;
  State state_ = State::kAccepting;
};

absl::Status WriteLine(int fd, int number) {
  const std::string line = absl::StrCat(number, "\n");
  if (::write(fd, line.data(), line.size()) == static_cast<ssize_t>(line.size())) {
    return absl::OkStatus();
  }
  return absl::InternalError(
      absl::StrCat("rpc: the port could not be told: ", std::strerror(errno)));
}

}  // namespace

std::shared_ptr<grpc::Channel> EchoChannel(const std::string& target) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);
  arguments.SetMaxSendMessageSize(-1);
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, kWindowBytes);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_FRAME_SIZE, kFrameBytes);
  return grpc::CreateCustomChannel(target, grpc::InsecureChannelCredentials(), arguments);
}

void ApplyEchoLimits(grpc::ServerBuilder& builder) {
  builder.SetMaxReceiveMessageSize(INT_MAX);
  builder.SetMaxSendMessageSize(INT_MAX);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, kWindowBytes);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_FRAME_SIZE, kFrameBytes);
}

absl::Status ServeEcho(const std::string& socket_path, int port_fd) {
  grpc::AsyncGenericService service;
  grpc::ServerBuilder builder;
  ApplyEchoLimits(builder);
  int port = 0;
  builder.AddListeningPort("unix:" + socket_path, grpc::InsecureServerCredentials());
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterAsyncGenericService(&service);
  const std::unique_ptr<grpc::ServerCompletionQueue> queue = builder.AddCompletionQueue();
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  // Before any call is awaited, so that there is nothing to be taken back.
  absl::Status told = absl::InternalError("rpc: the echo server could not listen");
  if (server != nullptr) told = WriteLine(port_fd, port);
  if (!told.ok()) {
    if (server != nullptr) server->Shutdown();
    queue->Shutdown();
    return told;
  }
  for (int i = 0; i < kWaitingCalls; ++i) new EchoCall(&service, queue.get());
  void* tag = nullptr;
  bool ok = false;
  while (queue->Next(&tag, &ok)) static_cast<EchoCall*>(tag)->Proceed(ok);
  return absl::InternalError("rpc: the echo server's queue ended");
}

absl::Status WorkAsEcho(const std::string& target) {
  grpc::GenericStub stub(EchoChannel(target));
  grpc::CompletionQueue queue;
  grpc::ClientContext context;
  const auto stream = stub.PrepareCall(&context, kStreamMethod, &queue);
  grpc::ByteBuffer message;
  void* tag = nullptr;
  bool ok = false;
  int step = 0;
  stream->StartCall(&step);
  while (queue.Next(&tag, &ok) && ok) {
    // Started, then read and written by turns.
    if (step++ % 2 == 0) {
      stream->Read(&message, &step);
    } else {
      stream->Write(message, &step);
    }
  }
  grpc::Status status;
  stream->Finish(&status, &step);
  queue.Next(&tag, &ok);
  queue.Shutdown();
  while (queue.Next(&tag, &ok)) {
  }
  return absl::OkStatus();
}

}  // namespace epserve::microbench
