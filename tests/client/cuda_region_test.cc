// CUDA memory of the client library, against a fake service that keeps a list of regions. What
// needs a GPU skips without one.
#include "client/cpp/cuda_region.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <mutex>
#include <string>

#include "tests/client/fake_service.h"

namespace epserve::client {
namespace {

using testing::HasSubstr;

constexpr absl::Duration kTimeout = absl::Seconds(10);

class CudaRegionService : public FakeService {
 public:
  CudaRegionService() : FakeService(NotStarted()) { Start(kAnyPort); }
  ~CudaRegionService() override { Stop(); }

  grpc::Status CudaSharedMemoryRegister(grpc::ServerContext*,
                                        const inference::CudaSharedMemoryRegisterRequest* request,
                                        inference::CudaSharedMemoryRegisterResponse*) override {
    const std::lock_guard lock(mutex_);
    if (!regions_.emplace(request->name(), *request).second) {
      return {grpc::StatusCode::ALREADY_EXISTS, "register: it is registered"};
    }
    return grpc::Status::OK;
  }
  grpc::Status CudaSharedMemoryUnregister(
      grpc::ServerContext*, const inference::CudaSharedMemoryUnregisterRequest* request,
      inference::CudaSharedMemoryUnregisterResponse*) override {
    const std::lock_guard lock(mutex_);
    regions_.erase(request->name());
    return grpc::Status::OK;
  }
  grpc::Status CudaSharedMemoryStatus(
      grpc::ServerContext*, const inference::CudaSharedMemoryStatusRequest*,
      inference::CudaSharedMemoryStatusResponse* response) override {
    const std::lock_guard lock(mutex_);
    for (const auto& [name, region] : regions_) {
      auto& status = (*response->mutable_regions())[name];
      status.set_name(name);
      status.set_device_id(static_cast<std::uint64_t>(region.device_id()));
      status.set_byte_size(region.byte_size());
    }
    return grpc::Status::OK;
  }
  std::map<std::string, inference::CudaSharedMemoryRegisterRequest> regions() {
    const std::lock_guard lock(mutex_);
    return regions_;
  }

 private:
  std::mutex mutex_;
  std::map<std::string, inference::CudaSharedMemoryRegisterRequest> regions_;
};

class CudaRegionTest : public testing::Test {
 protected:
  CudaRegionService service_;
  InferenceClient client_{ClientOptions{.target = service_.target()}};
};

TEST_F(CudaRegionTest, RegionIsRegisteredListedAndUnregistered) {
  const std::string handle(64, 'h');
  ASSERT_TRUE(client_.RegisterCudaRegion({"b", handle, 2, 4096}, kTimeout).ok());
  ASSERT_TRUE(client_.RegisterCudaRegion({"a", handle, 0, 64}, kTimeout).ok());
  EXPECT_EQ(service_.regions().at("b").raw_handle(), handle);
  const auto listed = client_.ListCudaRegions(kTimeout);
  ASSERT_TRUE(listed.ok()) << listed.status();
  ASSERT_EQ(listed->size(), 2u);
  EXPECT_EQ((*listed)[0].name, "a");
  EXPECT_EQ((*listed)[1].device, 2);
  EXPECT_EQ((*listed)[1].size_bytes, 4096u);
  EXPECT_EQ(client_.RegisterCudaRegion({"a", handle, 0, 64}, kTimeout).code(),
            absl::StatusCode::kAlreadyExists);
  ASSERT_TRUE(client_.UnregisterCudaRegion("a", kTimeout).ok());
  EXPECT_EQ(service_.regions().size(), 1u);
}

TEST_F(CudaRegionTest, EmptyNameIsNotTakenForEveryRegion) {
  ASSERT_TRUE(client_.RegisterCudaRegion({"a", std::string(64, 'h'), 0, 64}, kTimeout).ok());
  EXPECT_EQ(client_.UnregisterCudaRegion("", kTimeout).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(service_.regions().size(), 1u);
}

TEST_F(CudaRegionTest, MemoryIsRefusedWithAReasonOrHoldsWhatIsWritten) {
  EXPECT_FALSE(CudaRegion::Create(&client_, "none", 0, 0).ok());
  const auto far = CudaRegion::Create(&client_, "far", 64, 1000);
  EXPECT_EQ(far.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(far.status().message()), HasSubstr("cuda memory:"));
  EXPECT_TRUE(service_.regions().empty());
  auto region = CudaRegion::Create(&client_, "gpu", 64, 0);
  if (absl::IsFailedPrecondition(region.status())) {
    GTEST_SKIP() << "no GPU: " << region.status();
  }
  ASSERT_TRUE(region.ok()) << region.status();
  EXPECT_EQ(service_.regions().at("gpu").raw_handle().size(), 64u);
  CudaMemory& memory = (*region)->memory();
  ASSERT_TRUE(memory.Write(10, std::string("hello")).ok());
  std::string got(5, '\0');
  ASSERT_TRUE(memory.Read(10, got).ok());
  EXPECT_EQ(got, "hello");
  EXPECT_EQ(memory.Write(60, std::string("hello")).code(), absl::StatusCode::kInvalidArgument);
  region->reset();
  EXPECT_TRUE(service_.regions().empty());
}

}  // namespace
}  // namespace epserve::client
