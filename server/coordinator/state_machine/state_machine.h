// The coordinator's core: who is a member, which epoch runs, what is queued and what is in flight.
// Events in, commands out; no clock, thread, socket, lock or log.
//
// A host loop: take all waiting events, Apply each, carry out the commands in order, then, if
// now >= NextDeadline(), Apply(Tick{}); sleep until NextDeadline() or the next event.
//
// Thread safety: none; one thread. `now_us` must not decrease; where it does, the latest is taken.
//
// Invariants: a request ends exactly once. Epoch numbers only grow. A slot carries one batch from
// its start until all R BatchDone of it came or its epoch ended. Nothing is kept of what has ended.
#ifndef EPSERVE_SERVER_COORDINATOR_STATE_MACHINE_STATE_MACHINE_H_
#define EPSERVE_SERVER_COORDINATOR_STATE_MACHINE_STATE_MACHINE_H_

#include <memory>
#include <optional>
#include <vector>

#include "runtime/routing/count_matrix.h"
#include "server/coordinator/state_machine/commands.h"
#include "server/coordinator/state_machine/config.h"
#include "server/coordinator/state_machine/events.h"
#include "server/coordinator/state_machine/types.h"

namespace epserve::coordinator {

class StateMachine {
 public:
  // REQUIRES: num_workers in [1, 64], num_experts, topk, max_batch_tokens, num_slots,
  // queue_capacity, lease_us >= 1, layers not empty.
  explicit StateMachine(const Config& config);
  ~StateMachine();
  StateMachine(const StateMachine&) = delete;
  StateMachine& operator=(const StateMachine&) = delete;

  std::vector<Command> Apply(const Event& event, TimeUs now_us);

  // When the next Tick is due; nullopt: nothing waits for time. May lie in the past.
  std::optional<TimeUs> NextDeadline() const;

  // Whether InputTaken would start a batch.
  bool WantsInputTaken() const;

  Snapshot TakeSnapshot() const;
  Load TakeLoad() const;
  const runtime::Placement& placement() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_STATE_MACHINE_STATE_MACHINE_H_
