// The simulated world: a clock, a seeded source of chance, what is known to have happened, and the
// first broken promise. One schedule is one World; the same seed gives the same schedule.
#ifndef EPSERVE_TESTS_SERVER_COORDINATOR_STATE_MACHINE_SIMULATION_WORLD_H_
#define EPSERVE_TESTS_SERVER_COORDINATOR_STATE_MACHINE_SIMULATION_WORLD_H_

#include <cstdint>
#include <functional>
#include <iostream>
#include <map>
#include <queue>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/coordinator/state_machine/config.h"

namespace epserve::coordinator::sim {

inline constexpr TimeUs kMs = 1000;
inline constexpr TimeUs kPeerTimeoutUs = 200 * kMs;
// Plays the part of a second: epoch numbers begin at the number of these since time began.
inline constexpr TimeUs kEpochPaceUs = 20 * kMs;

class World {
 public:
  World(std::uint64_t seed, bool trace) : random_(seed), trace_(trace) {}

  TimeUs now() const { return now_us_; }
  void At(TimeUs time_us, std::function<void()> action) {
    agenda_.push({std::max(time_us, now_us_), next_order_++, std::move(action)});
  }
  // Runs what is due until `end_us`, or until something failed.
  void RunUntil(TimeUs end_us) {
    while (!failed() && !agenda_.empty() && agenda_.top().time_us <= end_us) {
      auto action = std::move(const_cast<Entry&>(agenda_.top()).action);
      now_us_ = agenda_.top().time_us;
      agenda_.pop();
      action();
    }
    now_us_ = std::max(now_us_, end_us);
  }

  bool Chance(double probability) {
    return static_cast<double>(random_() >> 11) * 0x1p-53 < probability;
  }
  // A fault: only while faults are on.
  bool Fault(double probability) { return faults && Chance(probability); }
  std::int64_t Between(std::int64_t low, std::int64_t high) {  // both included
    return low + static_cast<std::int64_t>(random_() % static_cast<std::uint64_t>(high - low + 1));
  }

  void Fail(const std::string& message) {
    Trace(absl::StrCat("FAILED: ", message));
    if (failure_.empty()) failure_ = absl::StrCat("at ", now_us_, " us: ", message);
  }
  bool failed() const { return !failure_.empty(); }
  const std::string& failure() const { return failure_; }
  bool tracing() const { return trace_; }
  void Trace(const std::string& line) const {
    if (trace_) std::cerr << now_us_ << " " << line << "\n";
  }

  bool faults = true;
  bool on_cpus = false;  // what the workers compute on

  // ---- the truth, over all lives of the coordinator

  EpochId newest_epoch = 0;                        // ever commanded
  std::map<EpochId, std::vector<int>> members;     // epoch to process by rank
  std::map<int, EpochId> newest_epoch_of_process;  // by CreateHeap commands
  std::map<int, bool> offers_device_counts;        // by process
  std::map<CountExchange, std::int64_t> batches_finished;
  std::map<std::pair<EpochId, BatchId>, std::set<int>> done_ok;  // ranks whose rows are truly there

  struct Request {
    bool ended = false;
    bool ok = false;
  };
  std::map<RequestId, Request> requests;
  RequestId next_request = 1;
  int next_process = 1;
  StreamId next_stream = 1;

  void EndRequest(RequestId id, bool ok) {
    auto it = requests.find(id);
    if (it == requests.end()) return Fail(absl::StrCat("an unknown request ", id, " ended"));
    if (it->second.ended) return Fail(absl::StrCat("request ", id, " ended twice"));
    it->second = {true, ok};
  }

  // A process writes into a peer's heap of `epoch`. Whoever is in a newer epoch already must not be
  // touched by the mappings of an old one.
  void Touch(EpochId epoch, int by_process) {
    for (const int process : members[epoch]) {
      if (newest_epoch_of_process[process] > epoch) {
        Fail(absl::StrCat("process ", by_process, " touched process ", process, " in epoch ", epoch,
                          ", which is in epoch ", newest_epoch_of_process[process], " already"));
      }
    }
  }

 private:
  struct Entry {
    TimeUs time_us;
    std::uint64_t order;
    std::function<void()> action;
    bool operator<(const Entry& other) const {
      return std::pair(time_us, order) > std::pair(other.time_us, other.order);
    }
  };

  std::mt19937_64 random_;
  const bool trace_;
  TimeUs now_us_ = 10'000 * kMs;
  std::uint64_t next_order_ = 0;
  std::priority_queue<Entry> agenda_;
  std::string failure_;
};

}  // namespace epserve::coordinator::sim

#endif  // EPSERVE_TESTS_SERVER_COORDINATOR_STATE_MACHINE_SIMULATION_WORLD_H_
