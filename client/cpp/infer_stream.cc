#include "client/cpp/infer_stream.h"

#include <grpcpp/client_context.h>
#include <grpcpp/support/sync_stream.h>

#include <deque>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "client/cpp/channel.h"
#include "client/cpp/infer_message.h"
#include "client/cpp/infer_wire.h"
#include "client/cpp/status.h"
#include "inference/grpc_service.pb.h"

namespace epserve::client {
namespace {

class GrpcInferStream final : public InferStream {
 public:
  GrpcInferStream(std::shared_ptr<grpc::Channel> channel, const StreamOptions& options)
      : channel_(std::move(channel)) {
    StartCall(*channel_, context_, options.timeout);
    for (const auto& [key, value] : options.metadata) context_.AddMetadata(key, value);
    const grpc::internal::RpcMethod method(kStreamInferMethod,
                                           grpc::internal::RpcMethod::BIDI_STREAMING);
    stream_.reset(
        grpc::internal::ClientReaderWriterFactory<grpc::ByteBuffer, grpc::ByteBuffer>::Create(
            channel_.get(), method, &context_));
  }

  ~GrpcInferStream() override {
    Cancel();
    (void)End();  // Nobody asks any more.
  }

  absl::Status Send(const InferRequest& request) override {
    EPC_ASSIGN_OR_RETURN(const RequestParts parts, ToMessage(request));
    {
      // Before it is sent: its result may come before Write returns.
      absl::MutexLock lock(&mutex_);
      owed_.push_back(ExpectedOf(request));
    }
    if (stream_->Write(Serialize(parts))) return absl::OkStatus();
    {
      absl::MutexLock lock(&mutex_);
      if (!owed_.empty()) owed_.pop_back();
    }
    return absl::UnavailableError("infer stream: it has ended; Receive says why");
  }

  using InferStream::Receive;
  absl::StatusOr<InferResult> Receive(TensorBytes spare) override {
    ExpectedOutput owed;
    {
      absl::MutexLock lock(&mutex_);
      if (owed_.empty()) {
        return absl::FailedPreconditionError("infer stream: no request is under way; send one");
      }
      owed = owed_.front();
    }
    spare = SpareOf(std::move(spare));
    grpc::ByteBuffer reply;
    if (!stream_->Read(&reply)) return End();
    {
      absl::MutexLock lock(&mutex_);
      owed_.pop_front();
    }
    return StreamedResultOf(owed, std::move(reply), std::move(spare));
  }

  void Cancel() override { context_.TryCancel(); }

 private:
  // Why the stream has ended. Called by the receiver, or once nobody receives any more.
  absl::Status End() {
    if (!ended_) {
      ended_ = true;
      end_ = FromGrpcStatus(stream_->Finish());
      if (end_.ok()) end_ = absl::UnavailableError("infer stream: the service ended it");
    }
    return end_;
  }

  const std::shared_ptr<grpc::Channel> channel_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReaderWriter<grpc::ByteBuffer, grpc::ByteBuffer>> stream_;
  absl::Mutex mutex_;
  std::deque<ExpectedOutput> owed_ ABSL_GUARDED_BY(mutex_);  // oldest first
  bool ended_ = false;                                       // the receiver's
  absl::Status end_;
};

}  // namespace

std::unique_ptr<InferStream> OpenInferStream(std::shared_ptr<grpc::Channel> channel,
                                             const StreamOptions& options) {
  return std::make_unique<GrpcInferStream>(std::move(channel), options);
}

}  // namespace epserve::client
