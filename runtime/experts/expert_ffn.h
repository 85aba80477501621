// The experts' feed-forward on the CPU: down(silu(gate(x)) * up(x)), SwiGLU, weighted and summed
// over the local experts of each received row. fp32 accumulation; the result of a row depends on
// neither the other rows' values nor on timing, so a NaN in one row stays in it.
#ifndef EPSERVE_RUNTIME_EXPERTS_EXPERT_FFN_H_
#define EPSERVE_RUNTIME_EXPERTS_EXPERT_FFN_H_

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "runtime/alltoallv/exchange.h"

namespace epserve::runtime {

// One layer's local experts, held in fp32, row-major.
struct LayerWeights {
  std::int64_t num_local_experts = 0;
  std::int64_t hidden = 0;         // H
  std::int64_t intermediate = 0;   // I
  const float* gate_up = nullptr;  // [E_local, 2 * I, H]: gate rows, then up rows
  const float* down = nullptr;     // [E_local, H, I]
};

// Scratch for one slot; sized at start, nothing is allocated in Run. Used by one thread at a time.
class ExpertFfn {
 public:
  struct Config {
    std::int64_t hidden = 0;
    std::int64_t intermediate = 0;
    std::int64_t max_rows = 0;  // N at most
    std::int64_t max_local_experts = 0;
    int max_topk = 0;
    int threads = 1;
  };
  static std::unique_ptr<ExpertFfn> Create(const Config& config);
  virtual ~ExpertFfn() = default;

  virtual std::uint64_t workspace_bytes() const = 0;
  // Fills received.partial_rows, by way of received.sums where the rows are not fp32; adds to
  // local_expert_rows [E_local] the rows each expert took.
  virtual void Run(const LayerWeights& layer, const ReceivedRows& received,
                   std::span<std::int64_t> local_expert_rows) = 0;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_EXPERTS_EXPERT_FFN_H_
