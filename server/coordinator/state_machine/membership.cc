#include "server/coordinator/state_machine/membership.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace epserve::coordinator {

std::string Session::Name() const {
  if (rank < 0) return absl::StrCat("worker ", worker_id);
  return absl::StrCat("worker ", worker_id, " (rank ", rank, ")");
}

Session* Membership::Find(StreamId stream) {
  auto it = sessions_.find(stream);
  return it == sessions_.end() ? nullptr : &it->second;
}

Session* Membership::FindWorker(const std::string& worker_id) {
  for (auto& [stream, session] : sessions_) {
    if (session.worker_id == worker_id) return &session;
  }
  return nullptr;
}

int Membership::NumRanksTaken() const {
  return static_cast<int>(
      std::count_if(by_rank_.begin(), by_rank_.end(), [](const Session* s) { return s; }));
}

Session& Membership::Add(Session session) {
  session.join_order = next_join_order_++;
  const StreamId stream = session.stream;
  return sessions_.emplace(stream, std::move(session)).first->second;
}

void Membership::Remove(StreamId stream) {
  auto it = sessions_.find(stream);
  if (it == sessions_.end()) return;
  FreeRank(it->second);
  sessions_.erase(it);
}

void Membership::FreeRank(Session& session) {
  if (session.rank < 0) return;
  by_rank_[session.rank] = nullptr;
  session.rank = -1;
}

std::vector<Session*> Membership::AssignFreeRanks(bool only_holders) {
  std::vector<Session*> assigned;
  if (NumRanksTaken() == num_ranks()) return assigned;
  std::vector<Session*> waiting;
  for (auto& [stream, session] : sessions_) {
    if (session.state == WorkerState::kStandby && !session.draining) waiting.push_back(&session);
  }
  std::sort(waiting.begin(), waiting.end(),
            [](const Session* a, const Session* b) { return a->join_order < b->join_order; });
  auto give = [&](Session* session, int rank) {
    session->rank = rank;
    by_rank_[rank] = session;
    assigned.push_back(session);
  };
  for (Session* session : waiting) {
    if (session->held_rank >= 0 && by_rank_[session->held_rank] == nullptr) {
      give(session, session->held_rank);
    }
  }
  if (only_holders) return assigned;
  int rank = 0;
  for (Session* session : waiting) {
    if (session->rank >= 0) continue;
    while (rank < num_ranks() && by_rank_[rank] != nullptr) ++rank;
    if (rank == num_ranks()) break;
    give(session, rank);
  }
  return assigned;
}

bool Membership::IsWholeLastEpoch() const {
  const Session* first = by_rank_[0];
  if (first == nullptr || first->last_epoch == 0) return false;
  return std::all_of(by_rank_.begin(), by_rank_.end(), [&](const Session* s) {
    return s != nullptr && s->last_epoch == first->last_epoch && s->held_rank == s->rank;
  });
}

bool Membership::NobodyWasInAnEpoch() const {
  return std::all_of(by_rank_.begin(), by_rank_.end(),
                     [](const Session* s) { return s == nullptr || s->last_epoch == 0; });
}

bool Membership::NobodyHoldsWeights() const {
  return std::all_of(sessions_.begin(), sessions_.end(),
                     [](const auto& entry) { return entry.second.held_rank < 0; });
}

void Membership::AddFence(const Session& lost, TimeUs now_us) {
  DropFencesBefore(now_us);
  if (lost.process_ended || lost.lease_until_us <= now_us) return;
  fences_.push_back({lost.worker_id, lost.incarnation, lost.lease_until_us});
}

void Membership::LiftFence(const std::string& worker_id, const std::string& incarnation) {
  std::erase_if(fences_, [&](const Fence& fence) {
    return fence.worker_id == worker_id && fence.incarnation == incarnation;
  });
}

void Membership::DropFencesBefore(TimeUs now_us) {
  std::erase_if(fences_, [&](const Fence& fence) { return fence.until_us <= now_us; });
}

TimeUs Membership::FencedUntil() const {
  TimeUs until_us = 0;
  for (const Fence& fence : fences_) until_us = std::max(until_us, fence.until_us);
  return until_us;
}

}  // namespace epserve::coordinator
