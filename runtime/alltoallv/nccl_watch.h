// Bounds NCCL's waits, which know no deadline of their own. The device counts, in words of host
// memory, the transfers that it begins and ends; a thread looks at them, and at NCCL's errors, and
// gives the communicators up where a transfer takes too long. It is the only thread that aborts
// them, so Abort() returns at once, wherever it is called.
// Thread-safe.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_NCCL_WATCH_H_
#define EPSERVE_RUNTIME_ALLTOALLV_NCCL_WATCH_H_

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace epserve::runtime {

struct NcclWatchConfig {
  int rank = 0;
  absl::Duration timeout;  // longest that one transfer may take
  // Odd while a transfer is under way; it counts up before and after each.
  std::span<const volatile std::uint64_t> words;
  std::vector<std::string> stages;  // of each word, for messages: "dispatch", "combine"
  std::function<absl::Status()> check_errors;
  std::function<void()> abort;  // ends every transfer; called once at most
};

class NcclWatch {
 public:
  explicit NcclWatch(NcclWatchConfig config);
  ~NcclWatch();  // ends the thread; calls nothing any more
  NcclWatch(const NcclWatch&) = delete;
  NcclWatch& operator=(const NcclWatch&) = delete;

  // Not OK once the transfers have been given up: DEADLINE_EXCEEDED after a timeout, ABORTED after
  // Abort(), or the error that was found.
  absl::Status status() const;
  // Gives the transfers up as soon as the thread gets to it.
  void Abort();

 private:
  // Where a word was when it last moved.
  struct Seen {
    std::uint64_t count = 0;
    std::chrono::steady_clock::time_point since;
  };

  void Run();
  // Looks at all words; not OK where one is overdue.
  absl::Status Look(std::vector<Seen>& seen) const;

  const NcclWatchConfig config_;
  mutable std::mutex mutex_;
  std::condition_variable wake_;
  absl::Status status_;
  bool abort_ = false;
  bool stop_ = false;
  std::thread thread_;  // last, so that it starts when all else is there
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_NCCL_WATCH_H_
