#include "runtime/experts/team.h"

namespace epserve::runtime {

Team::Team(int size) : size_(size) {
  for (int member = 1; member < size; ++member) {
    threads_.emplace_back([this, member] { ThreadMain(member); });
  }
}

Team::~Team() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Team::Run(Job* job) {
  if (size_ > 1) {
    {
      const std::lock_guard lock(mutex_);
      job_ = job;
      ++job_number_;
    }
    changed_.notify_all();
  }
  job->RunMember(0);
  Barrier();  // No member touches the job any more.
}

void Team::Barrier() {
  if (size_ == 1) return;
  std::unique_lock lock(mutex_);
  if (++num_at_barrier_ == size_) {
    num_at_barrier_ = 0;
    ++barrier_number_;
    lock.unlock();
    changed_.notify_all();
    return;
  }
  const std::uint64_t number = barrier_number_;
  changed_.wait(lock, [&] { return barrier_number_ != number; });
}

void Team::ThreadMain(int member) {
  std::uint64_t last_job = 0;
  while (true) {
    Job* job = nullptr;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return stopping_ || job_number_ != last_job; });
      if (stopping_) return;
      last_job = job_number_;
      job = job_;
    }
    job->RunMember(member);
    Barrier();
  }
}

}  // namespace epserve::runtime
