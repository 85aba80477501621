// Which of two threads polls a queue. The one that polls may leave the queue to act on what it has
// read, and mostly comes back before anybody misses it. Where it stays away for long, the other
// takes over, so that what comes meanwhile (the end of an epoch, a heartbeat's time) is not kept
// waiting: within twice kMostAway.
//
// To hand every message to another thread instead would cost a wake-up a message; this costs two
// atomic operations. The other thread looks every kMostAway while the queue is being left now and
// then, and sleeps without a timeout once it has not been for kIdleLooks looks.
//
// Thread-safe. Invariant: at most one thread has the turn; what it did before Leave() is seen by
// the one that takes over.
#ifndef EPSERVE_SERVER_WORKER_POLL_TURN_H_
#define EPSERVE_SERVER_WORKER_POLL_TURN_H_

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace epserve::worker {

class PollTurn {
 public:
  // Long beside a batch of a few tokens, so that such a batch is not taken over for nothing; short
  // beside a lease.
  static constexpr std::chrono::milliseconds kMostAway{5};
  static constexpr int kIdleLooks = 20;

  explicit PollTurn(int idle_looks = kIdleLooks) : idle_looks_(idle_looks) {}

  // Waits until the caller has the turn. False: polling has ended. The first caller has it at once.
  bool Await();

  // REQUIRES for these: the caller has the turn.
  std::uint64_t Leave();  // the number of this absence
  void End();             // Every Await returns false from now on.

  // From an absence. False: the other thread took over meanwhile.
  bool Return(std::uint64_t absence);

 private:
  const int idle_looks_;
  std::atomic<std::uint64_t> num_absences_{0};  // written by whoever has the turn
  std::atomic<std::uint64_t> away_{0};          // the number of the present absence; 0: none
  std::atomic<bool> asleep_{false};             // the other thread sleeps without a timeout

  std::mutex mutex_;
  std::condition_variable changed_;
  bool begun_ = false;  // guarded by mutex_
  bool ended_ = false;  // guarded by mutex_
};

}  // namespace epserve::worker

#endif  // EPSERVE_SERVER_WORKER_POLL_TURN_H_
