// What a worker's memory goes to, and whether it is there. Reads the system's own figures; holds no
// state, safe from any thread.
#ifndef EPSERVE_SERVER_WORKER_MEMORY_REPORT_H_
#define EPSERVE_SERVER_WORKER_MEMORY_REPORT_H_

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/engine/engine.h"

namespace epserve::worker {

struct AvailableMemory {
  std::uint64_t memory_bytes = 0;
  // What bounds it: "MemAvailable", a control group's memory.max (version 1: its
  // memory.limit_in_bytes), or "GPU 0 (NVIDIA H200)".
  std::string memory_limit;
  // Free in /dev/shm, where the heap lies, which counts twice; nothing for a heap on a GPU.
  std::optional<std::uint64_t> shm_bytes;
};

// `root` stands before /proc and /sys ("" but in tests), `shm_dir` is where heaps are created.
// UNAVAILABLE names the file that could not be read. Page cache counts as available.
absl::StatusOr<AvailableMemory> ReadAvailableMemory(const std::string& root,
                                                    const std::string& shm_dir);

// What the engine's memory plan is held against: its device's memory, or the host's; with what the
// engine holds already.
absl::StatusOr<AvailableMemory> ReadMemoryFor(const runtime::Engine& engine,
                                              const std::string& root, const std::string& shm_dir);

// Resident memory of this process; 0 where it cannot be read.
std::uint64_t ResidentBytes();

// RESOURCE_EXHAUSTED says by how much, and what would help.
absl::Status CheckMemoryFits(const runtime::MemoryPlan& plan, const AvailableMemory& available);

// Several lines, for people at a terminal.
std::string MemoryTable(const runtime::MemoryPlan& plan, const AvailableMemory& available);

// The same as one event of the log.
void LogMemoryPlan(const runtime::MemoryPlan& plan, const AvailableMemory& available);

// "1.50 GiB", "12.0 MiB", "512 B".
std::string FormatBytes(std::uint64_t bytes);

}  // namespace epserve::worker

#endif  // EPSERVE_SERVER_WORKER_MEMORY_REPORT_H_
