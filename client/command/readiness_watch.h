// Asks a service, again and again from a thread of its own, whether it is ready and what it is
// doing, so that the thread that supervises processes never waits for a call.
//
// Thread safety: Latest may be called from any thread. Destruction waits for the call under way,
// at most kCallTimeout.
#ifndef EPSERVE_CLIENT_COMMAND_READINESS_WATCH_H_
#define EPSERVE_CLIENT_COMMAND_READINESS_WATCH_H_

#include <optional>
#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "client/cpp/admin_client.h"
#include "client/cpp/client.h"

namespace epserve::client {

struct ReadinessSnapshot {
  bool ready = false;
  std::optional<ClusterState> cluster;  // Absent while the coordinator does not answer.
};

class ReadinessWatch {
 public:
  explicit ReadinessWatch(const std::string& target, const ChannelSecurity& security = {});
  ~ReadinessWatch();
  ReadinessWatch(const ReadinessWatch&) = delete;
  ReadinessWatch& operator=(const ReadinessWatch&) = delete;

  ReadinessSnapshot Latest() const;

 private:
  static constexpr absl::Duration kCallTimeout = absl::Milliseconds(500);
  void Run();

  InferenceClient client_;
  AdminClient admin_;
  mutable absl::Mutex mutex_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  ReadinessSnapshot latest_ ABSL_GUARDED_BY(mutex_);
  std::thread thread_;
};

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_COMMAND_READINESS_WATCH_H_
