#include "server/worker/open_device_regions.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/server/worker/fake_engine.h"

namespace epserve::worker {
namespace {

using absl::StatusCode;

class OpenDeviceRegionsTest : public testing::Test {
 protected:
  void SetUp() override {
    memory_.Share("handle", &bytes_);
    engine_.set_device_regions(&memory_);
  }

  std::string bytes_ = std::string(64, 'x');
  FakeDeviceRegions memory_;
  FakeEngine engine_;
  OpenDeviceRegions regions_{&engine_};
};

TEST_F(OpenDeviceRegionsTest, BackendWithoutDeviceMemoryRefusesSayingWhatToDo) {
  engine_.set_device_regions(nullptr);
  const DeviceRegionState state = regions_.Open({1, "'r'", "handle", 0, 64});
  EXPECT_EQ(state.region, 1u);
  EXPECT_EQ(state.status.code(), StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(state.status.message()), testing::HasSubstr("use system shared memory"));
}

TEST_F(OpenDeviceRegionsTest, OfAListThoseAreToldThatCouldNotBeOpened) {
  const std::vector<DeviceRegionInfo> list = {
      {1, "'a'", "handle", 0, 64}, {2, "'b'", "stale", 0, 64}, {3, "'c'", "handle", 0, 65}};
  const std::vector<DeviceRegionState> refused = regions_.OpenAll(list);
  ASSERT_EQ(refused.size(), 2u);
  EXPECT_EQ(refused[0].region, 2u);
  EXPECT_EQ(refused[0].status.code(), StatusCode::kFailedPrecondition);
  EXPECT_EQ(refused[1].region, 3u);
  EXPECT_EQ(regions_.num_open(), 1u);
}

TEST_F(OpenDeviceRegionsTest, PlacesAreHeldToTheRegionWithoutWrapAround) {
  ASSERT_TRUE(regions_.Open({1, "'r'", "handle", 0, 48}).status.ok());
  const auto located = regions_.Locate({1, 16}, 32);
  ASSERT_TRUE(located.ok());
  EXPECT_EQ(located->data, reinterpret_cast<std::byte*>(bytes_.data()) + 16);
  for (const auto& [offset, size] : std::vector<std::pair<std::uint64_t, std::uint64_t>>{
           {17, 32}, {49, 0}, {UINT64_MAX, 2}, {0, UINT64_MAX}}) {
    EXPECT_EQ(regions_.Locate({1, offset}, size).status().code(), StatusCode::kInvalidArgument);
  }
  EXPECT_EQ(regions_.Locate({2, 0}, 1).status().code(), StatusCode::kInternal);
}

TEST_F(OpenDeviceRegionsTest, ClosedRegionIsUnmappedAndSoAreAllInTheEnd) {
  {
    OpenDeviceRegions regions(&engine_);
    ASSERT_TRUE(regions.Open({1, "'r'", "handle", 0, 64}).status.ok());
    ASSERT_TRUE(regions.Open({2, "'s'", "handle", 0, 64}).status.ok());
    EXPECT_EQ(memory_.num_open(), 2);
    regions.Close(std::vector<std::uint64_t>{1, 77});
    EXPECT_EQ(memory_.num_open(), 1);
  }
  EXPECT_EQ(memory_.num_open(), 0);
}

}  // namespace
}  // namespace epserve::worker
