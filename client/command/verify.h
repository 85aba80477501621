// `epserve verify`: batches through the running service, held against the reference model.
#ifndef EPSERVE_CLIENT_COMMAND_VERIFY_H_
#define EPSERVE_CLIENT_COMMAND_VERIFY_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "client/command/options.h"
#include "nlohmann/json_fwd.hpp"

namespace epserve::client {

struct VerifyRow {
  std::string dtype;
  std::int64_t batches = 0;
  std::int64_t tokens = 0;
  std::int64_t routed_tokens = 0;   // Those whose experts the service chose.
  std::int64_t skipped_tokens = 0;  // Of them, too close a choice to compare.
  double largest_error = 0;         // relative L2 of a batch
  std::string worst_batch;
  double limit = 0;
  bool ok() const { return largest_error <= limit; }
};

// The largest relative L2 error that is right: 1e-5 for fp32, 1e-2 for bf16 and fp16, and for all
// where the service computes on GPUs, in bf16.
double ErrorLimit(const std::string& dtype, bool on_gpus);

nlohmann::ordered_json VerifyJson(const std::vector<VerifyRow>& rows);

// An error where the service fails, or where an error is over its limit.
absl::Status RunVerify(const VerifyOptions& options);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_COMMAND_VERIFY_H_
