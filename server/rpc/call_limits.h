// What a call may ask of the server: how long it waits for its caller, and how much a message has.
#ifndef EPSERVE_SERVER_RPC_CALL_LIMITS_H_
#define EPSERVE_SERVER_RPC_CALL_LIMITS_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

#include "absl/status/status.h"

namespace epserve::server {

// How long a call waits for its caller, with nothing else under way.
struct CallLimits {
  std::chrono::milliseconds message_timeout{60'000};         // one message, of a call that has one
  std::chrono::milliseconds stream_idle_timeout{3'600'000};  // the next message of a stream
  // A reply, or the call's end, on its way to the caller. What nobody takes would hold memory for
  // as long as its caller likes.
  std::chrono::milliseconds reply_timeout{60'000};
};

// Time that a handler waits for its caller, as far as ticks can tell. Costs nothing between them.
class WaitClock {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;

  void Reset() { since_.reset(); }  // something came, or nothing is waited for
  bool Exceeds(std::chrono::milliseconds limit, TimePoint now) {
    if (!since_.has_value()) since_ = now;
    return now - *since_ >= limit;
  }

 private:
  std::optional<TimePoint> since_;  // the first tick that found it waiting
};

// What a method's messages may have unless it is registered with more: ones without tensors take a
// few hundred bytes. Protobuf makes up to 27 bytes of memory of one byte that it does not know, on
// the thread that everybody's messages come by.
inline constexpr std::size_t kSmallMessageBytes = std::size_t{64} << 10;
inline constexpr std::size_t kAnyMessageBytes = SIZE_MAX;  // whatever gRPC lets through

// What the caller gets. `what`: whose message it is.
absl::Status MessageTooLarge(std::string_view what, std::size_t num_bytes, std::size_t most);
absl::Status ReplyNotTaken(const CallLimits& limits);

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_RPC_CALL_LIMITS_H_
