// The control stream's protobuf messages to and from the worker's plain structs. Byte strings are
// moved, never copied. Pure functions, safe from any thread.
#ifndef EPSERVE_SERVER_WORKER_CONTROL_PROTO_CONVERT_H_
#define EPSERVE_SERVER_WORKER_CONTROL_PROTO_CONVERT_H_

#include "absl/status/statusor.h"
#include "epserve/v1/control.pb.h"
#include "server/worker/control_messages.h"

namespace epserve::worker {

// UNIMPLEMENTED: a kind of message that this build does not know. INVALID_ARGUMENT: a value that no
// coordinator of this version sends (a row type, a count matrix that is not square, a placement
// that is none), naming it. Takes the strings out of `message`.
absl::StatusOr<CoordinatorMessage> FromProto(v1::CoordinatorMessage& message);

v1::WorkerMessage ToProto(WorkerMessage message);

}  // namespace epserve::worker

#endif  // EPSERVE_SERVER_WORKER_CONTROL_PROTO_CONVERT_H_
