// The accepted requests: those that wait for a batch, and those in one.
//
// Callers take turns: each batch starts with the oldest request of the caller whose turn it is, so
// that one with a thousand waiting delays another by a batch and not by a thousand. And where the
// queue is full, the caller that holds most of it yields a place to one that holds less.
//
// Thread safety: none. Invariants: a request is queued or in a batch, and gone once ended; all
// operations but Pick take constant or logarithmic time.
#ifndef EPSERVE_SERVER_COORDINATOR_STATE_MACHINE_REQUEST_QUEUE_H_
#define EPSERVE_SERVER_COORDINATOR_STATE_MACHINE_REQUEST_QUEUE_H_

#include <cstdint>
#include <list>
#include <optional>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "server/coordinator/state_machine/events.h"
#include "server/coordinator/state_machine/types.h"

namespace epserve::coordinator {

struct LiveRequest {
  RequestArrived request;
  TimeUs arrived_us = 0;
  BatchId batch = 0;  // 0: queued
};

class RequestQueue {
 public:
  // `merge`: a batch may hold several requests. window_us: how long the first waits for others.
  RequestQueue(bool merge, std::int64_t window_us, std::int64_t max_batch_tokens)
      : merge_(merge), window_us_(window_us), max_batch_tokens_(max_batch_tokens) {}

  // Whatever is queued is picked together, without a time that it waits for others.
  bool merges_at_once() const { return merge_ && window_us_ == 0; }

  bool Contains(RequestId id) const { return entries_.contains(id); }
  const LiveRequest& Get(RequestId id) const {
    return entries_.at(id).live;
  }  // REQUIRES: Contains(id)
  std::int64_t num_queued() const { return static_cast<std::int64_t>(queue_.size()); }
  std::int64_t num_in_flight() const {
    return static_cast<std::int64_t>(entries_.size() - queue_.size());
  }

  // REQUIRES: !Contains(request.request), num_tokens in [1, max_batch_tokens].
  void Push(const RequestArrived& request, TimeUs now_us);
  // Forgets the request wherever it is.
  void Remove(RequestId id);

  // The request to turn away so that one of `caller` may take its place in a full queue: the newest
  // of whoever has most queued. nullopt: nobody would have more than `caller` afterwards.
  std::optional<RequestId> WhoYieldsTo(CallerId caller) const;
  std::int64_t QueuedOf(CallerId caller) const;

  // Takes the next batch's requests out of the queue: the oldest of the caller whose turn it is,
  // and where they are merged with it, oldest first, whatever is queued of the same layer, row type
  // and routedness while it fits. Empty: nothing is queued, or the oldest of all still has time to
  // wait for company (never with `flush`).
  std::vector<RequestId> Pick(BatchId batch, TimeUs now_us, bool flush);

  // Of the requests that Pick() would take next; nullopt: nothing is queued.
  std::optional<RequestKind> NextKind() const;

  std::vector<RequestId> Queued() const { return {queue_.begin(), queue_.end()}; }
  std::vector<RequestId> Expired(TimeUs now_us) const;
  TimeUs NextRequestDeadline() const;  // kNever: none
  TimeUs NextPick() const;             // when the oldest has waited long enough; kNever: empty

 private:
  struct Entry {
    LiveRequest live;
    // Valid while live.batch is 0: in queue_, and among its caller's.
    std::list<RequestId>::iterator place;
    std::list<RequestId>::iterator place_of_caller;
  };
  struct Caller {
    std::list<RequestId> waiting;  // oldest first, never empty
    std::list<CallerId>::iterator turn;
  };

  void Unqueue(const Entry& entry);
  void Resize(CallerId caller, std::size_t from, std::size_t to);

  const bool merge_;
  const std::int64_t window_us_;
  const std::int64_t max_batch_tokens_;
  std::unordered_map<RequestId, Entry> entries_;
  std::list<RequestId> queue_;  // oldest first
  std::unordered_map<CallerId, Caller> callers_;
  std::list<CallerId> turns_;                            // of callers_; the next first
  std::set<std::pair<std::size_t, CallerId>> by_count_;  // callers_ by how many they have waiting
  std::set<std::pair<TimeUs, RequestId>> deadlines_;
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_STATE_MACHINE_REQUEST_QUEUE_H_
