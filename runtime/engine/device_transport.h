// What carries rows between the GPUs of the device engine: which exchange, with what settings, and
// what it needs. Internal to this folder.
#ifndef EPSERVE_RUNTIME_ENGINE_DEVICE_TRANSPORT_H_
#define EPSERVE_RUNTIME_ENGINE_DEVICE_TRANSPORT_H_

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "runtime/alltoallv/device_exchange.h"
#include "runtime/alltoallv/exchange.h"
#include "runtime/engine/engine.h"

namespace epserve::runtime {

struct DeviceTransport {
  CudaOptions options;
  RowPayload payload = RowPayload::kCopy;
  int num_multiprocessors = 0;

  // Prepares the process for it; call from the only thread. FAILED_PRECONDITION: it is not in this
  // build, or not on this machine.
  absl::Status Prepare() const;
  // "cuda" or "nccl".
  const char* backend() const { return options.use_nccl ? "nccl" : "cuda"; }
  // On the current device. Errors as the exchanges' Create.
  absl::StatusOr<std::shared_ptr<DeviceExchange>> Create(const ExchangeConfig& config) const;
  // What it takes from the device for an epoch.
  std::uint64_t DeviceBytes(const ExchangeConfig& config) const;
  // The longest that peers may take to be opened.
  absl::Duration open_timeout() const;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ENGINE_DEVICE_TRANSPORT_H_
