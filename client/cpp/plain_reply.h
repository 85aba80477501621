// The usual answer, read in one pass over its bytes: what was asked for, with its parameters.
// Protobuf, which would build it from some thirty small allocations, reads whatever is not plain.
// Internal to client/cpp. Pure functions.
#ifndef EPSERVE_CLIENT_CPP_PLAIN_REPLY_H_
#define EPSERVE_CLIENT_CPP_PLAIN_REPLY_H_

#include <grpcpp/support/byte_buffer.h>

#include <optional>

#include "client/cpp/client.h"
#include "client/cpp/expected_output.h"
#include "client/cpp/tensor_bytes.h"

namespace epserve::client {

enum class ReplyForm {
  kUnary,     // a ModelInferResponse
  kStreamed,  // a ModelStreamInferResponse
};

// nullopt, and nothing changed, where the reply is large, an error, not what was expected, or has
// anything that Protobuf is to look at: fields that come twice or are not known, parameters that
// are no integers, text that is not ASCII. Else just what Protobuf would read. The output is copied
// to the memory of `spare` if that will do.
std::optional<InferResult> PlainResultOf(const ExpectedOutput& expected,
                                         const grpc::ByteBuffer& reply, ReplyForm form,
                                         TensorBytes& spare);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_CPP_PLAIN_REPLY_H_
