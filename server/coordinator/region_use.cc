#include "server/coordinator/region_use.h"

#include <utility>

namespace epserve::coordinator {

void RegionUse::OpenEpoch() {
  reachable_.clear();
  named_.clear();
}

void RegionUse::Named(const std::shared_ptr<const ShmRegion>& region) {
  named_.emplace(region->info().id, region);
}

std::vector<std::uint64_t> RegionUse::TakeForgotten() {
  std::vector<std::uint64_t> forgotten;
  for (auto it = named_.begin(); it != named_.end();) {
    if (!it->second.expired()) {
      ++it;
      continue;
    }
    forgotten.push_back(it->first);
    it = named_.erase(it);
  }
  return forgotten;
}

void RegionUse::HoldFor(std::set<StreamId> streams, Regions regions) {
  if (streams.empty() || regions.empty()) return;
  held_.push_back({std::move(streams), std::move(regions)});
}

void RegionUse::Leave(StreamId stream) {
  std::erase_if(held_, [stream](Held& held) {
    held.streams.erase(stream);
    return held.streams.empty();
  });
}

}  // namespace epserve::coordinator
