#include "client/command/undo.h"

#include <system_error>

namespace epserve::client {

Undo::Undo(Interruption* interruption) : interruption_(interruption) {
  if (interruption_ != nullptr) interruption_->SetCleanup([this] { OnInterruption(); });
}

Undo::~Undo() {
  EndCleanup();
  absl::MutexLock lock(&mutex_);
  Remove();
}

void Undo::Keep() {
  EndCleanup();
  absl::MutexLock lock(&mutex_);
  paths_.clear();
}

void Undo::EndCleanup() {
  if (interruption_ != nullptr) interruption_->SetCleanup(nullptr);
}

void Undo::Remove() {
  std::error_code ignored;
  // In the opposite order; a directory that someone else has put something into stays.
  for (auto path = paths_.rbegin(); path != paths_.rend(); ++path) {
    std::filesystem::remove(*path, ignored);
  }
  paths_.clear();
}

void Undo::OnInterruption() {
  // Never unlocked: until the process has ended nothing more is made.
  mutex_.Lock();
  Remove();
}

}  // namespace epserve::client
