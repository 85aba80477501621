// Decides whether a request may come in. Every check is made before the first side effect, and
// index and weight tensors are copied privately before their values are looked at, because a region
// of shared memory may change while it is read. Hidden states are not looked at: a NaN in one
// token's state is that token's own affair.
//
// Thread safety: pure, but for reading the regions that a request names.
#ifndef EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_REQUEST_VALIDATION_H_
#define EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_REQUEST_VALIDATION_H_

#include <cstdint>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/coordinator/front_door/request_view.h"
#include "server/coordinator/front_door/served_model.h"
#include "server/coordinator/front_door/shm_registry.h"
#include "server/coordinator/front_door/validated_request.h"

namespace epserve::coordinator {

// Names of the served tensors.
inline constexpr char kHiddenStates[] = "hidden_states";  // input and output
inline constexpr char kTopkIds[] = "topk_ids";
inline constexpr char kTopkWeights[] = "topk_weights";

// What an ordinary reply may have beside its output: names, parameters and a trace of some workers
// come to less.
inline constexpr std::uint64_t kReplyRestBytes = 4096;

// NOT_FOUND unless `name` is the served model and `version` its version or empty.
absl::Status CheckModel(std::string_view operation, std::string_view name, std::string_view version,
                        const ServedModel& model);

// The result's `hidden` points into the memory that `view` shows, unless it came by a region.
//
// NOT_FOUND: model, version, layer, a region that is not registered. UNIMPLEMENTED: a region is
// named while client shared memory is switched off. INVALID_ARGUMENT: everything else, naming the
// tensor, the row where there is one, the value and the limit.
absl::StatusOr<ValidatedRequest> ValidateRequest(const RequestView& view, const ServedModel& model,
                                                 const RequestLimits& limits,
                                                 const ShmRegistry& regions);

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_REQUEST_VALIDATION_H_
