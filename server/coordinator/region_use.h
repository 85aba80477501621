// Which clients' regions the workers may be using, and which numbers they need no longer keep a
// descriptor for.
//
// A batch holds its regions from its start to its end. Where it is dropped while workers may still
// be at it (their epoch has ended, and they have not all said that they left it), the regions are
// held here until the last of those has left, so that Unregister answers only when nobody reads or
// writes any more. A worker whose lease has run out has left: it writes nothing without one.
//
// Thread safety: none; whoever has the host's turn.
#ifndef EPSERVE_SERVER_COORDINATOR_REGION_USE_H_
#define EPSERVE_SERVER_COORDINATOR_REGION_USE_H_

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <vector>

#include "server/coordinator/front_door/shm_registry.h"
#include "server/coordinator/state_machine/types.h"

namespace epserve::coordinator {

class RegionUse {
 public:
  using Regions = std::vector<std::shared_ptr<const ShmRegion>>;

  // A new epoch: its workers keep no descriptor yet, and none has said that it can get any.
  void OpenEpoch();
  void AddReachable(StreamId stream) { reachable_.insert(stream); }
  bool IsReachable(StreamId stream) const { return reachable_.contains(stream); }

  // A shard names the region: the worker may keep its descriptor from now on.
  void Named(const std::shared_ptr<const ShmRegion>& region);
  // Numbers named that are no region's any more, each once.
  std::vector<std::uint64_t> TakeForgotten();
  const std::set<StreamId>& reachable() const { return reachable_; }

  // Holds the regions until each of the streams has left.
  void HoldFor(std::set<StreamId> streams, Regions regions);
  // The stream's worker has left its epoch, or is gone.
  void Leave(StreamId stream);

 private:
  struct Held {
    std::set<StreamId> streams;
    Regions regions;
  };

  std::set<StreamId> reachable_;
  std::map<std::uint64_t, std::weak_ptr<const ShmRegion>> named_;
  std::vector<Held> held_;
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_REGION_USE_H_
