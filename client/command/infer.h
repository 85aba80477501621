// `epserve infer`: one request from a file.
#ifndef EPSERVE_CLIENT_COMMAND_INFER_H_
#define EPSERVE_CLIENT_COMMAND_INFER_H_

#include "absl/status/status.h"
#include "client/command/options.h"

namespace epserve::client {

absl::Status RunInfer(const InferOptions& options);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_COMMAND_INFER_H_
