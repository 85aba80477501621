// A child program with its stdin and stdout as pipes of lines; killed and reaped when this goes.
// For tests. Thread safety: one thread at a time.
#ifndef EPSERVE_TESTS_RUNTIME_SYMMETRIC_CHILD_PROCESS_H_
#define EPSERVE_TESTS_RUNTIME_SYMMETRIC_CHILD_PROCESS_H_

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "runtime/base/unique_fd.h"

namespace epserve::runtime {

class ChildProcess {
 public:
  ChildProcess(const std::string& program, std::vector<std::string> args) {
    int in[2];
    int out[2];
    if (::pipe2(in, O_CLOEXEC) != 0 || ::pipe2(out, O_CLOEXEC) != 0) return;
    const UniqueFd child_in(in[0]);
    const UniqueFd child_out(out[1]);
    stdin_ = UniqueFd(in[1]);
    stdout_ = UniqueFd(out[0]);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, child_in.get(), STDIN_FILENO);
    posix_spawn_file_actions_adddup2(&actions, child_out.get(), STDOUT_FILENO);
    std::vector<char*> argv = {const_cast<char*>(program.c_str())};
    for (std::string& arg : args) argv.push_back(arg.data());
    argv.push_back(nullptr);
    if (::posix_spawn(&pid_, program.c_str(), &actions, nullptr, argv.data(), environ) != 0) {
      pid_ = -1;
    }
    posix_spawn_file_actions_destroy(&actions);
  }
  ChildProcess(ChildProcess&& other) noexcept
      : pid_(std::exchange(other.pid_, -1)),
        stdin_(std::move(other.stdin_)),
        stdout_(std::move(other.stdout_)) {}
  ChildProcess& operator=(ChildProcess&&) = delete;
  ~ChildProcess() { Kill(); }

  bool started() const { return pid_ > 0; }

  // Empty at the end of the child's output.
  std::string ReadLine() {
    std::string line;
    char c;
    while (::read(stdout_.get(), &c, 1) == 1 && c != '\n') line.push_back(c);
    return line;
  }

  bool WriteLine(std::string line) {
    line.push_back('\n');
    for (std::size_t done = 0; done < line.size();) {
      const ssize_t count = ::write(stdin_.get(), line.data() + done, line.size() - done);
      if (count <= 0) return false;
      done += static_cast<std::size_t>(count);
    }
    return true;
  }

  // SIGKILL, and waits until the process is gone.
  void Kill() {
    if (pid_ <= 0) return;
    ::kill(pid_, SIGKILL);
    Wait();
  }

  // Its exit code, or -1 where a signal ended it.
  int Wait() {
    if (pid_ <= 0) return -1;
    int status = 0;
    ::waitpid(std::exchange(pid_, -1), &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }

 private:
  pid_t pid_ = -1;
  UniqueFd stdin_;
  UniqueFd stdout_;
};

inline std::string ToHex(const std::string& bytes) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string hex;
  for (const char c : bytes) {
    hex.push_back(kDigits[(static_cast<unsigned char>(c) >> 4) & 0xf]);
    hex.push_back(kDigits[static_cast<unsigned char>(c) & 0xf]);
  }
  return hex;
}

inline std::string FromHex(const std::string& hex) {
  const auto digit = [](char c) { return c <= '9' ? c - '0' : c - 'a' + 10; };
  std::string bytes;
  for (std::size_t i = 0; i + 1 < hex.size(); i += 2) {
    bytes.push_back(static_cast<char>(digit(hex[i]) * 16 + digit(hex[i + 1])));
  }
  return bytes;
}

}  // namespace epserve::runtime

#endif  // EPSERVE_TESTS_RUNTIME_SYMMETRIC_CHILD_PROCESS_H_
