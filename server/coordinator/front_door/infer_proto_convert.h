// ModelInfer's messages, between their bytes and the structs that the rest of the front door works
// on. Pure functions, safe from any thread.
#ifndef EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_INFER_PROTO_CONVERT_H_
#define EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_INFER_PROTO_CONVERT_H_

#include <grpcpp/support/byte_buffer.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/coordinator/front_door/output_bytes.h"
#include "server/coordinator/front_door/request_sink.h"
#include "server/coordinator/front_door/request_view.h"
#include "server/coordinator/front_door/served_model.h"
#include "server/coordinator/front_door/validated_request.h"

namespace epserve::coordinator {

// A parsed request. `view` and `id` point into the message that `owner` keeps; tensor bytes are not
// copied again.
struct InferRequestMessage {
  std::shared_ptr<const void> owner;
  std::string_view id;
  RequestView view;
};

// INVALID_ARGUMENT for bytes that are no ModelInferRequest, and for a message of more than `limits`
// allow: see CheckRequestBounds.
absl::StatusOr<InferRequestMessage> ParseInferRequest(const grpc::ByteBuffer& bytes,
                                                      const RequestLimits& limits);

struct InferReply {
  std::string_view id;
  const ValidatedRequest* request = nullptr;
  InferTimes times;
  std::int64_t server_us = 0;
  OutputBytes output;  // [T, H]; empty where it went to shared memory
};

// A message on its way out. A ByteBuffer by itself cannot be moved, only copied, and copying one,
// and freeing it, at each hand-over came to a tenth of a small request's instructions.
using ReplyBytes = std::unique_ptr<const grpc::ByteBuffer>;

// How an answer travels: as ModelInferResponse, or within a ModelStreamInferResponse.
enum class InferForm { kUnary, kStream };

// One output with its raw entry, and the epserve_* parameters. INTERNAL: it cannot be written.
absl::StatusOr<ReplyBytes> SerializeInferReply(const ServedModel& model, InferForm form,
                                               InferReply reply);

// A ModelStreamInferResponse with `status`, which is not OK, as its error_message, never empty, and
// the request's id, so that the caller knows which of its requests that was. The pushback, which a
// call of its own has in its trailing metadata, is the parameter epserve_retry_pushback_ms; 0:
// none.
ReplyBytes SerializeStreamError(const ServedModel& model, std::string_view id,
                                const absl::Status& status, std::int64_t retry_pushback_ms);

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_INFER_PROTO_CONVERT_H_
