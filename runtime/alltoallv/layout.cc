#include "runtime/alltoallv/layout.h"

#include <initializer_list>

namespace epserve::runtime {
namespace {

// Raised with every change of the table in layout.h or of what its regions hold.
constexpr std::int64_t kLayoutVersion = 2;

// FNV-1a over the value's bytes.
std::uint64_t Fold(std::uint64_t digest, std::int64_t value) {
  for (int byte = 0; byte < 8; ++byte) {
    digest ^= (static_cast<std::uint64_t>(value) >> (8 * byte)) & 0xff;
    digest *= 0x100000001b3u;
  }
  return digest;
}

}  // namespace

std::uint64_t LayoutDigest(const ExchangeConfig& config) {
  std::uint64_t digest = 0xcbf29ce484222325u;
  for (const std::int64_t value :
       {kLayoutVersion, std::int64_t{config.num_ranks}, config.max_batch_tokens, config.hidden,
        std::int64_t{config.max_topk}, std::int64_t{config.num_slots}}) {
    digest = Fold(digest, value);
  }
  for (const std::int64_t first : config.placement.first_expert) digest = Fold(digest, first);
  return digest;
}

}  // namespace epserve::runtime
