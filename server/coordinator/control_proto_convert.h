// Between the control protocol's messages and the host's plain structs. Pure functions.
#ifndef EPSERVE_SERVER_COORDINATOR_CONTROL_PROTO_CONVERT_H_
#define EPSERVE_SERVER_COORDINATOR_CONTROL_PROTO_CONVERT_H_

#include "absl/status/statusor.h"
#include "epserve/v1/control.pb.h"
#include "server/coordinator/worker_stream.h"

namespace epserve::coordinator {

HelloInfo FromProto(const v1::Hello& hello);

// A message of the stream `stream`. The payloads are moved out of `message`. INVALID_ARGUMENT: a
// second Hello, or a message of no known kind.
absl::StatusOr<WorkerReport> FromProto(StreamId stream, v1::WorkerMessage& message);

v1::CoordinatorMessage ToProto(StreamMessage message);

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_CONTROL_PROTO_CONVERT_H_
