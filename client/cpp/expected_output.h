// What the answer to a request must be. Internal to client/cpp.
#ifndef EPSERVE_CLIENT_CPP_EXPECTED_OUTPUT_H_
#define EPSERVE_CLIENT_CPP_EXPECTED_OUTPUT_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "client/cpp/tensor.h"

namespace epserve::client {

inline constexpr char kHiddenStates[] = "hidden_states";

struct ExpectedOutput {
  std::vector<std::int64_t> shape;
  ElementType type = ElementType::kF32;
  std::optional<RegionPlace> place;
};

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_CPP_EXPECTED_OUTPUT_H_
