#include "server/coordinator/grpc_log.h"

#include <grpc/support/log.h>

#include <mutex>
#include <string>
#include <string_view>
#include <utility>

#include "runtime/base/log.h"

namespace epserve::coordinator {
namespace {

constexpr std::string_view kHandshake = "Handshake failed";
constexpr std::string_view kAccept = "Failed accept4";

struct Hooks {
  std::mutex mutex;
  std::function<void()> listener_lost;  // Guarded by mutex, as the next.
  std::function<void(const std::string&)> handshake_refused;
};

// Never destroyed: gRPC's threads may still log while the process exits.
Hooks& TheHooks() {
  static auto* const hooks = new Hooks;
  return *hooks;
}

// gRPC's lines would otherwise stand on stderr beside ours, and twice where we report the same.
void LogLine(gpr_log_func_args* args) {
  const std::string_view message(args->message);
  if (message.starts_with(kHandshake)) {  // No call of ours would tell of it.
    const std::lock_guard lock(TheHooks().mutex);
    if (TheHooks().handshake_refused) {
      TheHooks().handshake_refused(args->message);
    } else {
      runtime::LogWarning("tls_handshake_refused", {{"cause", args->message}});
    }
  } else if (message.starts_with(kAccept)) {
    runtime::LogError("listener_lost", {{"cause", args->message}});
    const std::lock_guard lock(TheHooks().mutex);
    if (TheHooks().listener_lost) TheHooks().listener_lost();
  } else {
    runtime::LogDebug("grpc",
                      {{"file", args->file}, {"line", args->line}, {"text", args->message}});
  }
}

}  // namespace

void TakeGrpcLog() { gpr_set_log_function(LogLine); }

void SetOnListenerLost(std::function<void()> on_lost) {
  const std::lock_guard lock(TheHooks().mutex);
  TheHooks().listener_lost = std::move(on_lost);
}

void SetOnHandshakeRefused(std::function<void(const std::string&)> on_refused) {
  const std::lock_guard lock(TheHooks().mutex);
  TheHooks().handshake_refused = std::move(on_refused);
}

}  // namespace epserve::coordinator
