// What the device kernels take, checked the same way by every DeviceExchange before it enqueues or
// allocates anything. Pure functions.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_DEVICE_LIMITS_H_
#define EPSERVE_RUNTIME_ALLTOALLV_DEVICE_LIMITS_H_

#include <cstdint>

#include "absl/status/status.h"
#include "runtime/alltoallv/device_exchange.h"
#include "runtime/alltoallv/exchange.h"
#include "runtime/base/digest.h"

namespace epserve::runtime {

// INVALID_ARGUMENT names what the kernels do not take. `name` opens the message: "cuda exchange".
absl::Status CheckDeviceConfig(const char* name, const ExchangeConfig& config);

// Of what every rank must set alike, to be gone on with by what the backend adds.
Digest DigestOfDeviceConfig(const ExchangeConfig& config);

// Kernels move rows in pieces of 16 bytes. INVALID_ARGUMENT where rows of `hidden` elements are not
// a positive number of them. `operation` opens the message.
absl::Status CheckRowBytes(const char* operation, std::int64_t hidden, DataType dtype);

struct DeviceTokenLimits {
  std::int64_t max_tokens = 0;  // of this rank
  int max_topk = 0;
  int max_element_bytes = 0;
};

// INVALID_ARGUMENT names what is outside the limits.
absl::Status CheckDeviceTokens(const CudaTokens& tokens, const DeviceTokenLimits& limits);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_DEVICE_LIMITS_H_
