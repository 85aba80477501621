// Moves a load's tensors into shared memory that is registered with the service.
#ifndef EPSERVE_CLIENT_COMMAND_BENCH_REGION_H_
#define EPSERVE_CLIENT_COMMAND_BENCH_REGION_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "client/cpp/client.h"
#include "client/cpp/cuda_region.h"
#include "client/cpp/shared_region.h"

namespace epserve::client {

// Each request's tensors get places of their own in one region, and its output another. A request
// may be under way more than once at a time: its output is the same each time. REQUIRES: requests
// with at least one token, whose tensors are inline; `client` outlives the region.
absl::StatusOr<std::unique_ptr<SharedRegion>> MoveToRegion(InferenceClient* client,
                                                           const std::string& key_prefix,
                                                           std::vector<InferRequest>* requests);

// Each request's tensors and its output get a region of their own in memory of that GPU. REQUIRES:
// as above.
absl::StatusOr<std::vector<std::unique_ptr<CudaRegion>>> MoveToCudaRegions(
    InferenceClient* client, int device, std::vector<InferRequest>* requests);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_COMMAND_BENCH_REGION_H_
