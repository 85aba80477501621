// The state in which a daemon may be started that would have it harmed by its own output: without
// one of the descriptors 0 to 2, or with a pipe whose reader goes away.
#ifndef EPSERVE_SERVER_COMMON_STANDARD_STREAMS_H_
#define EPSERVE_SERVER_COMMON_STANDARD_STREAMS_H_

#include "absl/status/status.h"

namespace epserve::server {

// Puts /dev/null where descriptor 0, 1 or 2 is closed, or what the process opens next would get its
// number and every line of the log; and has a write to a pipe that nobody reads fail in place of
// ending the process. A program that calls this has closed descriptors filled before it starts;
// call it first in main, for the rest and to learn whether that was possible.
absl::Status GuardStandardStreams();

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_COMMON_STANDARD_STREAMS_H_
