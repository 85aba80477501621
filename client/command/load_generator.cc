#include "client/command/load_generator.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"

namespace epserve::client {

namespace {

constexpr absl::Duration kProgressInterval = absl::Milliseconds(50);
// A service that refuses at once must not be asked as fast as it refuses, nor before it wants to
// be.
constexpr absl::Duration kPauseAfterFailure = absl::Milliseconds(20);

PhaseTimes PhasesOf(const InferResult& result) {
  static const auto* const names = [] {
    auto* const made = new std::array<std::string, kPhases.size()>;
    for (std::size_t i = 0; i < made->size(); ++i) {
      (*made)[i] = absl::StrCat("epserve_", kPhases[i], "_us");
    }
    return made;
  }();
  PhaseTimes times = NoTimes();
  for (std::size_t i = 0; i < times.size(); ++i) {
    const auto found = result.parameters.find((*names)[i]);
    if (found != result.parameters.end()) times[i] = found->second;
  }
  return times;
}

class Recorder {
 public:
  // A sample of what began at `began` and has ended now.
  void Record(absl::Time began, const absl::Status& status, InferResult* result) {
    const absl::Time now = absl::Now();
    Sample sample;
    sample.request_us = absl::ToDoubleMicroseconds(now - began);
    sample.code = status.code();
    // Steady and wall clock run alike for the length of a request.
    sample.began_us = std::chrono::duration_cast<std::chrono::microseconds>(
                          std::chrono::steady_clock::now().time_since_epoch())
                          .count() -
                      static_cast<std::int64_t>(sample.request_us);
    if (status.ok()) {
      sample.phases_us = PhasesOf(*result);
      if (!result->trace.empty()) {
        sample.trace =
            std::make_unique<Trace>(Trace{std::move(result->parameters), std::move(result->trace)});
      }
    }
    absl::MutexLock lock(&mutex_);
    last_end_ = std::max(last_end_, now);
    if (!status.ok()) {
      result_.first_message.emplace(absl::StatusCodeToString(sample.code),
                                    std::string(status.message()));
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

class ClosedLoop;

// One request after another, each a call of its own or all on one stream; a stream that breaks is
// opened anew for the next. Belongs to whoever starts the next request, one at a time.
class Line {
 public:
  Line(ClosedLoop& loop, InferenceClient& client, bool streaming)
      : loop_(loop), client_(client), streaming_(streaming) {}

  // Ends at ClosedLoop::Ended.
  void Start(const InferRequest& request);

 private:
  void Ended(absl::Time began, absl::StatusOr<InferResult> result);

  ClosedLoop& loop_;
  InferenceClient& client_;
  const bool streaming_;
  std::unique_ptr<AsyncInferStream> stream_;
  TensorBytes spare_;  // the last answer's memory
};

class ClosedLoop {
 public:
  ClosedLoop(InferenceClient& client, const std::vector<InferRequest>& inputs, const LoadPlan& plan,
             absl::Time until, Recorder& recorder)
      : inputs_(inputs), plan_(plan), until_(until), recorder_(recorder), running_(0) {
    for (int i = 0; i < plan.concurrency; ++i) {
      lines_.push_back(std::make_unique<Line>(*this, client, plan.streaming));
    }
  }

  // Until every line is through.
  void Run(const std::function<void()>& report) {
    running_ = static_cast<int>(lines_.size());
    for (const auto& line : lines_) Next(*line);
    absl::Time report_at = absl::Now() + kProgressInterval;
    for (Line* line = nullptr; Await(report_at, &line);) {
      if (line != nullptr) Next(*line);
      if (absl::Now() < report_at) continue;
      report();
      report_at = absl::Now() + kProgressInterval;
    }
  }

  // The line's request has ended: from the client's threads.
  void Ended(Line& line, absl::Time began, const absl::Status& status, InferResult* result) {
    recorder_.Record(began, status, result);
    if (status.ok()) return Next(line);
    const absl::Duration pause =
        std::max(kPauseAfterFailure, RetryPushback(status).value_or(absl::ZeroDuration()));
    absl::MutexLock lock(&mutex_);
    pausing_.emplace(std::min(absl::Now() + pause, until_), &line);
  }

 private:
  // Starts the line's next request, if there is to be one.
  void Next(Line& line) {
    if (absl::Now() < until_) {
      const std::int64_t index = next_.fetch_add(1);
      if (plan_.requests == 0 || index < plan_.requests) {
        recorder_.Begin();
        return line.Start(inputs_[index % inputs_.size()]);
      }
    }
    absl::MutexLock lock(&mutex_);
    --running_;
  }

  // Waits until `report_at` or until a line's pause is over, which is `*line` then, else null.
  // False once every line is through.
  bool Await(absl::Time report_at, Line** line) {
    *line = nullptr;
    absl::MutexLock lock(&mutex_);
    absl::Time wake = report_at;
    const auto has_earlier = [&]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
      return running_ == 0 || (!pausing_.empty() && pausing_.begin()->first < wake);
    };
    while (mutex_.AwaitWithDeadline(absl::Condition(&has_earlier), wake)) {
      if (running_ == 0) return false;
      wake = pausing_.begin()->first;
    }
    if (wake == report_at) return true;
    *line = pausing_.begin()->second;
    pausing_.erase(pausing_.begin());
    return true;
  }

  const std::vector<InferRequest>& inputs_;
  const LoadPlan& plan_;
  const absl::Time until_;
  Recorder& recorder_;
  std::vector<std::unique_ptr<Line>> lines_;
  std::atomic<std::int64_t> next_{0};
  absl::Mutex mutex_;
  int running_ ABSL_GUARDED_BY(mutex_);  // lines that have requests to come
  // After a failure, by when they go on.
  std::multimap<absl::Time, Line*> pausing_ ABSL_GUARDED_BY(mutex_);
};

void Line::Start(const InferRequest& request) {
  const absl::Time began = absl::Now();
  auto done = [this, began](absl::StatusOr<InferResult> result) {
    Ended(began, std::move(result));
  };
  if (!streaming_) {
    client_.InferAsync(request, std::move(done), std::move(spare_));
    return;
  }
  if (stream_ == nullptr) stream_ = client_.OpenAsyncStream();
  const absl::Status sent = stream_->Send(request, std::move(done), std::move(spare_));
  if (!sent.ok()) Ended(began, sent);
}

void Line::Ended(absl::Time began, absl::StatusOr<InferResult> result) {
  // Errors in a reply's place leave the stream whole, but cannot be told from its end.
  if (!result.ok()) {
    stream_ = nullptr;
    return loop_.Ended(*this, began, result.status(), nullptr);
  }
  spare_ = std::move(result->hidden_states.bytes);
  loop_.Ended(*this, began, absl::OkStatus(), &*result);
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
                      [recorder, due](absl::StatusOr<InferResult> result) {
                        recorder->Record(due, result.status(), result.ok() ? &*result : nullptr);
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
    ClosedLoop(client, inputs, plan, until, *recorder).Run(report);
  }
  return recorder->Take(started);
}

}  // namespace epserve::client
