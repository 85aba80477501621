// What the front door knows of the one served model: enough to describe it to clients and to refuse
// a request that does not fit it. Filled once at start; constant afterwards.
#ifndef EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_SERVED_MODEL_H_
#define EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_SERVED_MODEL_H_

#include <cstdint>
#include <string>
#include <vector>

namespace epserve::coordinator {

// REQUIRES: hidden, topk, num_experts and max_batch_tokens in [1, 2^31); layers ascending, not
// empty.
struct ServedModel {
  std::string name;
  std::string version = "1";         // the only one; a request may also leave it empty
  std::int64_t hidden = 0;           // H
  std::int64_t intermediate = 0;     // I, of one routed expert
  std::int64_t num_experts = 0;      // E
  int topk = 0;                      // K
  std::vector<std::int64_t> layers;  // model layer numbers that have experts, ascending
  bool has_router = false;           // ids and weights may be left out
  std::int64_t max_batch_tokens = 0;
  std::uint64_t max_message_bytes = 256 << 20;  // a reply's, too
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_SERVED_MODEL_H_
