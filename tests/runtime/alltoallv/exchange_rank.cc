// epserve_exchange_rank CLUSTER_ID RANK RANKS SEED TIMEOUT_MS COUNTS: one rank of an epoch. COUNTS
// is "computed", from the whole batch, or "exchanged" with the other ranks. Prints its handle in
// hex; reads a line of all handles; prints "open"; reads a line "go"; runs its shard of the batch
// that SEED gives, and prints the output in hex, or "error" and a message. The parent knows the
// same seed, so it knows what must come.
#include <cstdlib>
#include <iostream>
#include <sstream>
#include <string>

#include "tests/runtime/alltoallv/exchange_rank.h"
#include "tests/runtime/symmetric/child_process.h"

namespace epserve::runtime {
namespace {

absl::StatusOr<std::string> RunRank(const ExchangeConfig& config, std::uint32_t seed,
                                    bool exchange_counts) {
  auto exchange = HostExchange::Create(config);
  if (!exchange.ok()) return exchange.status();
  std::cout << ToHex((*exchange)->handle()) << std::endl;
  std::string line;
  std::getline(std::cin, line);
  std::istringstream words(line);
  std::vector<std::string> handles;
  for (std::string word; words >> word;) handles.push_back(FromHex(word));
  absl::Status status = (*exchange)->OpenPeers(handles);
  if (!status.ok()) return status;
  std::cout << "open" << std::endl;
  std::getline(std::cin, line);
  (*exchange)->Seal();

  const Batch batch = ProcessTestBatch(config, seed);
  absl::StatusOr<CountMatrix> counts =
      exchange_counts
          ? (*exchange)->ExchangeCounts(0, 1, CountsOf(batch, config.placement, config.rank))
          : ComputeCountMatrix(batch.topk_ids, batch.num_tokens, batch.topk, config.placement);
  if (!counts.ok()) return counts.status();
  const DispatchArgs args = ShardArgs(batch, *counts, 0, 1, config.num_ranks, config.rank);
  status = (*exchange)->Dispatch(args);
  if (!status.ok()) return status;
  RunStandIn((*exchange)->Received(0), config.hidden, config.placement.first_expert[config.rank]);
  std::string out(args.num_tokens * batch.row_bytes(), '\xa5');
  status = (*exchange)->Combine(0, out.data());
  if (!status.ok()) return status;
  return out;
}

}  // namespace
}  // namespace epserve::runtime

int main(int argc, char** argv) {
  if (argc != 7) return 2;
  epserve::runtime::ExchangeConfig config =
      epserve::runtime::ProcessTestConfig(argv[1], std::atoi(argv[3]), std::atoi(argv[5]));
  config.rank = std::atoi(argv[2]);
  const auto out =
      epserve::runtime::RunRank(config, std::atoi(argv[4]), std::string(argv[6]) == "exchanged");
  if (!out.ok()) {
    std::cout << "error " << out.status() << std::endl;
    return 1;
  }
  std::cout << epserve::runtime::ToHex(*out) << std::endl;
  return 0;
}
