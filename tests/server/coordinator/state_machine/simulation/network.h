// Control streams: in order within one, arbitrary delays between them, and they break. A broken
// stream loses what is under way, and each end learns of it in its own time.
#ifndef EPSERVE_TESTS_SERVER_COORDINATOR_STATE_MACHINE_SIMULATION_NETWORK_H_
#define EPSERVE_TESTS_SERVER_COORDINATOR_STATE_MACHINE_SIMULATION_NETWORK_H_

#include <algorithm>
#include <functional>
#include <map>
#include <utility>
#include <variant>

#include "server/coordinator/state_machine/commands.h"
#include "server/coordinator/state_machine/events.h"
#include "tests/server/coordinator/state_machine/simulation/world.h"

namespace epserve::coordinator::sim {

struct ShardMessage {
  EpochId epoch = 0;
  BatchId batch = 0;
  int slot = 0;
  TriggerMode trigger = TriggerMode::kTogether;
  std::int64_t num_tokens = 0;
  CountExchange counts = CountExchange::kCoordinator;
};
struct MatrixMessage {
  EpochId epoch = 0;
  BatchId batch = 0;
};
struct DispatchMessage {
  EpochId epoch = 0;
  BatchId batch = 0;
};
struct CombineMessage {
  EpochId epoch = 0;
  BatchId batch = 0;
};
struct StreamLost {};

using ToWorker =
    std::variant<AssignRank, SendStandby, SendCreateHeap, SendOpenPeers, SendEpochStarted,
                 SendEpochEnded, GrantLease, SendShutdown, RejectWorker, ShardMessage,
                 MatrixMessage, DispatchMessage, CombineMessage, StreamLost>;

class Network {
 public:
  explicit Network(World& world) : world_(world) {}

  // Set once by the schedule.
  std::function<void(int coordinator, Event)> to_coordinator;

  StreamId Open(int coordinator, int process) {
    const StreamId stream = world_.next_stream++;
    links_[stream] = Link{coordinator, process, {}};
    return stream;
  }
  void SetReceiver(StreamId stream, std::function<void(ToWorker)> to_worker) {
    links_.at(stream).to_worker = std::move(to_worker);
  }
  int ProcessOf(StreamId stream) const { return links_.at(stream).process; }

  void ToCoordinator(StreamId stream, Event event) {
    Link& link = links_.at(stream);
    link.up_us = std::max(link.up_us, world_.now() + Delay());
    const int coordinator = link.coordinator;
    const bool hello = std::holds_alternative<WorkerHello>(event);
    if (!hello && world_.Fault(0.01)) {  // A copy that comes any time later, out of order.
      world_.At(link.up_us + world_.Between(0, 300 * kMs),
                [this, coordinator, event] { to_coordinator(coordinator, event); });
    }
    world_.At(link.up_us, [this, stream, coordinator, event = std::move(event)] {
      if (world_.now() < links_.at(stream).broken_us) to_coordinator(coordinator, event);
    });
  }

  void ToWorkerEnd(StreamId stream, ToWorker message) {
    Link& link = links_.at(stream);
    link.down_us = std::max(link.down_us, world_.now() + Delay());
    world_.At(link.down_us, [this, stream, message = std::move(message)] {
      const Link& link = links_.at(stream);
      if (world_.now() < link.broken_us) link.to_worker(message);
    });
  }

  // From now on nothing comes through. With a fault the news may take longer than a lease.
  void Break(StreamId stream) {
    Link& link = links_.at(stream);
    if (link.broken_us != kNever) return;
    link.broken_us = world_.now();
    const int coordinator = link.coordinator;
    world_.At(world_.now() + NewsDelay(),
              [this, stream, coordinator] { to_coordinator(coordinator, StreamClosed{stream}); });
    world_.At(world_.now() + NewsDelay(),
              [this, stream] { links_.at(stream).to_worker(StreamLost{}); });
  }
  void BreakAllOf(int coordinator) {
    for (auto& [stream, link] : links_) {
      if (link.coordinator == coordinator) Break(stream);
    }
  }

 private:
  struct Link {
    int coordinator = 0;  // which life of it
    int process = 0;
    std::function<void(ToWorker)> to_worker;
    TimeUs up_us = 0;
    TimeUs down_us = 0;
    TimeUs broken_us = kNever;
  };

  TimeUs Delay() {
    return world_.Fault(0.02) ? world_.Between(0, 60 * kMs) : world_.Between(20, 500);
  }
  TimeUs NewsDelay() {
    return world_.Fault(0.3) ? world_.Between(0, 200 * kMs) : world_.Between(20, 1000);
  }

  World& world_;
  std::map<StreamId, Link> links_;
};

}  // namespace epserve::coordinator::sim

#endif  // EPSERVE_TESTS_SERVER_COORDINATOR_STATE_MACHINE_SIMULATION_NETWORK_H_
