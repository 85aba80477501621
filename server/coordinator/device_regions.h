// Clients' CUDA memory at the workers: which worker has which region open, and the opening and
// closing of one after another.
//
//   Open:  hold batches ─► OpenDeviceRegion to all ─► all have answered [─► close again where one
//          refused] ─► answer
//   Close: hold batches ─► CloseDeviceRegions to all that may have it ─► all have answered ─►
//   answer
//
// Where batches do not end in time, or a worker does not answer, the caller is told so, and what
// may still be open goes with the next closing; where workers were not told, that follows by
// itself. Nobody is told of that one, so that it waits for the batches in flight as long as they
// may take, and what is asked for meanwhile waits behind it: were it given up like the others,
// batches that outlive a hold could start after each.
//
// Unmapping waits for the device and holds up the worker's other calls into it: beside a kernel of
// one second, a launch on another stream took as long. And kernels there may wait for peers that
// are held up likewise: so no batch is in flight meanwhile. Mapping was not seen to wait; it may
// have to enable access between two GPUs.
//
// A worker gets the regions of an epoch with CreateHeap, and loses them with the epoch. One that
// refuses a region then leaves it registered, and of no use until an epoch where all have it.
//
// Pure: no clock, thread, lock or socket. Thread safety: none; whoever has the host's turn.
// Invariants: every Open and Close is answered once; a region that was not opened by every worker
// is open at none once Open has answered.
#ifndef EPSERVE_SERVER_COORDINATOR_DEVICE_REGIONS_H_
#define EPSERVE_SERVER_COORDINATOR_DEVICE_REGIONS_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "server/coordinator/front_door/device_region_host.h"
#include "server/coordinator/front_door/validated_request.h"
#include "server/coordinator/state_machine/types.h"
#include "server/coordinator/worker_stream.h"

namespace epserve::coordinator {

// What DeviceRegions has done by its host. Called from within its methods; must not call back.
class DeviceRegionActions {
 public:
  virtual ~DeviceRegionActions() = default;
  virtual void SendTo(StreamId stream, StreamMessage message) = 0;
  // true is answered by OnBatchesHeld or OnHoldExpired; false undoes it.
  virtual void HoldBatches(bool hold) = 0;
  // The same as true, but does not expire before the batches in flight have had all their time.
  virtual void HoldBatchesToTheirEnd() = 0;
  // "rank 1 (worker w1)"
  virtual std::string NameOf(StreamId stream) const = 0;
};

class DeviceRegions {
 public:
  using Done = DeviceRegionHost::Done;

  // `actions` outlives this.
  explicit DeviceRegions(DeviceRegionActions* actions) : actions_(actions) {}

  void Open(std::shared_ptr<const ShmRegion> region, Done done);
  // Also answers for what was asked for before: whoever was told that a closing took too long may
  // ask again, without the regions, which have no name any more.
  void Close(std::vector<std::uint64_t> regions, Done done);

  // What a member of `epoch` opens with its heap. A new epoch has no members yet.
  std::vector<DeviceRegionInfo> JoinEpoch(EpochId epoch, StreamId stream);
  // What of it is not open there.
  void OnRefused(EpochId epoch, StreamId stream, const std::vector<DeviceRegionState>& refused);
  void SetServing(bool serving);
  // The worker has left its epoch, or is gone: nothing is open there.
  void Leave(StreamId stream);

  void OnBatchesHeld();
  void OnHoldExpired();
  void OnAnswer(const DeviceRegionAnswer& answer);
  // Answers all that is left with `status`.
  void Stop(const absl::Status& status);

  // FAILED_PRECONDITION: a worker of the epoch has not got one of the request's regions open.
  absl::Status CheckUsable(const ValidatedRequest& request) const;

 private:
  enum class Phase { kHolding, kOpening, kClosing };
  struct Operation {
    std::shared_ptr<const ShmRegion> region;  // to open; null: to close
    std::vector<std::uint64_t> ids;           // to close, or its own
    Done done;
    bool follows = false;  // a closing that nobody has asked for
    Phase phase = Phase::kHolding;
    std::set<StreamId> awaited;
    std::map<std::string, absl::Status> refusals;  // by the worker's name
    absl::Status outcome;
  };

  static DeviceRegionInfo InfoOf(const ShmRegion& region);
  absl::Status CheckServing() const;
  bool IsClosingAsked() const;  // current, or waiting
  bool HasAnyOpen(StreamId stream, const std::vector<std::uint64_t>& ids) const;
  void Begin(Operation operation);
  void HoldForCurrent();
  void BeginOpening();
  void BeginClosing();
  void Advance();  // once nobody is awaited any more
  void EndOpening();
  void Finish();
  void End(Operation ended, const absl::Status& outcome);

  DeviceRegionActions* const actions_;
  std::map<std::uint64_t, std::weak_ptr<const ShmRegion>> regions_;  // opened and not closed
  EpochId epoch_ = 0;
  bool serving_ = false;
  // Members of the epoch, and what each may have open.
  std::map<StreamId, std::set<std::uint64_t>> members_;
  std::map<std::uint64_t, absl::Status> unusable_;  // in this epoch
  // Of operations that were given up: for the next closing, whoever asks for it.
  std::set<std::uint64_t> unclosed_;
  std::deque<Operation> waiting_;
  std::optional<Operation> current_;
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_DEVICE_REGIONS_H_
