#include "server/coordinator/refusals.h"

#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "runtime/base/log.h"
#include "server/common/peer_host.h"

namespace epserve::coordinator {
namespace {

using server::PeerHost;

// Looks for a failed handshake's peer in a second, at most. One takes about 2 us for each file
// descriptor, so that who does nothing but fail handshakes makes it take a tenth of a core at 1000
// of them.
constexpr int kLooksPerSecond = 50;

}  // namespace

void Refusals::OnAccess(std::string_view method, const std::string& peer,
                        const absl::Status& status) {
  metrics_->AddRefusal(RefusalReason::kAccess);
  if (!limit_.Allows(absl::StrCat("access ", std::string(method), " ", PeerHost(peer)))) return;
  runtime::LogWarning("call_refused", {{"method", method}, {"peer", peer}, {"status", status}});
}

void Refusals::OnMaxConnections(const std::string& peer) {
  metrics_->AddRefusal(RefusalReason::kMaxConnections);
  if (!limit_.Allows(absl::StrCat("connections ", PeerHost(peer)))) return;
  runtime::LogWarning("connection_refused",
                      {{"peer", peer},
                       {"cause",
                        "as many connections have calls under way as --max-connections "
                        "allows"}});
}

void Refusals::OnHalfMessages(const std::string& peer, std::uint64_t num_bytes) {
  metrics_->AddRefusal(RefusalReason::kHalfMessages);
  if (!limit_.Allows(absl::StrCat("halves ", PeerHost(peer)))) return;
  runtime::LogWarning("connection_ended",
                      {{"peer", peer},
                       {"bytes", static_cast<std::int64_t>(num_bytes)},
                       {"cause",
                        "messages that are not whole hold what gRPC may buffer, and most of "
                        "it came from here"}});
}

void Refusals::OnWorker(Worker what, const HelloInfo& hello, const absl::Status& status) {
  metrics_->AddRefusal(RefusalReason::kWorker);
  std::string reason(status.message());
  // One that is started again and again has another name each time, where it goes by its pid.
  if (!hello.worker_id.empty()) absl::StrReplaceAll({{hello.worker_id, ""}}, &reason);
  if (!worker_limit_.Allows(absl::StrCat(reason, " ", PeerHost(hello.peer)))) return;
  runtime::LogWarning(what == Worker::kRejected ? "worker_rejected" : "worker_turned_away",
                      {{"worker", hello.worker_id},
                       {"node", hello.node},
                       {"pid", hello.process.pid},
                       {"peer", hello.peer},
                       {"status", status}});
}

void Refusals::OnHandshake(std::string_view cause, const FindPeers& find_peers, TimePoint now) {
  metrics_->AddRefusal(RefusalReason::kHandshake);
  if (!MayLook(now)) return;
  const std::vector<std::string> peers = find_peers();
  std::set<std::string> hosts;
  for (const std::string& peer : peers) hosts.insert(PeerHost(peer));
  // Where several may be it, hosts that did nothing wrong are among them: one line for all.
  const std::string host = hosts.size() == 1 ? *hosts.begin() : "";
  if (!limit_.Allows(absl::StrCat("handshake ", std::string(cause), " ", host), now)) return;
  if (hosts.size() > 1) {
    runtime::LogWarning("tls_handshake_refused",
                        {{"peer_one_of", absl::StrJoin(peers, ", ")}, {"cause", cause}});
  } else {
    runtime::LogWarning("tls_handshake_refused",
                        {{"peer", peers.empty() ? "unknown" : peers.front()}, {"cause", cause}});
  }
}

bool Refusals::MayLook(TimePoint now) {
  const std::lock_guard lock(mutex_);
  if (now - second_began_ >= std::chrono::seconds(1)) {
    second_began_ = now;
    num_looks_ = 0;
  }
  return ++num_looks_ <= kLooksPerSecond;
}

}  // namespace epserve::coordinator
