// The parameters of a request and of its tensors: which are known, of which type, and the window of
// shared memory that they may describe. Pure functions, safe from any thread.
#ifndef EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_REQUEST_PARAMETERS_H_
#define EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_REQUEST_PARAMETERS_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/coordinator/front_door/request_view.h"

namespace epserve::coordinator {

// What the parameters of a whole request say.
struct RequestParameters {
  std::optional<std::int64_t> layer;
  std::int64_t timeout_us = 0;  // 0: none
  bool trace = false;
};

// Knows `layer` (int64), `timeout` (int64, microseconds), `epserve_trace` (bool: tell each worker's
// times with the reply), `priority` (every request has the same,
// so it is left unread), and the protocol's own hints, which begin with `triton_`. Any other is
// refused: a misspelt `layer` must not be served from the default one.
absl::StatusOr<RequestParameters> ParseRequestParameters(
    const std::vector<ParameterView>& parameters, const RequestLimits& limits);

struct ShmWindow {
  std::string_view region;
  std::uint64_t offset_bytes = 0;
  std::uint64_t size_bytes = 0;  // at least 1
};

// The window that a tensor's parameters give, or none if they give none. `owner` names the tensor
// in errors: "input topk_ids".
absl::StatusOr<std::optional<ShmWindow>> ParseShmWindow(
    const std::string& owner, const std::vector<ParameterView>& parameters,
    const RequestLimits& limits);

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_REQUEST_PARAMETERS_H_
