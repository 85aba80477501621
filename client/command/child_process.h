// One child process of `epserve up`. It dies with its parent, also if the parent is killed with
// SIGKILL: it is started through `epserve run-child`, which asks the kernel for that and then
// becomes the program. Started by posix_spawn, never by fork, which a process with gRPC threads
// does not survive.
//
// Thread safety: one thread, which must be the one that stays: the kernel takes the end of the
// thread that started a child for the end of its parent.
#ifndef EPSERVE_CLIENT_COMMAND_CHILD_PROCESS_H_
#define EPSERVE_CLIENT_COMMAND_CHILD_PROCESS_H_

#include <sys/types.h>

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/cpp/safetensors_file.h"

namespace epserve::client {

// Starts argv[0] with its standard output and error on `output_fd` and its input closed, in a
// process group of its own, so that a Ctrl-C at the terminal reaches the parent alone. Signals that
// the caller blocks are not blocked in the child. Returns its process id.
absl::StatusOr<pid_t> SpawnChild(const std::vector<std::string>& argv, int output_fd);

// The far side: `epserve run-child PARENT_PID PROGRAM ARGUMENTS...`. Does not return if it works;
// returns the exit code otherwise.
int RunChild(int argc, char** argv);
inline constexpr char kRunChildName[] = "run-child";

// The path of the running program.
absl::StatusOr<std::string> OwnProgramPath();

// "exited with code 1", "was killed by signal 9 (Killed)", from waitpid's status.
std::string DescribeExit(int wait_status);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_COMMAND_CHILD_PROCESS_H_
