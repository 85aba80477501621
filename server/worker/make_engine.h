// The engine that the flags ask for, among the backends of this build. The one place of the worker
// that knows more of engines than their interface.
#ifndef EPSERVE_SERVER_WORKER_MAKE_ENGINE_H_
#define EPSERVE_SERVER_WORKER_MAKE_ENGINE_H_

#include <memory>

#include "absl/status/statusor.h"
#include "runtime/engine/engine.h"
#include "server/worker/options.h"

namespace epserve::worker {

// Call from the only thread: a GPU's driver is set up by environment variables.
// FAILED_PRECONDITION: the backend is not in this build, or its GPU is not there.
absl::StatusOr<std::unique_ptr<runtime::Engine>> MakeEngine(const Options& options);

}  // namespace epserve::worker

#endif  // EPSERVE_SERVER_WORKER_MAKE_ENGINE_H_
