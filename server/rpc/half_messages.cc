#include "server/rpc/half_messages.h"

#include <utility>

namespace epserve::server {
namespace {

// Allowed for with each message: its headers, the acknowledgements of what was sent; and a part of
// its own size, for the heads of frames and of TLS records.
constexpr std::uint64_t kHeaderBytes = 1024;
constexpr std::uint64_t kFramingShare = 64;

}  // namespace

void HalfMessages::Reader::OnMessage(std::uint64_t num_bytes) {
  read_bytes_.fetch_add(num_bytes + num_bytes / kFramingShare + kHeaderBytes,
                        std::memory_order_relaxed);
}

std::shared_ptr<HalfMessages::Reader> HalfMessages::ReaderOf(const std::string& peer) {
  const std::lock_guard lock(mutex_);
  Connection& connection = connections_[peer];
  // What a look in progress has found may be older than the connection.
  connection.seen_at = num_looks_ + 1;
  return connection.reader;
}

void HalfMessages::TakeReads() {
  const std::lock_guard lock(mutex_);
  for (auto& [peer, connection] : connections_) {
    connection.taken_bytes += connection.reader->read_bytes_.exchange(0, std::memory_order_relaxed);
  }
}

std::optional<HalfMessages::Holder> HalfMessages::Look(const std::vector<Received>& connections,
                                                       std::uint64_t max_bytes) {
  const std::lock_guard lock(mutex_);
  ++num_looks_;
  held_bytes_ = 0;
  Holder most;
  for (const Received& now : connections) {
    Connection& connection = connections_[now.peer];
    // A port may be another connection's by now.
    if (now.num_bytes < connection.received_bytes) {
      connection.received_bytes = connection.held_bytes = 0;
      connection.ended = false;
    }
    const std::uint64_t has = connection.held_bytes + now.num_bytes - connection.received_bytes;
    const std::uint64_t read = std::exchange(connection.taken_bytes, 0);
    // Never below: what is allowed for too much now must not count for later.
    connection.held_bytes = has > read && connection.reader->num_calls_.load() > 0 ? has - read : 0;
    connection.received_bytes = now.num_bytes;
    connection.seen_at = num_looks_;
    if (connection.ended) continue;
    held_bytes_ += connection.held_bytes;
    if (connection.held_bytes > most.num_bytes) most = {now.peer, connection.held_bytes};
  }
  // Those that have gone; a call that is ending may still have its reader.
  std::erase_if(connections_,
                [this](const auto& entry) { return entry.second.seen_at != num_looks_; });
  if (held_bytes_ <= max_bytes || most.num_bytes == 0) return std::nullopt;
  connections_[most.peer].ended = true;
  held_bytes_ -= most.num_bytes;
  return most;
}

std::uint64_t HalfMessages::held_bytes() const {
  const std::lock_guard lock(mutex_);
  return held_bytes_;
}

}  // namespace epserve::server
