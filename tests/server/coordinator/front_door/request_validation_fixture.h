// A fixture for tests of validation, and the form of a table of requests that are wrong somewhere.
#ifndef EPSERVE_TESTS_SERVER_COORDINATOR_FRONT_DOOR_REQUEST_VALIDATION_FIXTURE_H_
#define EPSERVE_TESTS_SERVER_COORDINATOR_FRONT_DOOR_REQUEST_VALIDATION_FIXTURE_H_

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <limits>
#include <ostream>
#include <string>
#include <string_view>
#include <vector>

#include "server/coordinator/front_door/request_validation.h"
#include "tests/server/coordinator/front_door/test_request.h"

namespace epserve::coordinator {

inline constexpr std::int64_t kInt64Max = std::numeric_limits<std::int64_t>::max();
inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

inline ShmOptions Allowed() {
  ShmOptions options;
  options.allowed = true;
  return options;
}

// A region "region" of 256 bytes is registered.
class RequestValidationTest : public testing::Test {
 protected:
  RequestValidationTest() : regions_(Allowed()), object_(256) {
    EXPECT_TRUE(regions_.Register("region", object_.key(), 0, 256).ok());
  }

  absl::StatusOr<ValidatedRequest> Validate(const TestRequest& request) {
    return ValidateRequest(request.View(), model_, RequestLimits(), regions_);
  }

  ServedModel model_ = TestModel();
  ShmRegistry regions_;
  ShmObject object_;
};

inline std::vector<ParameterView> Window(std::int64_t size, std::int64_t offset = 0,
                                         std::string_view region = "region") {
  return {{"shared_memory_region", region},
          {"shared_memory_byte_size", size},
          {"shared_memory_offset", offset}};
}

struct BadCase {
  const char* name;
  absl::StatusCode code;
  std::vector<std::string> message_parts;
  std::function<void(TestRequest&)> spoil;
};

inline void PrintTo(const BadCase& bad, std::ostream* out) { *out << bad.name; }

class BadRequestTest : public RequestValidationTest, public testing::WithParamInterface<BadCase> {
 protected:
  void ExpectRefusal() {
    TestRequest request = ValidRequest();
    GetParam().spoil(request);
    const auto result = Validate(request);
    EXPECT_EQ(result.status().code(), GetParam().code) << result.status();
    const std::string message(result.status().message());
    EXPECT_FALSE(message.empty());
    for (const std::string& part : GetParam().message_parts) {
      EXPECT_THAT(message, testing::HasSubstr(part));
    }
  }
};

inline constexpr absl::StatusCode kInvalid = absl::StatusCode::kInvalidArgument;

inline std::string CaseName(const testing::TestParamInfo<BadCase>& info) {
  return std::string(info.param.name);
}

}  // namespace epserve::coordinator

#endif  // EPSERVE_TESTS_SERVER_COORDINATOR_FRONT_DOOR_REQUEST_VALIDATION_FIXTURE_H_
