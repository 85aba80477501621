#include "server/rpc/buffer_guard.h"

#include <chrono>
#include <iterator>
#include <utility>

#include "server/rpc/connections.h"

namespace epserve::server {
namespace {

// Between two looks; from a call's begin to the look at whether its message has come; and between
// two while more than a part of what may be held is: at 1 GB/s 20 MB come in between.
constexpr std::chrono::milliseconds kSeldom{1000};
constexpr std::chrono::milliseconds kSoon{50};
constexpr std::chrono::milliseconds kOften{20};
constexpr std::uint64_t kPressingShare = 16;

}  // namespace

BufferGuard::Call::Call(BufferGuard* guard, const std::string& peer)
    : guard_(guard), reader_(guard->half_messages_.ReaderOf(peer)) {
  reader_->OnCallBegins();
  guard_->AwaitMessage();
}

BufferGuard::Call::~Call() {
  reader_->OnCallEnds();
  if (awaits_first_) guard_->num_awaiting_.fetch_sub(1, std::memory_order_relaxed);
}

void BufferGuard::Call::OnMessage(std::uint64_t num_bytes) {
  if (std::exchange(awaits_first_, false)) {
    guard_->num_awaiting_.fetch_sub(1, std::memory_order_relaxed);
  }
  reader_->OnMessage(num_bytes);
}

BufferGuard::BufferGuard(std::vector<int> ports, Limit limit)
    : ports_(std::move(ports)), limit_(std::move(limit)), thread_([this] { Run(); }) {}

BufferGuard::~BufferGuard() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_one();
  thread_.join();
}

void BufferGuard::AwaitMessage() {
  num_awaiting_.fetch_add(1, std::memory_order_relaxed);
  if (begun_.load(std::memory_order_relaxed)) return;
  {
    const std::lock_guard lock(mutex_);  // Else the thread may just be about to sleep.
    begun_.store(true, std::memory_order_relaxed);
  }
  changed_.notify_one();
}

void BufferGuard::Run() {
  std::unique_lock lock(mutex_);
  auto looked_at = std::chrono::steady_clock::now();
  while (!stopping_) {
    if (half_messages_.held_bytes() > limit_.max_bytes / kPressingShare) {
      changed_.wait_for(lock, kOften, [this] { return stopping_; });
    } else if (changed_.wait_for(lock, kSeldom, [this] { return stopping_ || begun_.load(); })) {
      changed_.wait_for(lock, kSoon, [this] { return stopping_; });
      begun_.store(false);
      // As nearly always: messages come with their calls. Other calls' later ones are due all the
      // same.
      const bool due = std::chrono::steady_clock::now() - looked_at >= kSeldom;
      if (num_awaiting_.load() == 0 && !due) continue;
    }
    if (stopping_) break;
    looked_at = std::chrono::steady_clock::now();
    lock.unlock();
    Look();
    lock.lock();
  }
}

void BufferGuard::Look() {
  half_messages_.TakeReads();
  std::vector<HalfMessages::Received> connections;
  for (const int port : ports_) {
    std::vector<HalfMessages::Received> more = ReceivedBytes(port);
    connections.insert(connections.end(), std::make_move_iterator(more.begin()),
                       std::make_move_iterator(more.end()));
  }
  const auto holder = half_messages_.Look(connections, limit_.max_bytes);
  if (!holder.has_value()) return;
  for (const int port : ports_) EndConnectionOf(holder->peer, port);
  limit_.on_ended(holder->peer, holder->num_bytes);
}

}  // namespace epserve::server
