// Drives load at a service and records how each request went.
//
// Closed loop: `concurrency` requests are under way at once; the next starts when one ends, and a
// little later where it failed, or when the service has asked for it (RetryPushback). Open loop:
// requests start at a fixed rate whatever the service does, and their time counts from when they
// were due, so that a stall shows in every request that it delayed. A request that finds no room
// before the duration is over does not start at all.
//
// What is under way ends on the client's own threads (ClientOptions::async_threads), and in a
// closed loop the next request starts there: however many are under way, few threads take part.
//
// Thread safety: RunLoad is called by one thread and returns when every request has ended, which is
// at most the requests' timeout after the duration; it draws on `inputs` from several threads.
#ifndef EPSERVE_CLIENT_COMMAND_LOAD_GENERATOR_H_
#define EPSERVE_CLIENT_COMMAND_LOAD_GENERATOR_H_

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "client/cpp/client.h"

namespace epserve::client {

struct LoadPlan {
  int concurrency = 1;
  bool streaming = false;     // closed loop: each of the `concurrency` over a stream of its own
  double rate = 0;            // Requests a second; 0: closed loop.
  std::int64_t requests = 0;  // Started at most; 0: no limit.
  absl::Duration duration = absl::InfiniteDuration();  // No request starts after it.
  // An open loop against a stalled service must not fill memory: past this many requests under way
  // the next ones start late, and their time still counts from when they were due.
  std::int64_t max_under_way = 4096;
};

// The service's times of a request: `queue` is the answer's parameter epserve_queue_us.
inline constexpr std::array<const char*, 7> kPhases = {"queue", "assign",  "counts", "dispatch",
                                                       "ffn",   "combine", "server"};
inline constexpr std::size_t kFfnPhase = 4;
inline constexpr std::int64_t kNoTime = -1;

using PhaseTimes = std::array<std::int64_t, kPhases.size()>;  // kNoTime where there is none
constexpr PhaseTimes NoTimes() {
  PhaseTimes times{};
  times.fill(kNoTime);
  return times;
}

// What a traced answer had to say.
struct Trace {
  std::map<std::string, std::int64_t> parameters;
  std::string workers;  // InferResult::trace
};

struct Sample {
  absl::StatusCode code = absl::StatusCode::kOk;
  double request_us = 0;
  std::int64_t began_us = 0;  // CLOCK_MONOTONIC
  PhaseTimes phases_us = NoTimes();
  std::unique_ptr<Trace> trace;  // null: not asked for
};

struct LoadResult {
  std::vector<Sample> samples;
  double seconds = 0;
  std::map<std::string, std::string> first_message;  // of each error, by its code's name
};

// Request i is inputs[i % inputs.size()]. `progress(ended, seconds)` is called now and then from
// the calling thread.
LoadResult RunLoad(InferenceClient& client, const std::vector<InferRequest>& inputs,
                   const LoadPlan& plan, const std::function<void(std::int64_t, double)>& progress);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_COMMAND_LOAD_GENERATOR_H_
