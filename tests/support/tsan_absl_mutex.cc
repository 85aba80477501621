// Tells ThreadSanitizer about absl::Mutex and absl::CondVar. Debian's Abseil is not compiled with
// it, and synchronises by atomics that it therefore does not see; gRPC hands our objects from
// thread to thread under such locks. Linked into the test programs of the tsan preset: these
// definitions stand before the library's, for gRPC's calls too, and forward to them.
#include <dlfcn.h>
#include <sanitizer/tsan_interface.h>

#include <cstdlib>

#include "absl/synchronization/mutex.h"

#define EPSERVE_STRINGIFY(text) #text
#define EPSERVE_STRING(text) EPSERVE_STRINGIFY(text)
// The mangled start of what is in Abseil's inline namespace, "_ZN4absl7debian3".
#define EPSERVE_INLINE_NAMESPACE EPSERVE_STRING(ABSL_OPTION_INLINE_NAMESPACE_NAME)

namespace {

// The library's own function behind this program's: `name` is the mangled rest of its name.
template <typename Function>
Function* Next(const char* name) {
  // Strings on the stack, because this may run before any constructor.
  static_assert(sizeof(EPSERVE_INLINE_NAMESPACE) == 8, "the length 7 is part of the mangled name");
  char symbol[256] = "_ZN4absl7" EPSERVE_INLINE_NAMESPACE;
  std::size_t length = sizeof("_ZN4absl7" EPSERVE_INLINE_NAMESPACE) - 1;
  while (*name != '\0' && length + 1 < sizeof(symbol)) symbol[length++] = *name++;
  void* const found = dlsym(RTLD_NEXT, symbol);
  if (found == nullptr) std::abort();
  return reinterpret_cast<Function*>(found);
}

// The mutex that this thread locks, lets go of or waits with: the library evaluates conditions on
// the way, those of other threads that wait, too. Restored, because what a condition calls may lock
// another.
thread_local absl::Mutex* mutex_in_use = nullptr;

class InUse {
 public:
  explicit InUse(absl::Mutex* mutex) : before_(mutex_in_use) { mutex_in_use = mutex; }
  ~InUse() { mutex_in_use = before_; }
  InUse(const InUse&) = delete;
  InUse& operator=(const InUse&) = delete;

 private:
  absl::Mutex* const before_;
};

}  // namespace

namespace absl {
ABSL_NAMESPACE_BEGIN

void Mutex::Lock() {
  static auto* const next = Next<void(Mutex*)>("5Mutex4LockEv");
  next(this);
  __tsan_acquire(this);
}

void Mutex::Unlock() {
  static auto* const next = Next<void(Mutex*)>("5Mutex6UnlockEv");
  __tsan_release(this);
  const InUse in_use(this);
  next(this);
}

bool Mutex::TryLock() {
  static auto* const next = Next<bool(Mutex*)>("5Mutex7TryLockEv");
  const bool locked = next(this);
  if (locked) __tsan_acquire(this);
  return locked;
}

void Mutex::ReaderLock() {
  static auto* const next = Next<void(Mutex*)>("5Mutex10ReaderLockEv");
  next(this);
  __tsan_acquire(this);
}

void Mutex::ReaderUnlock() {
  static auto* const next = Next<void(Mutex*)>("5Mutex12ReaderUnlockEv");
  __tsan_release(this);
  const InUse in_use(this);
  next(this);
}

void Mutex::Await(const Condition& condition) {
  static auto* const next = Next<void(Mutex*, const Condition&)>("5Mutex5AwaitERKNS0_9ConditionE");
  __tsan_release(this);
  const InUse in_use(this);
  next(this, condition);
  __tsan_acquire(this);
}

bool Mutex::AwaitWithTimeout(const Condition& condition, Duration timeout) {
  static auto* const next = Next<bool(Mutex*, const Condition&, Duration)>(
      "5Mutex16AwaitWithTimeoutERKNS0_9ConditionENS0_8DurationE");
  __tsan_release(this);
  const InUse in_use(this);
  const bool met = next(this, condition, timeout);
  __tsan_acquire(this);
  return met;
}

bool Mutex::AwaitWithDeadline(const Condition& condition, Time deadline) {
  static auto* const next = Next<bool(Mutex*, const Condition&, Time)>(
      "5Mutex17AwaitWithDeadlineERKNS0_9ConditionENS0_4TimeE");
  __tsan_release(this);
  const InUse in_use(this);
  const bool met = next(this, condition, deadline);
  __tsan_acquire(this);
  return met;
}

void Mutex::LockWhen(const Condition& condition) {
  static auto* const next =
      Next<void(Mutex*, const Condition&)>("5Mutex8LockWhenERKNS0_9ConditionE");
  const InUse in_use(this);
  next(this, condition);
  __tsan_acquire(this);
}

void CondVar::Wait(Mutex* mutex) {
  static auto* const next = Next<void(CondVar*, Mutex*)>("7CondVar4WaitEPNS0_5MutexE");
  __tsan_release(mutex);
  const InUse in_use(mutex);
  next(this, mutex);
  __tsan_acquire(mutex);
}

bool CondVar::WaitWithTimeout(Mutex* mutex, Duration timeout) {
  static auto* const next = Next<bool(CondVar*, Mutex*, Duration)>(
      "7CondVar15WaitWithTimeoutEPNS0_5MutexENS0_8DurationE");
  __tsan_release(mutex);
  const InUse in_use(mutex);
  const bool timed_out = next(this, mutex, timeout);
  __tsan_acquire(mutex);
  return timed_out;
}

bool CondVar::WaitWithDeadline(Mutex* mutex, Time deadline) {
  static auto* const next =
      Next<bool(CondVar*, Mutex*, Time)>("7CondVar16WaitWithDeadlineEPNS0_5MutexENS0_4TimeE");
  __tsan_release(mutex);
  const InUse in_use(mutex);
  const bool timed_out = next(this, mutex, deadline);
  __tsan_acquire(mutex);
  return timed_out;
}

// Called with the mutex held, by the thread that waits or, for it, by one that lets go of the
// mutex.
bool Condition::Eval() const {
  if (mutex_in_use != nullptr) __tsan_acquire(mutex_in_use);
  const bool met = eval_ == nullptr || (*eval_)(this);
  if (mutex_in_use != nullptr) __tsan_release(mutex_in_use);
  return met;
}

ABSL_NAMESPACE_END
}  // namespace absl
