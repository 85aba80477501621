// Keeps gRPC's buffers, which all connections share, from being filled by a few of them with
// messages that they do not finish: the connection that holds most is ended in time. See
// half_messages.h.
//
// Callers over Unix sockets are not told apart, and are bounded by gRPC alone.
//
// Thread-safe. A thread of its own looks: every second, soon after a call has begun whose message
// does not come at once, and again and again while much is held. A call whose message comes with it
// costs nothing but that the thread is woken 20 times a second at most.
#ifndef EPSERVE_SERVER_RPC_BUFFER_GUARD_H_
#define EPSERVE_SERVER_RPC_BUFFER_GUARD_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "server/rpc/half_messages.h"

namespace epserve::server {

class BufferGuard {
 public:
  // Most that may be held over all connections that this process accepts at `ports`, and who is
  // told when one has been ended, from the guard's thread.
  using OnEnded = std::function<void(const std::string& peer, std::uint64_t num_bytes)>;
  struct Limit {
    std::uint64_t max_bytes = 0;
    OnEnded on_ended;
  };
  BufferGuard(std::vector<int> ports, Limit limit);
  ~BufferGuard();
  BufferGuard(const BufferGuard&) = delete;
  BufferGuard& operator=(const BufferGuard&) = delete;

  // What one call has to tell; made when it begins to wait for its first message.
  class Call {
   public:
    Call(BufferGuard* guard, const std::string& peer);
    ~Call();
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;
    void OnMessage(std::uint64_t num_bytes);

   private:
    BufferGuard* const guard_;
    const std::shared_ptr<HalfMessages::Reader> reader_;
    bool awaits_first_ = true;
  };

 private:
  void AwaitMessage();
  void Run();
  void Look();

  const std::vector<int> ports_;
  const Limit limit_;
  HalfMessages half_messages_;
  std::atomic<int> num_awaiting_{0};  // calls whose first message has not come
  std::atomic<bool> begun_{false};    // one of them began since the last look
  std::mutex mutex_;
  std::condition_variable changed_;
  bool stopping_ = false;  // Guarded by mutex_.
  std::thread thread_;
};

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_RPC_BUFFER_GUARD_H_
