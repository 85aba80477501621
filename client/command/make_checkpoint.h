// `epserve make-checkpoint`.
#ifndef EPSERVE_CLIENT_COMMAND_MAKE_CHECKPOINT_H_
#define EPSERVE_CLIENT_COMMAND_MAKE_CHECKPOINT_H_

#include "absl/status/status.h"
#include "client/command/options.h"

namespace epserve::client {

absl::Status RunMakeCheckpoint(const MakeCheckpointOptions& options);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_COMMAND_MAKE_CHECKPOINT_H_
