#include "server/coordinator/state_machine/request_queue.h"

namespace epserve::coordinator {
namespace {

bool Mergeable(const RequestArrived& a, const RequestArrived& b) {
  return a.layer == b.layer && a.row_type == b.row_type && a.routed == b.routed;
}

}  // namespace

void RequestQueue::Push(const RequestArrived& request, TimeUs now_us) {
  const auto place = queue_.insert(queue_.end(), request.request);
  entries_.emplace(request.request, Entry{{request, now_us, 0}, place});
  if (request.deadline_us != kNever) deadlines_.emplace(request.deadline_us, request.request);
}

void RequestQueue::Remove(RequestId id) {
  const auto it = entries_.find(id);
  if (it == entries_.end()) return;
  const LiveRequest& live = it->second.live;
  if (live.batch == 0) queue_.erase(it->second.place);
  deadlines_.erase({live.request.deadline_us, id});
  entries_.erase(it);
}

std::vector<RequestId> RequestQueue::Pick(BatchId batch, TimeUs now_us, bool flush) {
  std::vector<RequestId> picked;
  if (queue_.empty()) return picked;
  const LiveRequest& head = Get(queue_.front());
  picked.push_back(queue_.front());
  if (window_us_ > 0) {
    std::int64_t num_tokens = head.request.num_tokens;
    bool full = num_tokens == max_batch_tokens_;
    for (auto it = std::next(queue_.begin()); it != queue_.end() && !full; ++it) {
      const RequestArrived& other = Get(*it).request;
      if (!Mergeable(head.request, other)) continue;
      if (other.num_tokens > max_batch_tokens_ - num_tokens) {
        full = true;  // Whoever does not fit is not overtaken by a smaller one of its kind.
        break;
      }
      num_tokens += other.num_tokens;
      picked.push_back(*it);
      full = num_tokens == max_batch_tokens_;
    }
    if (!full && !flush && now_us < head.arrived_us + window_us_) return {};
  }
  for (const RequestId id : picked) {
    Entry& entry = entries_.at(id);
    queue_.erase(entry.place);
    entry.live.batch = batch;
  }
  return picked;
}

std::vector<RequestId> RequestQueue::Expired(TimeUs now_us) const {
  std::vector<RequestId> expired;
  for (const auto& [deadline_us, id] : deadlines_) {
    if (deadline_us > now_us) break;
    expired.push_back(id);
  }
  return expired;
}

TimeUs RequestQueue::NextRequestDeadline() const {
  return deadlines_.empty() ? kNever : deadlines_.begin()->first;
}

TimeUs RequestQueue::NextPick() const {
  return queue_.empty() ? kNever : Get(queue_.front()).arrived_us + window_us_;
}

}  // namespace epserve::coordinator
