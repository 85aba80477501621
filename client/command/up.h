// `epserve up`: a coordinator and its workers on this machine, as child processes.
#ifndef EPSERVE_CLIENT_COMMAND_UP_H_
#define EPSERVE_CLIENT_COMMAND_UP_H_

#include <string>

#include "absl/status/status.h"
#include "client/command/options.h"

namespace epserve::client {

// Returns OK after SIGINT or SIGTERM has stopped everything, and an error if a child failed before
// the service was ready for the first time. REQUIRES: no other thread runs in this process.
absl::Status RunUp(const UpOptions& options);

// Where a client on this machine reaches a server that listens on `listen` and has bound `port`:
// a wildcard host becomes the loopback address, port 0 the bound one. "unix:PATH" stays.
std::string ReachableAddress(const std::string& listen, int port);
// `listen` with its port replaced, so that a restarted server takes the same one again.
std::string WithPort(const std::string& listen, int port);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_COMMAND_UP_H_
