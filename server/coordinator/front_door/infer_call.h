// One ModelInfer call: parse, validate, submit, and answer exactly once, whoever comes first of the
// sink's completion and the caller's going away.
//
// Memory: the call, the parsed message and the output are held by the gRPC side until it has
// finished and by the sink's PendingRequest until that is destroyed, so neither outlives what the
// other uses.
#ifndef EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_INFER_CALL_H_
#define EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_INFER_CALL_H_

#include <grpcpp/server_context.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/server_callback.h>

#include <atomic>
#include <cstdint>

#include "server/coordinator/front_door/request_sink.h"
#include "server/coordinator/front_door/request_view.h"
#include "server/coordinator/front_door/served_model.h"
#include "server/coordinator/front_door/shm_registry.h"

namespace epserve::coordinator {

struct FrontDoorOptions {
  ServedModel model;
  RequestLimits limits;
  // With RESOURCE_EXHAUSTED, unless the sink says otherwise: a few batches' time.
  std::int64_t retry_pushback_ms = 50;
};

// What every call needs; outlives them all.
struct InferContext {
  const FrontDoorOptions& options;
  const ShmRegistry& regions;
  RequestSink& sink;
  std::atomic<std::uint64_t> next_id{1};
};

// The reactor answers by itself and deletes itself. Does not block.
grpc::ServerUnaryReactor* StartInferCall(grpc::CallbackServerContext* context,
                                         const grpc::ByteBuffer* request,
                                         grpc::ByteBuffer* response, InferContext& shared);

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_INFER_CALL_H_
