// Who is connected, who has which rank, and which lost workers may still touch memory.
//
// Thread safety: none. Invariants: a rank has at most one session; a session has at most one rank;
// a worker_id has at most one session. Session pointers stay valid until Remove.
#ifndef EPSERVE_SERVER_COORDINATOR_STATE_MACHINE_MEMBERSHIP_H_
#define EPSERVE_SERVER_COORDINATOR_STATE_MACHINE_MEMBERSHIP_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "server/coordinator/state_machine/types.h"

namespace epserve::coordinator {

// One worker on one control stream, from its Hello to the end of the stream.
struct Session {
  StreamId stream = 0;
  std::string worker_id;
  std::string incarnation;
  std::string backend;
  bool device_counts = false;
  EpochId last_epoch = 0;  // as its Hello said
  int held_rank = -1;      // as its Hello said; -1 where it is of another placement
  std::uint64_t join_order = 0;

  int rank = -1;
  WorkerState state = WorkerState::kStandby;
  TimeUs state_since_us = 0;  // kept for kQuiescing and kLeaving
  bool told_standby = false;

  EpochId epoch = 0;  // the epoch it is a member of, until it has quiesced
  bool heap_created = false;
  bool peers_opened = false;
  std::string handle;

  TimeUs last_heartbeat_us = 0;
  TimeUs lease_until_us = 0;  // of the last lease sent in `epoch`; 0: none
  bool process_ended = false;

  bool draining = false;
  TimeUs drain_deadline_us = kNever;
  std::string drain_reason;
  std::vector<std::uint64_t> drain_tokens;

  std::uint64_t loaded_bytes = 0;
  std::uint64_t total_bytes = 0;
  std::uint64_t weight_bytes = 0;
  std::uint64_t heap_bytes = 0;
  std::uint64_t resident_bytes = 0;
  std::uint64_t batches = 0;

  std::string Name() const;  // "worker w1 (rank 1)"
};

class Membership {
 public:
  explicit Membership(int num_ranks) : by_rank_(num_ranks, nullptr) {}
  Membership(const Membership&) = delete;
  Membership& operator=(const Membership&) = delete;

  int num_ranks() const { return static_cast<int>(by_rank_.size()); }
  Session* Find(StreamId stream);
  Session* FindWorker(const std::string& worker_id);
  Session* AtRank(int rank) const { return by_rank_[rank]; }
  std::map<StreamId, Session>& sessions() { return sessions_; }
  const std::map<StreamId, Session>& sessions() const { return sessions_; }
  int NumRanksTaken() const;

  // REQUIRES: neither the stream nor the worker_id is there.
  Session& Add(Session session);
  // Frees the rank too.
  void Remove(StreamId stream);
  void FreeRank(Session& session);

  // Gives free ranks to sessions without one: first each to who holds its weights, then, unless
  // `only_holders`, in the order they joined. Returns whoever got one.
  std::vector<Session*> AssignFreeRanks(bool only_holders);

  // Whether the R ranks are taken by the R members of one and the same last epoch, each at the rank
  // it held: then no other process can hold a lease of an earlier coordinator's.
  bool IsWholeLastEpoch() const;
  // Whether nobody that has a rank was in an epoch before: then no other process has ever mapped
  // memory of theirs.
  bool NobodyWasInAnEpoch() const;
  // Whether none of the connected holds any weights.
  bool NobodyHoldsWeights() const;

  // A lost worker may touch its peers until its lease ends, unless its process has ended or says
  // Hello again.
  void AddFence(const Session& lost, TimeUs now_us);
  void LiftFence(const std::string& worker_id, const std::string& incarnation);
  void DropFencesBefore(TimeUs now_us);
  TimeUs FencedUntil() const;  // 0: no fence

 private:
  struct Fence {
    std::string worker_id;
    std::string incarnation;
    TimeUs until_us = 0;
  };

  std::map<StreamId, Session> sessions_;
  std::vector<Session*> by_rank_;  // [R]
  std::vector<Fence> fences_;
  std::uint64_t next_join_order_ = 0;
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_STATE_MACHINE_MEMBERSHIP_H_
