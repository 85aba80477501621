#include "server/coordinator/grpc_log.h"

#include <grpc/support/log.h>

#include <mutex>
#include <string_view>
#include <utility>

#include "runtime/base/log.h"
#include "server/common/log_limit.h"

namespace epserve::coordinator {
namespace {

constexpr std::string_view kHandshake = "Handshake failed";
constexpr std::string_view kAccept = "Failed accept4";

struct ListenerLost {
  std::mutex mutex;
  std::function<void()> call;  // Guarded by mutex.
};

// Never destroyed: gRPC's threads may still log while the process exits.
ListenerLost& OnListenerLost() {
  static auto* const on_lost = new ListenerLost;
  return *on_lost;
}

// gRPC's lines would otherwise stand on stderr beside ours, and twice where we report the same.
void LogLine(gpr_log_func_args* args) {
  const std::string_view message(args->message);
  if (message.starts_with(kHandshake)) {  // No call of ours would tell of it.
    static server::LogLimit limit;
    if (limit.Allows(args->message)) {
      runtime::LogWarning("tls_handshake_refused", {{"cause", args->message}});
    }
  } else if (message.starts_with(kAccept)) {
    runtime::LogError("listener_lost", {{"cause", args->message}});
    const std::lock_guard lock(OnListenerLost().mutex);
    if (OnListenerLost().call) OnListenerLost().call();
  } else {
    runtime::LogDebug("grpc",
                      {{"file", args->file}, {"line", args->line}, {"text", args->message}});
  }
}

}  // namespace

void TakeGrpcLog() { gpr_set_log_function(LogLine); }

void SetOnListenerLost(std::function<void()> on_lost) {
  const std::lock_guard lock(OnListenerLost().mutex);
  OnListenerLost().call = std::move(on_lost);
}

}  // namespace epserve::coordinator
