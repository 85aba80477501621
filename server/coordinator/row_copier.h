// Copies of the rows of large requests, by several threads at once: one core moves 58 MB in 8 to 10
// ms, in which the others would wait for the batch.
//
// The helpers sleep while there is nothing to copy. A helper that does not get to run in time costs
// nothing, since whoever calls copies all that nobody else has begun with.
// Thread safety: Copy() is called by one thread at a time.
#ifndef EPSERVE_SERVER_COORDINATOR_ROW_COPIER_H_
#define EPSERVE_SERVER_COORDINATOR_ROW_COPIER_H_

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "runtime/base/streamed_copy.h"

namespace epserve::coordinator {

class RowCopier {
 public:
  struct Piece {
    const char* from = nullptr;
    char* to = nullptr;
    std::size_t bytes = 0;
  };

  explicit RowCopier(int num_helpers);
  ~RowCopier();
  RowCopier(const RowCopier&) = delete;
  RowCopier& operator=(const RowCopier&) = delete;

  // As many as this machine has cores for, beside the caller.
  static int HelpersHere();

  // Returns once all is copied. REQUIRES: no overlap.
  void Copy(std::span<const Piece> pieces);

 private:
  void Help();
  void CopyPortions();
  // Cuts the pieces into portions; how many bytes they have.
  std::size_t Divide();

  std::span<const Piece> pieces_;  // of the running call, as the next three
  runtime::CopyKind kind_ = runtime::CopyKind::kCached;
  std::vector<std::size_t> portions_;          // where each begins among the pieces, and the end
  std::atomic<std::size_t> next_portion_ = 0;  // that nobody has begun with

  std::mutex mutex_;
  std::condition_variable wanted_;
  std::condition_variable left_;
  std::uint64_t num_calls_ = 0;  // that wanted help; guarded by mutex_, as below
  bool wants_help_ = false;
  int num_helping_ = 0;
  bool stopping_ = false;
  std::vector<std::thread> helpers_;  // last: they use all of the above
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_ROW_COPIER_H_
