// Whether a measurement fits this machine's memory, asked before anything is allocated: a process
// that runs out later dies without a word, or takes others with it.
#ifndef EPSERVE_RUNTIME_MICROBENCH_MEMORY_CHECK_H_
#define EPSERVE_RUNTIME_MICROBENCH_MEMORY_CHECK_H_

#include <string>

#include "absl/status/status.h"

namespace epserve::runtime {

// RESOURCE_EXHAUSTED if `needed_bytes`, a double because sizes from flags multiply beyond any
// integer, exceed the memory available now; OK where the system does not tell. `flags` are those to
// lower.
absl::Status CheckMemoryFor(const std::string& what, double needed_bytes, const std::string& flags);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_MICROBENCH_MEMORY_CHECK_H_
