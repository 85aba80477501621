#include "server/worker/health_port.h"

#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>

#include "grpc/health/v1/health.grpc.pb.h"

namespace epserve::worker {
namespace {

using grpc::health::v1::HealthCheckResponse;
using testing::HasSubstr;

class HealthPortTest : public testing::Test {
 protected:
  HealthPortTest() {
    std::string name = (std::filesystem::temp_directory_path() / "epserve-health-XXXXXX").string();
    EXPECT_NE(mkdtemp(name.data()), nullptr);
    dir_ = name;
    address_ = "unix:" + dir_ + "/socket";
  }
  ~HealthPortTest() override { std::filesystem::remove_all(dir_); }

  HealthCheckResponse::ServingStatus Check(const std::string& service) const {
    const auto stub = grpc::health::v1::Health::NewStub(
        grpc::CreateChannel(address_, grpc::InsecureChannelCredentials()));
    grpc::ClientContext context;
    grpc::health::v1::HealthCheckRequest request;
    request.set_service(service);
    HealthCheckResponse response;
    const grpc::Status status = stub->Check(&context, request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response.status();
  }

  std::string dir_;
  std::string address_;
};

TEST_F(HealthPortTest, LivenessServesAtOnceAndReadinessWhenItIsSaid) {
  const auto port = HealthPort::Listen(address_);
  ASSERT_TRUE(port.ok()) << port.status();
  EXPECT_EQ(Check("liveness"), HealthCheckResponse::SERVING);
  EXPECT_EQ(Check("readiness"), HealthCheckResponse::NOT_SERVING);
  EXPECT_EQ(Check(""), HealthCheckResponse::NOT_SERVING);
  (*port)->SetReady(true);
  EXPECT_EQ(Check("readiness"), HealthCheckResponse::SERVING);
  EXPECT_EQ(Check(""), HealthCheckResponse::SERVING);
  (*port)->SetReady(false);
  EXPECT_EQ(Check("readiness"), HealthCheckResponse::NOT_SERVING);
  EXPECT_EQ(Check("liveness"), HealthCheckResponse::SERVING);
}

TEST_F(HealthPortTest, AddressThatCannotBeBoundIsUnavailableByName) {
  const std::string address = "unix:" + dir_ + "/missing/socket";
  const auto port = HealthPort::Listen(address);
  EXPECT_EQ(port.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(port.status().message()), HasSubstr(address));
  EXPECT_THAT(std::string(port.status().message()), HasSubstr("--health-listen"));
}

}  // namespace
}  // namespace epserve::worker
