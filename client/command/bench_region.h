// Moves a load's tensors into shared memory that is registered with the service.
#ifndef EPSERVE_CLIENT_COMMAND_BENCH_REGION_H_
#define EPSERVE_CLIENT_COMMAND_BENCH_REGION_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "client/command/interruption.h"
#include "client/cpp/client.h"
#include "client/cpp/cuda_region.h"
#include "client/cpp/shared_region.h"

namespace epserve::client {

// The regions of one load. The service forgets them with this, and also where a signal ends the
// process before. Thread safety: none.
class BenchRegions {
 public:
  // `interruption` outlives this.
  explicit BenchRegions(Interruption* interruption);
  ~BenchRegions();
  BenchRegions(const BenchRegions&) = delete;
  BenchRegions& operator=(const BenchRegions&) = delete;

  // Each request's tensors get places of their own in one region, and its output another. A request
  // may be under way more than once at a time: its output is the same each time. REQUIRES: requests
  // with at least one token, whose tensors are inline; `client` outlives this.
  absl::Status MoveToSystem(InferenceClient* client, const std::string& key_prefix,
                            std::vector<InferRequest>* requests);

  // Each request's tensors and its output get a region of their own in memory of that GPU.
  // REQUIRES: as above.
  absl::Status MoveToCuda(InferenceClient* client, int device, std::vector<InferRequest>* requests);

 private:
  class Change;
  void OnInterruption();

  Interruption* const interruption_;
  absl::Mutex mutex_;
  // While it is true the regions are the caller's alone, else whoever's has the mutex.
  bool changing_ ABSL_GUARDED_BY(mutex_) = false;
  std::unique_ptr<SharedRegion> system_;
  std::vector<std::unique_ptr<CudaRegion>> cuda_;
};

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_COMMAND_BENCH_REGION_H_
