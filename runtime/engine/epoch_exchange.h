// An engine's exchange of the open epoch, which Abort() may reach from any thread at any time: also
// while it is being made, and while batches hold it. Internal to this folder.
#ifndef EPSERVE_RUNTIME_ENGINE_EPOCH_EXCHANGE_H_
#define EPSERVE_RUNTIME_ENGINE_EPOCH_EXCHANGE_H_

#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"

namespace epserve::runtime {

// Thread-safe. `Exchange` has Abort().
template <typename Exchange>
class EpochExchange {
 public:
  // FAILED_PRECONDITION if an epoch is open. `operation` opens the message, here and below.
  absl::Status CheckClosed(const char* operation) const {
    const std::lock_guard lock(mutex_);
    if (exchange_ == nullptr) return absl::OkStatus();
    return absl::FailedPreconditionError(
        absl::StrCat(operation, ": an epoch is open; close it first"));
  }

  // A new epoch is to be opened: an Abort() of the last one is forgotten.
  absl::Status Begin(const char* operation) {
    const std::lock_guard lock(mutex_);
    if (exchange_ != nullptr) {
      return absl::FailedPreconditionError(
          absl::StrCat(operation, ": an epoch is open; close it first"));
    }
    aborted_ = false;
    return absl::OkStatus();
  }

  void Open(std::shared_ptr<Exchange> exchange) {
    const std::lock_guard lock(mutex_);
    if (aborted_) exchange->Abort();  // Abort() came while the exchange was being made.
    exchange_ = std::move(exchange);
  }

  // ABORTED after Abort(); FAILED_PRECONDITION where no epoch is open.
  absl::StatusOr<std::shared_ptr<Exchange>> Get(const char* operation) const {
    const std::lock_guard lock(mutex_);
    if (aborted_) return absl::AbortedError(absl::StrCat(operation, ": the epoch was aborted"));
    if (exchange_ == nullptr) {
      return absl::FailedPreconditionError(absl::StrCat(operation, ": no epoch is open"));
    }
    return exchange_;
  }

  // Whatever is open, aborted or not; null where nothing is.
  std::shared_ptr<Exchange> Peek() const {
    const std::lock_guard lock(mutex_);
    return exchange_;
  }

  // Of what is open, aborted or not; empty where nothing is.
  std::string handle_type() const {
    const std::shared_ptr<Exchange> exchange = Peek();
    return exchange == nullptr ? std::string() : exchange->handle_type();
  }

  void Abort() {
    const std::lock_guard lock(mutex_);
    aborted_ = true;
    if (exchange_ != nullptr) exchange_->Abort();
  }

  // Closes the epoch; null where none is open.
  std::shared_ptr<Exchange> Take() {
    const std::lock_guard lock(mutex_);
    return std::exchange(exchange_, nullptr);
  }

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<Exchange> exchange_;
  bool aborted_ = false;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ENGINE_EPOCH_EXCHANGE_H_
