// InferRequest and InferResult to and from the protocol's messages. Internal to client/cpp.
#ifndef EPSERVE_CLIENT_CPP_INFER_MESSAGE_H_
#define EPSERVE_CLIENT_CPP_INFER_MESSAGE_H_

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/cpp/client.h"
#include "client/cpp/expected_output.h"
#include "client/cpp/infer_wire.h"

namespace epserve::client {

// INVALID_ARGUMENT: a tensor does not fill its shape, or what belongs together is not all there.
absl::StatusOr<RequestParts> ToMessage(const InferRequest& request);

ExpectedOutput ExpectedOf(const InferRequest& request);

// From ModelInfer's reply; `spare` as of Parse. INTERNAL: the answer is not what was asked for.
absl::StatusOr<InferResult> ResultOf(const ExpectedOutput& expected, grpc::ByteBuffer&& reply,
                                     TensorBytes spare);

// As above, from a message of ModelStreamInfer; or the error that it carries in place of an answer,
// UNKNOWN where the server does not say which code it is (parameter epserve_error_code), with the
// server's pushback (see RetryPushback).
absl::StatusOr<InferResult> StreamedResultOf(const ExpectedOutput& expected,
                                             grpc::ByteBuffer&& reply, TensorBytes spare);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_CPP_INFER_MESSAGE_H_
