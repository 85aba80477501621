// A few threads that run one function together and meet at barriers. They sleep, never spin, while
// there is nothing to do, so that more threads than cores cost nothing but their stacks.
//
// Run() may be called by one thread at a time. Nothing is allocated after construction.
#ifndef EPSERVE_RUNTIME_EXPERTS_TEAM_H_
#define EPSERVE_RUNTIME_EXPERTS_TEAM_H_

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace epserve::runtime {

class Team {
 public:
  // What every member runs; the caller is member 0.
  class Job {
   public:
    virtual ~Job() = default;
    virtual void RunMember(int member) = 0;
  };

  // REQUIRES: size >= 1. Starts size - 1 threads.
  explicit Team(int size);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // Returns once every member has run `job`.
  void Run(Job* job);

  // Called by every member of a running job: returns once all have called it.
  void Barrier();

 private:
  void ThreadMain(int member);

  const int size_;
  std::mutex mutex_;
  std::condition_variable changed_;
  Job* job_ = nullptr;  // guarded by mutex_, as the rest
  std::uint64_t job_number_ = 0;
  std::uint64_t barrier_number_ = 0;
  int num_at_barrier_ = 0;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_EXPERTS_TEAM_H_
