// Keeps what others can repeat at will from filling the log: each key is let through once a period.
// Thread-safe.
#ifndef EPSERVE_SERVER_COMMON_LOG_LIMIT_H_
#define EPSERVE_SERVER_COMMON_LOG_LIMIT_H_

#include <chrono>
#include <cstddef>
#include <map>
#include <mutex>
#include <string>

namespace epserve::server {

class LogLimit {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;

  static constexpr std::chrono::seconds kPeriod{60};
  // Keys kept; with more within one period, new ones are not let through.
  static constexpr std::size_t kMaxKeys = 1024;

  bool Allows(const std::string& key, TimePoint now = std::chrono::steady_clock::now()) {
    const std::lock_guard lock(mutex_);
    const auto found = last_.find(key);
    if (found != last_.end() && now - found->second < kPeriod) return false;
    if (found == last_.end() && last_.size() >= kMaxKeys) {
      std::erase_if(last_, [now](const auto& entry) { return now - entry.second >= kPeriod; });
      if (last_.size() >= kMaxKeys) return false;
    }
    last_[key] = now;
    return true;
  }

 private:
  std::mutex mutex_;
  std::map<std::string, TimePoint> last_;  // Guarded by mutex_.
};

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_COMMON_LOG_LIMIT_H_
