#include "client/command/load_generator.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"

namespace epserve::client {

namespace {

constexpr absl::Duration kProgressInterval = absl::Milliseconds(50);
// A service that refuses at once must not be asked as fast as it refuses.
constexpr absl::Duration kPauseAfterFailure = absl::Milliseconds(20);

class Recorder {
 public:
  void Record(absl::Time began, const absl::StatusOr<InferResult>& result) {
    Sample sample;
    sample.request_us = absl::ToDoubleMicroseconds(absl::Now() - began);
    sample.code = result.status().code();
    if (result.ok()) {
      sample.parameters = result->parameters;
      sample.trace = result->trace;
      // Steady and wall clock run alike for the length of a request.
      sample.began_us = std::chrono::duration_cast<std::chrono::microseconds>(
                            std::chrono::steady_clock::now().time_since_epoch())
                            .count() -
                        static_cast<std::int64_t>(sample.request_us);
    }
    absl::MutexLock lock(&mutex_);
    last_end_ = absl::Now();
    if (!result.ok()) {
      result_.first_message.emplace(absl::StatusCodeToString(sample.code),
                                    std::string(result.status().message()));
    }
    result_.samples.push_back(std::move(sample));
    --under_way_;
  }

  // Waits at most `timeout` until fewer than `most` requests are under way, and adds one if so.
  bool TakeRoom(std::int64_t most, absl::Duration timeout) {
    absl::MutexLock lock(&mutex_);
    const auto has_room = [&]() ABSL_NO_THREAD_SAFETY_ANALYSIS { return under_way_ < most; };
    const bool room = mutex_.AwaitWithTimeout(absl::Condition(&has_room), timeout);
    if (room) ++under_way_;
    return room;
  }
  void Begin() {
    absl::MutexLock lock(&mutex_);
    ++under_way_;
  }
  // Waits until nothing is under way, at most `timeout`.
  bool WaitForEnd(absl::Duration timeout) {
    absl::MutexLock lock(&mutex_);
    return mutex_.AwaitWithTimeout(absl::Condition(
                                       +[](Recorder* self) { return self->under_way_ == 0; }, this),
                                   timeout);
  }
  std::int64_t ended() {
    absl::MutexLock lock(&mutex_);
    return static_cast<std::int64_t>(result_.samples.size());
  }
  // The samples, and the time from `started` to the end of the last.
  LoadResult Take(absl::Time started) {
    absl::MutexLock lock(&mutex_);
    result_.seconds = absl::ToDoubleSeconds(last_end_ - started);
    return std::move(result_);
  }

 private:
  absl::Mutex mutex_;
  std::int64_t under_way_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::Time last_end_ ABSL_GUARDED_BY(mutex_) = absl::Now();
  LoadResult result_ ABSL_GUARDED_BY(mutex_);
};

// One request after another, each a call of its own or all on one stream; a stream that breaks is
// opened anew for the next.
class Caller {
 public:
  Caller(InferenceClient& client, bool streaming) : client_(client), streaming_(streaming) {}

  absl::StatusOr<InferResult> Infer(const InferRequest& request) {
    if (!streaming_) return client_.Infer(request);
    if (stream_ == nullptr) stream_ = client_.OpenStream();
    const absl::Status sent = stream_->Send(request);
    absl::StatusOr<InferResult> result = sent.ok() ? stream_->Receive() : sent;
    // Errors in a reply's place leave the stream whole, but cannot be told from its end.
    if (!result.ok()) stream_ = nullptr;
    return result;
  }

 private:
  InferenceClient& client_;
  const bool streaming_;
  std::unique_ptr<InferStream> stream_;
};

void RunClosedLoop(InferenceClient& client, const std::vector<InferRequest>& inputs,
                   const LoadPlan& plan, absl::Time until, Recorder& recorder,
                   const std::function<void()>& report) {
  std::atomic<std::int64_t> next{0};
  std::atomic<int> running{plan.concurrency};
  std::vector<std::thread> threads;
  for (int i = 0; i < plan.concurrency; ++i) {
    threads.emplace_back([&] {
      Caller caller(client, plan.streaming);
      while (absl::Now() < until) {
        const std::int64_t index = next.fetch_add(1);
        if (plan.requests > 0 && index >= plan.requests) break;
        recorder.Begin();
        const absl::Time began = absl::Now();
        const auto result = caller.Infer(inputs[index % inputs.size()]);
        recorder.Record(began, result);
        if (!result.ok()) absl::SleepFor(std::min(kPauseAfterFailure, until - absl::Now()));
      }
      running.fetch_sub(1);
    });
  }
  while (running.load() > 0) {
    report();
    absl::SleepFor(kProgressInterval);
  }
  for (std::thread& thread : threads) thread.join();
}

void RunOpenLoop(InferenceClient& client, const std::vector<InferRequest>& inputs,
                 const LoadPlan& plan, absl::Time until, const std::shared_ptr<Recorder>& recorder,
                 const std::function<void()>& report) {
  const absl::Time started = absl::Now();
  for (std::int64_t index = 0; plan.requests == 0 || index < plan.requests; ++index) {
    const absl::Time due = started + absl::Seconds(static_cast<double>(index) / plan.rate);
    if (due >= until) break;
    for (absl::Time now = absl::Now(); now < due; now = absl::Now()) {
      report();
      absl::SleepFor(std::min(due - now, kProgressInterval));
    }
    // Against a service that falls behind, a request may be due and yet find no room in time.
    bool room = false;
    for (absl::Time now = absl::Now(); !room && now < until; now = absl::Now()) {
      room = recorder->TakeRoom(plan.max_under_way, std::min(until - now, kProgressInterval));
      if (!room) report();
    }
    if (!room) break;
    client.InferAsync(inputs[index % inputs.size()],
                      [recorder, due](const absl::StatusOr<InferResult>& result) {
                        recorder->Record(due, result);
                      });
  }
  while (!recorder->WaitForEnd(kProgressInterval)) report();
}

}  // namespace

LoadResult RunLoad(InferenceClient& client, const std::vector<InferRequest>& inputs,
                   const LoadPlan& plan,
                   const std::function<void(std::int64_t, double)>& progress) {
  const auto recorder = std::make_shared<Recorder>();
  const absl::Time started = absl::Now();
  const absl::Time until = started + plan.duration;
  const auto seconds = [&] { return absl::ToDoubleSeconds(absl::Now() - started); };
  const auto report = [&] { progress(recorder->ended(), seconds()); };
  if (plan.rate > 0) {
    RunOpenLoop(client, inputs, plan, until, recorder, report);
  } else {
    RunClosedLoop(client, inputs, plan, until, *recorder, report);
  }
  return recorder->Take(started);
}

}  // namespace epserve::client
