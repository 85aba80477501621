// The descriptors of clients' regions that this worker reads rows from and writes rows to, as the
// coordinator hands them out by number: of one epoch, got when a shard first names them and kept
// until the coordinator calls them forgotten.
// Thread-safe.
#ifndef EPSERVE_SERVER_WORKER_REGION_FILES_H_
#define EPSERVE_SERVER_WORKER_REGION_FILES_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/base/unique_fd.h"
#include "server/worker/control_messages.h"

namespace epserve::worker {

class RegionFiles {
 public:
  // Null where the coordinator names no socket (an empty address), or it cannot be reached from
  // here: rows then come through the coordinator, and the log says so.
  static std::shared_ptr<RegionFiles> Connect(const std::string& socket, const std::string& secret);

  // NOT_FOUND: the number is no region's. UNAVAILABLE: the coordinator does not answer.
  absl::StatusOr<std::shared_ptr<const runtime::UniqueFd>> Find(std::uint64_t region);
  // Closes what is open, once nobody uses it.
  void Forget(std::span<const std::uint64_t> regions);
  std::size_t num_open() const;

  // Reads each of `sources` to its rows of [rows, + the shard's). Those that cannot be read become
  // zeros, and a fault. REQUIRES, here and below: the rows are the shard's.
  std::vector<RegionFault> ReadRows(std::span<const RegionRows> sources, std::int64_t row_bytes,
                                    std::byte* rows);
  // Writes each of `targets` from its rows, but for those whose first row is among `faults`, and
  // adds a fault for those that cannot be written. Asks `may_write` before every piece, and returns
  // its error at once.
  absl::Status WriteRows(std::span<const RegionRows> targets, std::int64_t row_bytes,
                         const std::byte* rows, const std::function<absl::Status()>& may_write,
                         std::vector<RegionFault>& faults);

 private:
  RegionFiles(std::string socket, std::string secret);

  const std::string socket_;
  const std::string secret_;
  mutable std::mutex mutex_;
  // Guarded by mutex_.
  std::map<std::uint64_t, std::shared_ptr<const runtime::UniqueFd>> open_;
};

}  // namespace epserve::worker

#endif  // EPSERVE_SERVER_WORKER_REGION_FILES_H_
