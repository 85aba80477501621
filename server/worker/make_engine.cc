#include "server/worker/make_engine.h"

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#ifdef EPSERVE_WITH_CUDA
#include "runtime/engine/cuda_engine.h"
#endif

namespace epserve::worker {
namespace {

runtime::HandleChoice HandleChoiceOf(const Options& options) {
  if (options.handle_type == "fd") return runtime::HandleChoice::kFd;
  if (options.handle_type == "fabric") return runtime::HandleChoice::kFabric;
  return runtime::HandleChoice::kAuto;
}

runtime::EngineOptions EngineOptionsOf(const Options& options) {
  runtime::EngineOptions engine;
  engine.checkpoint_dir = options.checkpoint_dir;
  engine.cluster_id = options.cluster_id;
  engine.max_batch_tokens = options.max_batch_tokens;
  engine.num_slots = options.num_slots;
  engine.compute_threads = options.compute_threads;
  engine.peer_timeout = absl::Milliseconds(options.peer_timeout_ms);
  engine.busy_poll = absl::Microseconds(options.busy_poll_us);
  engine.cuda.comm_blocks = options.comm_blocks;
  engine.cuda.fp8_dispatch = options.dispatch_dtype == "fp8";
  engine.cuda.handle_dir = options.handle_dir;
  engine.cuda.handle_type = HandleChoiceOf(options);
  return engine;
}

}  // namespace

absl::StatusOr<std::unique_ptr<runtime::Engine>> MakeEngine(const Options& options) {
  runtime::EngineOptions engine = EngineOptionsOf(options);
#ifdef EPSERVE_WITH_CUDA
  if (options.backend == "host") return runtime::CreateHostEngine(engine);
  const int num_devices = runtime::NumCudaDevices();
  if (options.backend == "auto" && num_devices == 0) return runtime::CreateHostEngine(engine);
  engine.cuda.device = options.device;
  if (options.device < 0)
    engine.cuda.device = num_devices > 0 ? options.local_rank % num_devices : 0;
  engine.cuda.use_nccl = options.backend == "nccl";
  return runtime::CreateCudaEngine(engine);
#else
  if (options.backend == "cuda" || options.backend == "nccl") {
    return absl::FailedPreconditionError(
        absl::StrCat("options: --backend ", options.backend,
                     " is not in this build, which has: host; build where nvcc is"));
  }
  return runtime::CreateHostEngine(engine);
#endif
}

}  // namespace epserve::worker
