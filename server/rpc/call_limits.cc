#include "server/rpc/call_limits.h"

#include <string>

#include "absl/strings/str_cat.h"

namespace epserve::server {

absl::Status MessageTooLarge(std::string_view what, std::size_t num_bytes, std::size_t most) {
  return absl::InvalidArgumentError(
      absl::StrCat(std::string(what), ": the message of ", num_bytes, " bytes exceeds the ", most,
                   " that it may have; send the fields of its definition only"));
}

absl::Status ReplyNotTaken(const CallLimits& limits) {
  return absl::DeadlineExceededError(
      absl::StrCat("server: the reply had not been taken after ", limits.reply_timeout.count(),
                   " ms; read it sooner, or raise --reply-timeout-ms"));
}

}  // namespace epserve::server
