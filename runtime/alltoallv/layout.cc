#include "runtime/alltoallv/layout.h"

#include <initializer_list>

#include "runtime/base/digest.h"

namespace epserve::runtime {
namespace {

// Raised with every change of the table in layout.h or of what its regions hold.
constexpr std::int64_t kLayoutVersion = 2;

}  // namespace

std::uint64_t LayoutDigest(const ExchangeConfig& config) {
  Digest digest;
  for (const std::int64_t value :
       {kLayoutVersion, std::int64_t{config.num_ranks}, config.max_batch_tokens, config.hidden,
        std::int64_t{config.max_topk}, std::int64_t{config.num_slots}}) {
    digest.Add(value);
  }
  for (const std::int64_t first : config.placement.first_expert) digest.Add(first);
  return digest.value();
}

}  // namespace epserve::runtime
