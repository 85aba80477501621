#include "server/rpc/health_service.h"

#include <gmock/gmock.h>

#include "grpc/health/v1/health.grpc.pb.h"
#include "tests/server/rpc/rpc_fixture.h"

namespace epserve::server {
namespace {

using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;
using testing::HasSubstr;

class HealthTest : public RpcTest {
 protected:
  HealthTest() {
    health_.AddTo(&server_);
    health_.Set("service", false);
    Start();
    stub_ = grpc::health::v1::Health::NewStub(channel_);
  }
  ~HealthTest() override { server_.Stop(std::chrono::milliseconds(0)); }

  static HealthCheckRequest For(const std::string& service) {
    HealthCheckRequest request;
    request.set_service(service);
    return request;
  }
  HealthCheckResponse::ServingStatus Check(const std::string& service) {
    grpc::ClientContext context;
    HealthCheckResponse response;
    const grpc::Status status = stub_->Check(&context, For(service), &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response.status();
  }

  Health health_;
  std::unique_ptr<grpc::health::v1::Health::Stub> stub_;
};

TEST_F(HealthTest, CheckFollowsTheState) {
  EXPECT_EQ(Check("service"), HealthCheckResponse::NOT_SERVING);
  health_.Set("service", true);
  EXPECT_EQ(Check("service"), HealthCheckResponse::SERVING);
  health_.ShutDown();
  EXPECT_EQ(Check("service"), HealthCheckResponse::NOT_SERVING);
  health_.Set("service", true);
  EXPECT_EQ(Check("service"), HealthCheckResponse::NOT_SERVING);
}

TEST_F(HealthTest, CheckOfAnUnknownServiceIsNotFoundByName) {
  grpc::ClientContext context;
  HealthCheckResponse response;
  const grpc::Status status = stub_->Check(&context, For("other"), &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_THAT(status.error_message(), HasSubstr("other"));
}

TEST_F(HealthTest, WatchTellsTheStateNowAndEveryChangeOfIt) {
  grpc::ClientContext context;
  const auto watch = stub_->Watch(&context, For("service"));
  HealthCheckResponse response;
  ASSERT_TRUE(watch->Read(&response));
  EXPECT_EQ(response.status(), HealthCheckResponse::NOT_SERVING);
  health_.Set("other", true);  // of no concern here
  health_.Set("service", true);
  ASSERT_TRUE(watch->Read(&response));
  EXPECT_EQ(response.status(), HealthCheckResponse::SERVING);
  health_.ShutDown();
  ASSERT_TRUE(watch->Read(&response));
  EXPECT_EQ(response.status(), HealthCheckResponse::NOT_SERVING);
  context.TryCancel();
  EXPECT_EQ(watch->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(HealthTest, WatchOfAnUnknownServiceWaitsForIt) {
  grpc::ClientContext context;
  const auto watch = stub_->Watch(&context, For("later"));
  HealthCheckResponse response;
  ASSERT_TRUE(watch->Read(&response));
  EXPECT_EQ(response.status(), HealthCheckResponse::SERVICE_UNKNOWN);
  health_.Set("later", true);
  ASSERT_TRUE(watch->Read(&response));
  EXPECT_EQ(response.status(), HealthCheckResponse::SERVING);
  context.TryCancel();
  EXPECT_EQ(watch->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

}  // namespace
}  // namespace epserve::server
