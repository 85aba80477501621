#include "server/common/grpc_status.h"

#include <cstddef>
#include <string>

#include "absl/strings/str_cat.h"

namespace epserve::server {
namespace {

constexpr std::size_t kMaxMessageBytes = 4096;

// Cuts `message` before the UTF-8 character that would cross the limit.
void CutMessage(std::string& message) {
  if (message.size() <= kMaxMessageBytes) return;
  std::size_t end = kMaxMessageBytes;
  while (end > 0 && (static_cast<unsigned char>(message[end]) & 0xc0u) == 0x80u) --end;
  message.resize(end);
}

}  // namespace

grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  std::string message(status.message());
  if (message.empty()) message = absl::StatusCodeToString(status.code());
  CutMessage(message);
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), message);
}

absl::Status FromGrpcStatus(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  const int number = static_cast<int>(status.error_code());
  if (number < 0 || number > static_cast<int>(absl::StatusCode::kUnauthenticated)) {
    return absl::UnknownError(absl::StrCat("status code ", number, ": ", status.error_message()));
  }
  const auto code = static_cast<absl::StatusCode>(number);
  if (status.error_message().empty()) return absl::Status(code, absl::StatusCodeToString(code));
  return absl::Status(code, status.error_message());
}

}  // namespace epserve::server
