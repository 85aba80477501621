#include "server/coordinator/state_machine/request_queue.h"

namespace epserve::coordinator {
void RequestQueue::Push(const RequestArrived& request, TimeUs now_us) {
  const auto place = queue_.insert(queue_.end(), request.request);
  const auto [found, is_new] = callers_.try_emplace(request.caller);
  Caller& caller = found->second;
  if (is_new) caller.turn = turns_.insert(turns_.end(), request.caller);
  const auto of_caller = caller.waiting.insert(caller.waiting.end(), request.request);
  Resize(request.caller, caller.waiting.size() - 1, caller.waiting.size());
  entries_.emplace(request.request, Entry{{request, now_us, 0}, place, of_caller});
  if (request.deadline_us != kNever) deadlines_.emplace(request.deadline_us, request.request);
}

void RequestQueue::Unqueue(const Entry& entry) {
  queue_.erase(entry.place);
  const auto found = callers_.find(entry.live.request.caller);
  Caller& caller = found->second;
  caller.waiting.erase(entry.place_of_caller);
  Resize(found->first, caller.waiting.size() + 1, caller.waiting.size());
  if (!caller.waiting.empty()) return;
  turns_.erase(caller.turn);
  callers_.erase(found);
}

void RequestQueue::Resize(CallerId caller, std::size_t from, std::size_t to) {
  if (from > 0) by_count_.erase({from, caller});
  if (to > 0) by_count_.emplace(to, caller);
}

std::int64_t RequestQueue::QueuedOf(CallerId caller) const {
  const auto found = callers_.find(caller);
  return found == callers_.end() ? 0 : static_cast<std::int64_t>(found->second.waiting.size());
}

std::optional<RequestId> RequestQueue::WhoYieldsTo(CallerId caller) const {
  if (by_count_.empty()) return std::nullopt;
  const auto [most, holder] = *by_count_.rbegin();
  // With one more, `caller` has at most what the holder then has left.
  if (QueuedOf(caller) + 1 > static_cast<std::int64_t>(most) - 1) return std::nullopt;
  return callers_.at(holder).waiting.back();
}

void RequestQueue::Remove(RequestId id) {
  const auto it = entries_.find(id);
  if (it == entries_.end()) return;
  const LiveRequest& live = it->second.live;
  if (live.batch == 0) Unqueue(it->second);
  deadlines_.erase({live.request.deadline_us, id});
  entries_.erase(it);
}

std::optional<RequestKind> RequestQueue::NextKind() const {
  if (queue_.empty()) return std::nullopt;
  return KindOf(Get(callers_.at(turns_.front()).waiting.front()).request);
}

std::vector<RequestId> RequestQueue::Pick(BatchId batch, TimeUs now_us, bool flush) {
  std::vector<RequestId> picked;
  if (queue_.empty()) return picked;
  const auto turn = turns_.begin();
  const RequestId head_id = callers_.at(*turn).waiting.front();
  const LiveRequest& head = Get(head_id);
  picked.push_back(head_id);
  if (merge_) {
    std::int64_t num_tokens = head.request.num_tokens;
    bool full = num_tokens == max_batch_tokens_;
    for (auto it = queue_.begin(); it != queue_.end() && !full; ++it) {
      if (*it == head_id) continue;
      const RequestArrived& other = Get(*it).request;
      if (KindOf(other) != KindOf(head.request)) continue;
      if (other.num_tokens > max_batch_tokens_ - num_tokens) {
        full = true;  // Whoever does not fit is not overtaken by a smaller one of its kind.
        break;
      }
      num_tokens += other.num_tokens;
      picked.push_back(*it);
      full = num_tokens == max_batch_tokens_;
    }
    if (!full && !flush && now_us < NextPick()) return {};
  }
  turns_.splice(turns_.end(), turns_, turn);  // It goes behind the others.
  for (const RequestId id : picked) {
    Entry& entry = entries_.at(id);
    Unqueue(entry);
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
