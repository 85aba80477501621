// Statuses across the RPC edge: Status inside, converted once, where a service answers or a client
// reads. The codes of both libraries have the same numbers. Pure functions, safe from any thread.
#ifndef EPSERVE_SERVER_COMMON_GRPC_STATUS_H_
#define EPSERVE_SERVER_COMMON_GRPC_STATUS_H_

#include <grpcpp/support/status.h>

#include "absl/status/status.h"

namespace epserve::server {

// A status that is not OK never leaves with an empty message, which some clients take for success:
// the code's name stands in. A message longer than 4 KiB is cut there, on a character boundary,
// because it travels in the trailing metadata, which clients bound (8 KiB by default).
grpc::Status ToGrpcStatus(const absl::Status& status);

// A code outside the known ones becomes UNKNOWN, with its number in the message.
absl::Status FromGrpcStatus(const grpc::Status& status);

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_COMMON_GRPC_STATUS_H_
