// What callers have sent of messages that are not whole yet. It lies in gRPC's buffers, whose quota
// all connections share; once that is full, gRPC ends calls in the order in which their connections
// came, and first of all those that have been there for longest, the workers'. So whoever fills it
// is found before.
//
// gRPC does not tell what it holds. It is what has come over a connection's socket, less the
// messages that were read from it; framing and headers are allowed for. What came of messages that
// nobody read, of calls that were refused or cancelled, is counted until the connection has no call
// under way.
//
// Thread-safe.
#ifndef EPSERVE_SERVER_RPC_HALF_MESSAGES_H_
#define EPSERVE_SERVER_RPC_HALF_MESSAGES_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

namespace epserve::server {

class HalfMessages {
 public:
  // One connection's messages, counted by those who read them.
  class Reader {
   public:
    void OnCallBegins() { num_calls_.fetch_add(1, std::memory_order_relaxed); }
    void OnCallEnds() { num_calls_.fetch_sub(1, std::memory_order_relaxed); }
    void OnMessage(std::uint64_t num_bytes);

   private:
    friend class HalfMessages;
    std::atomic<int> num_calls_{0};
    std::atomic<std::uint64_t> read_bytes_{0};  // not taken yet, with what is allowed for
  };

  // The reader of the connection of `peer`, the same for all its calls.
  std::shared_ptr<Reader> ReaderOf(const std::string& peer);

  struct Received {
    std::string peer;
    std::uint64_t num_bytes = 0;  // since the connection began
  };
  struct Holder {
    std::string peer;
    std::uint64_t num_bytes = 0;
  };
  // Takes over what has been read until now. To be called before a look's `connections` are
  // gathered: what comes and is read after this is held in that look's eyes, and no more in the
  // next one's; the other way round it would be held for good.
  void TakeReads();
  // Takes note of all connections that there are. Where they hold more than `max_bytes` together,
  // returns the one that holds most, which the caller then ends: it counts no more.
  std::optional<Holder> Look(const std::vector<Received>& connections, std::uint64_t max_bytes);
  // Over all connections, at the last look.
  std::uint64_t held_bytes() const;

 private:
  struct Connection {
    std::shared_ptr<Reader> reader = std::make_shared<Reader>();
    std::uint64_t received_bytes = 0;  // at the last look, as the next
    std::uint64_t held_bytes = 0;
    std::uint64_t taken_bytes = 0;  // read, and not yet held against what has come
    std::uint64_t seen_at = 0;      // number of the last look that found it
    bool ended = false;
  };

  mutable std::mutex mutex_;
  std::unordered_map<std::string, Connection> connections_;  // by peer; guarded by mutex_
  std::uint64_t num_looks_ = 0;                              // guarded by mutex_, as the next
  std::uint64_t held_bytes_ = 0;
};

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_RPC_HALF_MESSAGES_H_
