// What a request's message may hold, looked at on the wire before anything is copied of it or
// allocated for it.
//
// The parser makes up to 27 bytes of memory of one byte of a message, 8 of an element, and takes
// half a second for 16 MiB of tiny fields: on the thread that takes the workers' heartbeats, too,
// and beside what the memory budget counts. A request within these bounds costs little more than
// its own bytes, so that nobody's message keeps the others waiting. Looking ends where a bound is
// passed, and skips what is in one piece.
//
// It also finds what the parser need not see: see message_split.h. What it must see has a lower
// bound, and one look tells the two apart, so that none is taken for the other.
//
// Pure functions, safe from any thread.
#ifndef EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_REQUEST_BOUNDS_H_
#define EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_REQUEST_BOUNDS_H_

#include <grpcpp/support/byte_buffer.h>

#include <cstddef>
#include <vector>

#include "absl/status/statusor.h"
#include "server/coordinator/front_door/message_split.h"
#include "server/coordinator/front_door/request_view.h"
#include "server/coordinator/front_door/served_model.h"

namespace epserve::coordinator {

// Those that a request to this model may need.
RequestLimits RequestLimitsOf(const ServedModel& model);

struct RequestOutline {
  std::size_t raw_contents = 0;  // entries of raw_input_contents
  // Raw entries of limits.large_entry_bytes and more, and fp32_contents of as many that are one
  // packed field, the only one of their input: others the parser has to put together. In the
  // message's order.
  std::vector<LargeField> large;
};

// INVALID_ARGUMENT naming what is more than `limits` allow, or for bytes that are no
// ModelInferRequest. Where it is OK they may still be none. REQUIRES: `bytes` is valid.
absl::StatusOr<RequestOutline> CheckRequestBounds(const grpc::ByteBuffer& bytes,
                                                  const RequestLimits& limits);

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_REQUEST_BOUNDS_H_
