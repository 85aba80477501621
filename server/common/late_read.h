// When the next read of a stream is put off so that gRPC's window update rides on the answer: the
// coordinator's calls and the workers' stream do it alike.
#ifndef EPSERVE_SERVER_COMMON_LATE_READ_H_
#define EPSERVE_SERVER_COMMON_LATE_READ_H_

#include <chrono>

namespace epserve::server {

// How long a read that waits for a write is put off where no write comes: long beside a batch of a
// few tokens, short beside a lease and whatever a caller would notice.
inline constexpr auto kReadDelay = std::chrono::milliseconds(1);
// A peer whose next message was there before it was asked for sends without waiting for answers:
// so many of the reads are not put off. One that is keeps the next batch from starting beside the
// present one at that worker, and thereby at all of them, so there must be few enough not to be the
// slowest per cent of what eight workers do.
inline constexpr int kPromptReads = 1024;

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_COMMON_LATE_READ_H_
