#include "server/coordinator/process_watch.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/base/status.h"

namespace epserve::coordinator {
namespace {

// A cluster has 64 ranks at most, and some standbys; more processes than this are not workers.
constexpr std::size_t kMaxWatched = 1024;
constexpr std::uint64_t kStopKey = 0;

absl::Status SystemError(const char* call) {
  return absl::ResourceExhaustedError(
      absl::StrCat("watch process: ", call, " failed: ", std::strerror(errno)));
}

absl::Status AddTo(int poll, int fd, std::uint64_t key) {
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = key;
  if (::epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event) != 0) return SystemError("epoll_ctl");
  return absl::OkStatus();
}

}  // namespace

ProcessWatch::ProcessWatch(std::function<void(ProcessEnded)> on_ended, runtime::UniqueFd poll,
                           runtime::UniqueFd stop)
    : on_ended_(std::move(on_ended)), poll_(std::move(poll)), stop_(std::move(stop)) {
  thread_ = std::thread([this] { Run(); });
}

ProcessWatch::~ProcessWatch() { Stop(); }

absl::StatusOr<std::unique_ptr<ProcessWatch>> ProcessWatch::Start(
    std::function<void(ProcessEnded)> on_ended) {
  runtime::UniqueFd poll(::epoll_create1(EPOLL_CLOEXEC));
  if (!poll.valid()) return SystemError("epoll_create1");
  runtime::UniqueFd stop(::eventfd(0, EFD_CLOEXEC));
  if (!stop.valid()) return SystemError("eventfd");
  EPS_RETURN_IF_ERROR(AddTo(poll.get(), stop.get(), kStopKey));
  return std::unique_ptr<ProcessWatch>(
      new ProcessWatch(std::move(on_ended), std::move(poll), std::move(stop)));
}

absl::Status ProcessWatch::Watch(ProcessEnded worker, const server::ProcessIdentity& identity) {
  std::lock_guard<std::mutex> lock(mu_);
  const bool watched = std::any_of(watched_.begin(), watched_.end(), [&](const auto& entry) {
    return entry.second.worker.worker_id == worker.worker_id &&
           entry.second.worker.incarnation == worker.incarnation;
  });
  if (watched) return absl::OkStatus();
  if (watched_.size() >= kMaxWatched) {
    return absl::ResourceExhaustedError(
        absl::StrCat("watch process: ", watched_.size(), " are watched, the most there may be"));
  }
  EPS_ASSIGN_OR_RETURN(runtime::UniqueFd process, server::OpenProcess(identity));
  const std::uint64_t key = ++last_key_;
  const int fd = process.get();
  watched_.emplace(key, Watched{std::move(process), std::move(worker)});
  absl::Status added = AddTo(poll_.get(), fd, key);
  if (!added.ok()) watched_.erase(key);
  return added;
}

void ProcessWatch::Stop() {
  if (!thread_.joinable()) return;
  const std::uint64_t one = 1;
  while (::write(stop_.get(), &one, sizeof(one)) < 0 && errno == EINTR) {
  }
  thread_.join();
}

void ProcessWatch::Run() {
  for (;;) {
    epoll_event event{};
    if (::epoll_wait(poll_.get(), &event, 1, -1) != 1) continue;  // a signal
    if (event.data.u64 == kStopKey) return;
    ProcessEnded ended;
    {
      std::lock_guard<std::mutex> lock(mu_);
      auto watched = watched_.extract(event.data.u64);
      ended = std::move(watched.mapped().worker);
    }  // With its descriptor the process leaves the poll.
    on_ended_(std::move(ended));
  }
}

}  // namespace epserve::coordinator
