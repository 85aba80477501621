// A request that has passed every check: what lies behind the front door needs to check none of it
// again. Move-only, because `hidden` may point into `hidden_copy`.
//
// Invariants: num_tokens in [0, max_batch_tokens]; hidden or source holds T * H elements of dtype;
// where routed, topk_ids and topk_weights hold T * K entries each, every id in [-1, E), every
// weight finite, unless they have a source, which only the workers can read and validate; where not
// routed all are empty and the model has a router. Ids and weights are private copies: nobody else
// can change them after they were checked.
#ifndef EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_VALIDATED_REQUEST_H_
#define EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_VALIDATED_REQUEST_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "runtime/base/dtype.h"
#include "server/coordinator/front_door/request_view.h"

namespace epserve::coordinator {

class ShmRegion;

// Where a tensor lies, or goes, if the caller gave it a place; region is null for an inline one.
// The window was inside the region, and the region's object long enough, when it was checked.
struct RegionWindow {
  std::shared_ptr<const ShmRegion> region;
  std::uint64_t offset_bytes = 0;
};

struct ValidatedRequest {
  std::int64_t layer = 0;                              // model layer number
  runtime::DataType dtype = runtime::DataType::kFp32;  // kFp32, kFp16 or kBf16
  std::int64_t num_tokens = 0;                         // T
  int topk = 0;                                        // K
  bool routed = false;                                 // the caller gave ids and weights
  std::span<const char> hidden;         // [T, H] dtype, little-endian; empty where `source` is set
  RawView hidden_pieces;                // the same, in place of it, if in pieces
  RegionWindow source;                  // of the hidden states, to be read when the batch starts
  std::unique_ptr<char[]> hidden_copy;  // owns hidden if it had to be copied out of a region
  std::vector<std::int32_t> topk_ids;   // [T, K], -1: no expert
  std::vector<float> topk_weights;      // [T, K]
  RegionWindow ids_source;              // in place of topk_ids, in CUDA memory
  RegionWindow weights_source;          // in place of topk_weights, in CUDA memory
  bool wide_ids = false;                // at ids_source: int64
  std::uint64_t output_bytes = 0;       // T * H * size of dtype
  RegionWindow output;
  std::int64_t timeout_us = 0;  // the request's own limit on its time, 0: none
  bool trace = false;           // tell each worker's times with the reply
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_VALIDATED_REQUEST_H_
