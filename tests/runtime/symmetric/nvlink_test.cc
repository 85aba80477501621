#include "runtime/symmetric/nvlink.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <string>

namespace epserve::runtime {
namespace {

// Four GPUs; a GPU's handle is its number plus 1.
struct FakeNvml {
  int unlinked = -1;       // the GPU that is reached over PCIe
  bool knows_pair = true;  // whether it tells of pairs
};
FakeNvml fake;

NvmlDevice Handle(unsigned gpu) { return reinterpret_cast<NvmlDevice>(std::uintptr_t{gpu} + 1); }

NvmlApi FakeApi(FakeNvml state) {
  fake = state;
  NvmlApi api;
  api.DeviceGetCount = [](unsigned* count) {
    *count = 4;
    return 0;
  };
  api.DeviceGetHandleByIndex = [](unsigned index, NvmlDevice* device) {
    *device = Handle(index);
    return 0;
  };
  api.DeviceGetHandleByPciBusId = [](const char* bus_id, NvmlDevice* device) {
    if (std::string(bus_id) != "0000:1B:00.0") return 6;  // NVML_ERROR_NOT_FOUND
    *device = Handle(1);
    return 0;
  };
  api.DeviceGetP2PStatus = [](NvmlDevice from, NvmlDevice to, int index, int* status) {
    EXPECT_EQ(from, Handle(1));
    EXPECT_NE(to, from);
    EXPECT_EQ(index, 2);
    if (!fake.knows_pair) return 3;  // NVML_ERROR_NOT_SUPPORTED
    *status = fake.unlinked >= 0 && to == Handle(static_cast<unsigned>(fake.unlinked)) ? 5 : 0;
    return 0;
  };
  return api;
}

TEST(NvLinkTest, GpuThatReachesAllOthersOverNvLinkIsFine) {
  EXPECT_TRUE(CheckNvLinkOf(FakeApi({}), "0000:1B:00.0").ok());
}

TEST(NvLinkTest, GpuThatIsReachedOtherwiseIsNamed) {
  const absl::Status status = CheckNvLinkOf(FakeApi({.unlinked = 3}), "0000:1B:00.0");
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(status.message().find("does not reach GPU 3"), std::string::npos) << status;
}

TEST(NvLinkTest, PairThatNothingIsKnownOfIsNotFine) {
  const absl::Status status = CheckNvLinkOf(FakeApi({.knows_pair = false}), "0000:1B:00.0");
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(status.message().find("nvmlDeviceGetP2PStatus failed with 3"), std::string::npos)
      << status;
}

TEST(NvLinkTest, UnknownGpuIsNotFine) {
  EXPECT_EQ(CheckNvLinkOf(FakeApi({}), "0000:FF:00.0").code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST(NvLinkTest, MissingLibraryIsNotFine) {
  const auto api = OpenNvmlLibrary("libnone-such.so");
  EXPECT_EQ(api.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(api.status().message().find("libnone-such.so"), std::string::npos) << api.status();
}

TEST(NvLinkTest, LibraryWithoutTheFunctionsIsNotFine) {
  const auto api = OpenNvmlLibrary("libm.so.6");
  EXPECT_EQ(api.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(api.status().message().find("NVML has no nvmlInit_v2"), std::string::npos)
      << api.status();
}

}  // namespace
}  // namespace epserve::runtime
