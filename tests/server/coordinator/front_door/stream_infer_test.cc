// ModelStreamInfer: order, ids, errors in place of replies, bounded memory, callers that go away.
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/coordinator/front_door/infer_methods.h"
#include "tests/server/coordinator/front_door/infer_service_fixture.h"

namespace epserve::coordinator {
namespace {

using inference::ModelInferRequest;
using inference::ModelStreamInferResponse;
using testing::Each;
using testing::HasSubstr;
using testing::Not;
using testing::SizeIs;

class StreamInferTest : public InferServiceTest {
 protected:
  using Stream = grpc::ClientReaderWriter<ModelInferRequest, ModelStreamInferResponse>;

  std::unique_ptr<Stream> Open() { return stub_->ModelStreamInfer(&context_); }

  static ModelInferRequest Numbered(int number) {
    ModelInferRequest request = ValidMessage();
    request.set_id(absl::StrCat("r", number));
    return request;
  }

  grpc::ClientContext context_;
};

TEST_F(StreamInferTest, RepliesComeInTheOrderOfTheRequestsWhateverEndsFirst) {
  constexpr int kRequests = 8;
  const auto stream = Open();
  for (int i = 0; i < kRequests; ++i) ASSERT_TRUE(stream->Write(Numbered(i)));
  // All are under way at once; the last to come is answered first.
  std::vector<std::unique_ptr<PendingRequest>> under_way;
  for (int i = 0; i < kRequests; ++i) {
    under_way.push_back(sink_.Take());
    ASSERT_NE(under_way.back(), nullptr);
  }
  std::sort(under_way.begin(), under_way.end(),
            [](const auto& a, const auto& b) { return a->id > b->id; });
  for (auto& request : under_way) Echo(std::move(request));
  for (int i = 0; i < kRequests; ++i) {
    ModelStreamInferResponse response;
    ASSERT_TRUE(stream->Read(&response));
    EXPECT_EQ(response.error_message(), "");
    EXPECT_EQ(response.infer_response().id(), absl::StrCat("r", i));
    EXPECT_EQ(response.infer_response().raw_output_contents(0), ValidRequest().raw[0]);
  }
  stream->WritesDone();
  ModelStreamInferResponse none;
  EXPECT_FALSE(stream->Read(&none));
  EXPECT_TRUE(stream->Finish().ok());
}

TEST_F(StreamInferTest, BadRequestIsAnErrorInItsPlaceAndTheStreamGoesOn) {
  sink_.HandleBy(Echo);
  const auto stream = Open();
  ModelInferRequest bad = Numbered(1);
  bad.set_model_name("nobody");
  ASSERT_TRUE(stream->Write(Numbered(0)));
  ASSERT_TRUE(stream->Write(bad));
  ASSERT_TRUE(stream->Write(Numbered(2)));
  ModelStreamInferResponse responses[3];
  for (auto& response : responses) ASSERT_TRUE(stream->Read(&response));
  EXPECT_EQ(responses[0].error_message(), "");
  EXPECT_THAT(responses[1].error_message(), HasSubstr("nobody"));
  EXPECT_EQ(responses[1].infer_response().id(), "r1");
  EXPECT_EQ(responses[1].infer_response().parameters().at("epserve_error_code").int64_param(),
            static_cast<int>(absl::StatusCode::kNotFound));
  EXPECT_EQ(responses[2].error_message(), "");
  EXPECT_EQ(responses[2].infer_response().id(), "r2");
  stream->WritesDone();
  EXPECT_TRUE(stream->Finish().ok());
}

TEST_F(StreamInferTest, ReplyThatItsTraceMakesTooLargeIsAnErrorInItsPlace) {
  sink_.HandleBy([](std::unique_ptr<PendingRequest> request) {
    if (!request->request.trace) return Echo(std::move(request));
    const auto output = request->MutableOutput();
    std::fill(output.begin(), output.end(), '\0');
    Completion completion = Ok();
    completion.times.ranks.resize(20000);
    request->Complete(completion);
  });
  ModelInferRequest traced = Numbered(0);
  (*traced.mutable_parameters())["epserve_trace"].set_bool_param(true);
  const grpc::Status status = Infer(traced);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("--max-message-bytes 1048576"));
  EXPECT_THAT(status.error_message(), HasSubstr("ask for no epserve_trace"));
  const auto stream = Open();
  ASSERT_TRUE(stream->Write(traced));
  ASSERT_TRUE(stream->Write(Numbered(1)));
  ModelStreamInferResponse responses[2];
  for (auto& response : responses) ASSERT_TRUE(stream->Read(&response));
  EXPECT_EQ(responses[0].infer_response().id(), "r0");
  EXPECT_THAT(responses[0].error_message(), HasSubstr("ask for no epserve_trace"));
  EXPECT_EQ(responses[1].infer_response().id(), "r1");
  EXPECT_EQ(responses[1].error_message(), "");
  stream->WritesDone();
  EXPECT_TRUE(stream->Finish().ok());
}

TEST_F(StreamInferTest, FullQueueTellsWhenToRetryInTheReply) {
  constexpr char kPushback[] = "epserve_retry_pushback_ms";
  sink_.HandleBy([](std::unique_ptr<PendingRequest> request) {
    Completion full{absl::ResourceExhaustedError("full"), {}};
    if (request->request.layer == 4) full.retry_pushback_ms = 777;
    if (request->request.layer == 5) full.status = absl::UnavailableError("away");
    request->Complete(full);
  });
  const auto stream = Open();
  for (const int layer : {3, 4, 5}) {
    ModelInferRequest request = Numbered(layer);
    (*request.mutable_parameters())["layer"].set_int64_param(layer);
    ASSERT_TRUE(stream->Write(request));
  }
  ModelStreamInferResponse responses[3];
  for (auto& response : responses) ASSERT_TRUE(stream->Read(&response));
  EXPECT_EQ(responses[0].error_message(), "full");
  EXPECT_EQ(responses[0].infer_response().parameters().at(kPushback).int64_param(), 50);
  EXPECT_EQ(responses[1].infer_response().parameters().at(kPushback).int64_param(), 777);
  EXPECT_EQ(responses[2].error_message(), "away");
  EXPECT_FALSE(responses[2].infer_response().parameters().contains(kPushback));
  stream->WritesDone();
  EXPECT_TRUE(stream->Finish().ok());
}

TEST_F(StreamInferTest, ErrorWithoutAMessageStillSaysSomething) {
  sink_.HandleBy([](std::unique_ptr<PendingRequest> request) {
    request->Complete({absl::UnavailableError(""), {}});
  });
  const auto stream = Open();
  ASSERT_TRUE(stream->Write(Numbered(0)));
  ModelStreamInferResponse response;
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_THAT(response.error_message(), Not(testing::IsEmpty()));
  stream->WritesDone();
  EXPECT_TRUE(stream->Finish().ok());
}

TEST_F(StreamInferTest, TenThousandRequestsComeBackInOrder) {
  constexpr int kRequests = 10000;
  sink_.HandleBy(Echo);
  const auto stream = Open();
  std::thread writer([&] {
    for (int i = 0; i < kRequests; ++i) ASSERT_TRUE(stream->Write(Numbered(i)));
    stream->WritesDone();
  });
  for (int i = 0; i < kRequests; ++i) {
    ModelStreamInferResponse response;
    ASSERT_TRUE(stream->Read(&response));
    ASSERT_EQ(response.infer_response().id(), absl::StrCat("r", i));
  }
  writer.join();
  EXPECT_TRUE(stream->Finish().ok());
}

TEST_F(StreamInferTest, NoMoreRequestsThanTheLimitAreUnderWay) {
  const auto stream = Open();
  for (int i = 0; i < 2 * kMaxStreamRequests; ++i) ASSERT_TRUE(stream->Write(Numbered(i)));
  std::vector<std::unique_ptr<PendingRequest>> under_way;
  for (int i = 0; i < kMaxStreamRequests; ++i) {
    under_way.push_back(sink_.Take());
    ASSERT_NE(under_way.back(), nullptr);
  }
  // This call comes on the same connection behind all that the stream has sent, and is handled by
  // the same thread: what was to be read before it has been read by now.
  grpc::ClientContext context;
  inference::ServerLiveResponse live;
  ASSERT_TRUE(stub_->ServerLive(&context, {}, &live).ok());
  EXPECT_EQ(sink_.num_waiting(), 0u);
  sink_.HandleBy(Echo);
  for (auto& request : under_way) Echo(std::move(request));
  for (int i = 0; i < 2 * kMaxStreamRequests; ++i) {
    ModelStreamInferResponse response;
    ASSERT_TRUE(stream->Read(&response));
    EXPECT_EQ(response.infer_response().id(), absl::StrCat("r", i));
  }
  stream->WritesDone();
  EXPECT_TRUE(stream->Finish().ok());
}

TEST_F(StreamInferTest, CallerWhoGoesAwayCancelsWhatIsUnderWay) {
  const auto stream = Open();
  std::vector<std::unique_ptr<PendingRequest>> under_way;
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(stream->Write(Numbered(i)));
    under_way.push_back(sink_.Take());
    ASSERT_NE(under_way.back(), nullptr);
  }
  context_.TryCancel();
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_THAT(sink_.WaitForCancelled(3), SizeIs(3));
  EXPECT_THAT(sink_.WaitForAnswers(3), Each(absl::StatusCode::kCancelled));
  for (auto& request : under_way) Echo(std::move(request));  // Its memory is still there.
}

TEST_F(StreamInferTest, BytesThatAreNoRequestAreAnErrorInTheirPlace) {
  sink_.HandleBy(Echo);
  const auto stream = Open();
  ModelInferRequest crowded = Numbered(0);
  for (int i = 0; i < 1000; ++i) crowded.add_outputs();
  ASSERT_TRUE(stream->Write(crowded));
  ModelStreamInferResponse response;
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_THAT(response.error_message(), HasSubstr("more than the limit of 16 outputs"));
  ASSERT_TRUE(stream->Write(Numbered(1)));
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_EQ(response.infer_response().id(), "r1");
  stream->WritesDone();
  EXPECT_TRUE(stream->Finish().ok());
}

}  // namespace
}  // namespace epserve::coordinator
