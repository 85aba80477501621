// What the test with real processes and the program it starts agree on.
#ifndef EPSERVE_TESTS_RUNTIME_ALLTOALLV_EXCHANGE_RANK_H_
#define EPSERVE_TESTS_RUNTIME_ALLTOALLV_EXCHANGE_RANK_H_

#include <cstdint>
#include <string>

#include "tests/runtime/alltoallv/exchange_reference.h"

namespace epserve::runtime {

inline ExchangeConfig ProcessTestConfig(const std::string& cluster_id, int num_ranks,
                                        int timeout_ms) {
  ExchangeConfig config = TestConfig(num_ranks, /*num_experts=*/10, /*max_batch_tokens=*/64,
                                     /*hidden=*/96);
  config.cluster_id = cluster_id;
  config.peer_timeout = absl::Milliseconds(timeout_ms);
  return config;
}

inline Batch ProcessTestBatch(const ExchangeConfig& config, std::uint32_t seed) {
  std::mt19937 random(seed);
  return RandomBatch(&random, DataType::kBf16, 61, config.hidden, 6,
                     config.placement.num_experts());
}

}  // namespace epserve::runtime

#endif  // EPSERVE_TESTS_RUNTIME_ALLTOALLV_EXCHANGE_RANK_H_
