#include "server/coordinator/front_door/infer_statistics.h"

namespace epserve::coordinator {
namespace {

void AddTo(DurationTotal& total, std::int64_t ns) {
  ++total.count;
  total.ns += static_cast<std::uint64_t>(ns);
}

}  // namespace

void InferStatistics::Add(bool succeeded, std::chrono::nanoseconds server_time,
                          const InferTimes& times) {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  const std::lock_guard lock(mutex_);
  if (!succeeded) return AddTo(totals_.fail, server_time.count());
  totals_.last_inference_ms = static_cast<std::uint64_t>(
      std::chrono::duration_cast<std::chrono::milliseconds>(now).count());
  AddTo(totals_.success, server_time.count());
  AddTo(totals_.queue, times.queue_us * 1000);
  AddTo(totals_.compute_input, (times.assign_us + times.dispatch_us) * 1000 + times.counts_ns);
  AddTo(totals_.compute_infer, times.ffn_us * 1000);
  AddTo(totals_.compute_output, times.combine_us * 1000);
}

StatisticsSnapshot InferStatistics::Snapshot() const {
  const std::lock_guard lock(mutex_);
  return totals_;
}

}  // namespace epserve::coordinator
