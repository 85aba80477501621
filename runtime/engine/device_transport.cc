#include "runtime/engine/device_transport.h"

#include <algorithm>
#include <utility>

#include "runtime/alltoallv/cuda_exchange.h"
#include "runtime/base/status.h"
#include "runtime/symmetric/cuda_heap.h"
#ifdef EPSERVE_WITH_NCCL
#include "runtime/alltoallv/nccl_exchange.h"
#endif

namespace epserve::runtime {
namespace {

// A peer's socket answers at once, unless the peer is gone: the epoch is formed anew then.
constexpr absl::Duration kHeapOpenTimeout = absl::Seconds(2);
// Two communicators of two ranks take 0.6 s, or 3 s where the library is used for the first time.
constexpr absl::Duration kNcclOpenTimeout = absl::Seconds(20);

// Blocks that wait for peers: over all slots at most half of the multiprocessors, so that what the
// peers wait for always finds a place to run.
int MostWaitingBlocks(const DeviceTransport& transport, int num_slots) {
  return std::max(1, transport.num_multiprocessors / 2 / num_slots);
}

CudaExchangeConfig CudaConfigOf(const DeviceTransport& transport, const ExchangeConfig& base) {
  CudaExchangeConfig config;
  config.base = base;
  config.socket_directory = transport.options.handle_dir;
  config.handle_type = transport.options.handle_type == HandleChoice::kFabric ? HandleType::kFabric
                                                                              : HandleType::kFd;
  config.settings_digest = static_cast<std::uint64_t>(transport.payload);
  config.max_decode_tokens = 1;  // The engine takes the prefill path alone.
  config.line_tokens = 0;
  config.comm_blocks = transport.options.comm_blocks;
  config.max_reduce_blocks = MostWaitingBlocks(transport, base.num_slots);
  return config;
}

#ifdef EPSERVE_WITH_NCCL
NcclExchangeConfig NcclConfigOf(const DeviceTransport& transport, const ExchangeConfig& base) {
  NcclExchangeConfig config;
  config.base = base;
  config.settings_digest = static_cast<std::uint64_t>(transport.payload);
  config.comm_blocks =
      std::min(transport.options.comm_blocks, MostWaitingBlocks(transport, base.num_slots));
  return config;
}
#endif

}  // namespace

absl::Status DeviceTransport::Prepare() const {
  if (!options.use_nccl) {
    return options.handle_type == HandleChoice::kFabric ? ProbeFabricHandles() : absl::OkStatus();
  }
#ifdef EPSERVE_WITH_NCCL
  return LoadNcclApi().status();
#else
  return absl::FailedPreconditionError(
      "create engine: the nccl backend is not in this build; build where nccl.h is");
#endif
}

absl::StatusOr<std::shared_ptr<DeviceExchange>> DeviceTransport::Create(
    const ExchangeConfig& config) const {
#ifdef EPSERVE_WITH_NCCL
  if (options.use_nccl) return NcclExchange::Create(NcclConfigOf(*this, config));
#endif
  return CudaExchange::Create(CudaConfigOf(*this, config));
}

std::uint64_t DeviceTransport::DeviceBytes(const ExchangeConfig& config) const {
#ifdef EPSERVE_WITH_NCCL
  if (options.use_nccl) {
    return static_cast<std::uint64_t>(NcclExchange::DeviceBytes(NcclConfigOf(*this, config)));
  }
#endif
  return static_cast<std::uint64_t>(CudaExchange::DeviceBytes(CudaConfigOf(*this, config)));
}

absl::Duration DeviceTransport::open_timeout() const {
  return options.use_nccl ? kNcclOpenTimeout : kHeapOpenTimeout;
}

}  // namespace epserve::runtime
