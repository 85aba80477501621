// `epserve up` as a process, with stand-ins for the coordinator and the workers.
#include "client/command/up.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <map>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "client/cpp/file_handle.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/client/test_directory.h"

namespace epserve::client {
namespace {

using ::testing::ElementsAre;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr absl::Duration kPatience = absl::Seconds(60);

// Whether the process runs: a dead one that nobody has waited for yet does not.
bool IsAlive(pid_t pid) {
  std::ifstream stat(absl::StrCat("/proc/", pid, "/stat"));
  std::string text;
  std::getline(stat, text);
  const std::size_t name_end = text.rfind(')');
  return name_end != std::string::npos && text[name_end + 2] != 'Z' && text[name_end + 2] != 'X';
}

template <typename Condition>
bool Eventually(Condition condition) {
  for (const absl::Time end = absl::Now() + kPatience; absl::Now() < end;) {
    if (condition()) return true;
    absl::SleepFor(absl::Milliseconds(5));
  }
  return false;
}

class UpTest : public ::testing::Test {
 protected:
  UpTest() {
    std::filesystem::create_symlink(EPSERVE_TEST_CHILD, directory_.File("epserve-coordinator"));
    std::filesystem::create_symlink(EPSERVE_TEST_CHILD, directory_.File("epserve-worker"));
  }
  ~UpTest() override {
    if (pid_ > 0) {
      kill(pid_, SIGKILL);
      waitpid(pid_, nullptr, 0);
    }
  }

  void Start(const std::vector<std::string>& more = {}) {
    std::vector<std::string> words = {EPSERVE_COMMAND,
                                      "up",
                                      "--checkpoint=" + directory_.path(),
                                      "--program-dir=" + directory_.path(),
                                      "--workers=2",
                                      "--listen=127.0.0.1:0",
                                      "--metrics-listen=127.0.0.1:0",
                                      "--ready-file=" + directory_.File(ready_file_)};
    words.insert(words.end(), more.begin(), more.end());
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    argv.push_back(nullptr);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    const int flags = O_WRONLY | O_CREAT | O_APPEND;
    if (output_fd_ >= 0) {
      posix_spawn_file_actions_adddup2(&actions, output_fd_, 1);
      posix_spawn_file_actions_adddup2(&actions, output_fd_, 2);
    } else {
      posix_spawn_file_actions_addopen(&actions, 1, directory_.File("out").c_str(), flags, 0644);
      posix_spawn_file_actions_addopen(&actions, 2, directory_.File("err").c_str(), flags, 0644);
    }
    ASSERT_EQ(posix_spawn(&pid_, EPSERVE_COMMAND, &actions, nullptr, argv.data(), environ), 0);
    posix_spawn_file_actions_destroy(&actions);
  }

  // The stand-in coordinator is ready at once; the stand-in workers may still be starting.
  bool WaitReady() {
    return Eventually([&] {
      return std::filesystem::exists(directory_.File("ready")) &&
             directory_.Read("err").find("worker-0 has started") != std::string::npos &&
             directory_.Read("err").find("worker-1 has started") != std::string::npos;
    });
  }
  bool WaitReadyWithLogFiles() {
    return Eventually([&] { return std::filesystem::exists(directory_.File("ready")); });
  }
  std::map<std::string, std::string> ReadyFile() {
    std::map<std::string, std::string> values;
    std::istringstream lines(directory_.Read(ready_file_));
    for (std::string line; std::getline(lines, line);) {
      values.insert(
          std::pair<std::string, std::string>(absl::StrSplit(line, absl::MaxSplits('=', 1))));
    }
    return values;
  }
  pid_t Pid(const std::string& name) { return std::atoi(ReadyFile()[name + "_pid"].c_str()); }
  // The exit code, or minus the signal.
  int Wait() {
    int status = 0;
    waitpid(pid_, &status, 0);
    pid_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }
  std::vector<std::string> Lines(const std::string& file) {
    std::vector<std::string> lines = absl::StrSplit(directory_.Read(file), '\n', absl::SkipEmpty());
    return lines;
  }

  TestDirectory directory_;
  std::string ready_file_ = "ready";
  int output_fd_ = -1;  // -1: to the files out and err
  pid_t pid_ = -1;
};

TEST_F(UpTest, ReadyIsSaidAndSigtermStopsTheCoordinatorBeforeTheWorkers) {
  Start({"--max-batch-tokens=77"});
  ASSERT_TRUE(WaitReady()) << directory_.Read("err");
  auto ready = ReadyFile();
  EXPECT_THAT(directory_.Read("out"), HasSubstr("ready in"));
  EXPECT_THAT(directory_.Read("out"), HasSubstr(ready["grpc"]));
  EXPECT_THAT(ready["grpc"], Not(HasSubstr(":0")));
  EXPECT_THAT(directory_.Read("err"), HasSubstr("worker-1    │ worker-1 has started"));
  const std::vector<pid_t> children = {Pid("coordinator"), Pid("worker_0"), Pid("worker_1")};
  for (const pid_t child : children) EXPECT_TRUE(IsAlive(child));
  EXPECT_THAT(directory_.Read("started-worker-0"), HasSubstr("--coordinator=" + ready["grpc"]));
  EXPECT_THAT(directory_.Read("started-worker-0"), HasSubstr("--max-batch-tokens=77"));
  kill(pid_, SIGTERM);
  EXPECT_EQ(Wait(), 0);
  for (const pid_t child : children) EXPECT_FALSE(IsAlive(child));
  const auto stopped = Lines("stopped");
  ASSERT_EQ(stopped.size(), 3u);
  EXPECT_EQ(stopped[0], "coordinator");
  EXPECT_FALSE(std::filesystem::exists(directory_.File("ready")));
}

TEST_F(UpTest, FullPipeThatNobodyReadsHoldsUpNothing) {
  int ends[2];
  ASSERT_EQ(pipe2(ends, O_CLOEXEC), 0);
  const FileHandle unread(ends[0]);
  const FileHandle full(ends[1]);
  ASSERT_EQ(fcntl(full.get(), F_SETFL, O_NONBLOCK), 0);
  const std::string noise(4096, 'x');
  while (write(full.get(), noise.data(), noise.size()) > 0) {
  }
  ASSERT_EQ(fcntl(full.get(), F_SETFL, 0), 0);  // As `up` is given it: writes would wait.
  output_fd_ = full.get();
  Start();
  ASSERT_TRUE(WaitReadyWithLogFiles());
  const pid_t worker = Pid("worker_0");
  kill(worker, SIGKILL);
  EXPECT_TRUE(Eventually([&] {
    const pid_t now = Pid("worker_0");
    return now > 0 && now != worker;
  })) << "it is not restarted";
  kill(pid_, SIGTERM);
  int status = 0;
  EXPECT_TRUE(Eventually([&] { return waitpid(pid_, &status, WNOHANG) == pid_; }));
  EXPECT_EQ(status, 0);
  pid_ = -1;
}

TEST_F(UpTest, WithLogFilesTheLastLinesOfAChildThatFailedAreTold) {
  Start({"--log-dir=" + directory_.File("logs")});
  ASSERT_TRUE(WaitReadyWithLogFiles()) << directory_.Read("err");
  directory_.Write("refuse-worker-0", "");
  kill(Pid("worker_0"), SIGKILL);
  EXPECT_TRUE(Eventually([&] {
    return directory_.Read("err").find("worker-0 │ worker-0 refuses: the checkpoint is damaged") !=
           std::string::npos;
  })) << directory_.Read("err");
  EXPECT_THAT(directory_.Read("err"), HasSubstr("logs/worker-0.log"));
  kill(pid_, SIGTERM);
  EXPECT_EQ(Wait(), 0);
}

TEST_F(UpTest, JsonLogsAreJsonLineByLine) {
  Start({"--log-format=json"});
  ASSERT_TRUE(Eventually([&] { return std::filesystem::exists(directory_.File("ready")); }));
  kill(pid_, SIGTERM);
  EXPECT_EQ(Wait(), 0);
  int own = 0;
  for (const std::string& line : Lines("err")) {
    if (line.find("worker-") == 0 || line.find("coordinator") == 0) continue;  // the stand-ins'
    EXPECT_EQ(line.substr(0, 8), "{\"time\":") << line;
    EXPECT_THAT(line, EndsWith("}"));
    ++own;
  }
  EXPECT_GT(own, 0);
}

TEST_F(UpTest, ChildrenDieWithAParentThatIsKilled) {
  Start();
  ASSERT_TRUE(WaitReady()) << directory_.Read("err");
  const std::vector<pid_t> children = {Pid("coordinator"), Pid("worker_0"), Pid("worker_1")};
  kill(pid_, SIGKILL);
  EXPECT_EQ(Wait(), -SIGKILL);
  for (const pid_t child : children) {
    EXPECT_TRUE(Eventually([&] { return !IsAlive(child); })) << child;
  }
}

TEST_F(UpTest, CrashedWorkerIsRestartedAndNobodyElse) {
  Start();
  ASSERT_TRUE(WaitReady()) << directory_.Read("err");
  const pid_t crashed = Pid("worker_1");
  kill(crashed, SIGKILL);
  EXPECT_TRUE(Eventually([&] { return Lines("started-worker-1").size() == 2; }));
  EXPECT_TRUE(Eventually([&] { return Pid("worker_1") > 0 && Pid("worker_1") != crashed; }));
  EXPECT_EQ(Lines("started-worker-0").size(), 1u);
  EXPECT_EQ(Lines("started-coordinator").size(), 1u);
  EXPECT_THAT(directory_.Read("err"), HasSubstr("worker-1 was killed by signal 9"));
  kill(pid_, SIGTERM);
  EXPECT_EQ(Wait(), 0);
}

TEST_F(UpTest, ReadyFileThatCannotBeWrittenStartsNoChildTwice) {
  std::filesystem::create_directory(directory_.File("run"));
  ready_file_ = "run/ready";
  Start();
  ASSERT_TRUE(Eventually([&] { return std::filesystem::exists(directory_.File(ready_file_)); }));
  ASSERT_TRUE(Eventually([&] { return Lines("started-worker-1").size() == 1; }));
  const pid_t crashed = Pid("worker_1");
  std::filesystem::rename(directory_.File("run"), directory_.File("away"));
  kill(crashed, SIGKILL);
  EXPECT_TRUE(Eventually([&] {
    return directory_.Read("err").find("/run/ready': No such file") != std::string::npos;
  })) << directory_.Read("err");
  std::filesystem::rename(directory_.File("away"), directory_.File("run"));
  EXPECT_TRUE(Eventually([&] { return Pid("worker_1") > 0 && Pid("worker_1") != crashed; }));
  // The one that is in the file is the second in all: nobody was started beside it.
  const std::string restarted = absl::StrCat(Pid("worker_1"), " ");
  EXPECT_TRUE(Eventually([&] { return Lines("started-worker-1").back().find(restarted) == 0; }));
  EXPECT_EQ(Lines("started-worker-1").size(), 2u);
  kill(pid_, SIGTERM);
  EXPECT_EQ(Wait(), 0);
  EXPECT_THAT(directory_.Read("err"), HasSubstr("--ready-file: up to date again"));
}

TEST_F(UpTest, CrashedCoordinatorComesBackAtTheSameAddress) {
  Start();
  ASSERT_TRUE(WaitReady()) << directory_.Read("err");
  const std::string address = ReadyFile()["grpc"];
  kill(Pid("coordinator"), SIGKILL);
  EXPECT_TRUE(Eventually([&] { return Lines("started-coordinator").size() == 2; }));
  EXPECT_THAT(Lines("started-coordinator")[1], HasSubstr("--listen=" + address));
  EXPECT_EQ(Lines("started-worker-0").size(), 1u);
  kill(pid_, SIGTERM);
  EXPECT_EQ(Wait(), 0);
}

TEST_F(UpTest, WorkerThatLeavesOnPurposeIsNotRestarted) {
  Start();
  ASSERT_TRUE(WaitReady()) << directory_.Read("err");
  kill(Pid("worker_0"), SIGTERM);
  EXPECT_TRUE(Eventually(
      [&] { return directory_.Read("err").find("left on purpose") != std::string::npos; }));
  EXPECT_EQ(Lines("started-worker-0").size(), 1u);
  kill(pid_, SIGINT);
  EXPECT_EQ(Wait(), 0);
}

TEST_F(UpTest, NoRestartLeavesACrashedWorkerDown) {
  Start({"--no-restart"});
  ASSERT_TRUE(WaitReady()) << directory_.Read("err");
  kill(Pid("worker_0"), SIGKILL);
  EXPECT_TRUE(Eventually(
      [&] { return directory_.Read("err").find("not restarted") != std::string::npos; }));
  EXPECT_EQ(Lines("started-worker-0").size(), 1u);
  kill(pid_, SIGTERM);
  EXPECT_EQ(Wait(), 0);
}

TEST_F(UpTest, CoordinatorThatRefusesEndsEverythingWithItsMessage) {
  directory_.Write("refuse-coordinator", "");
  Start();
  EXPECT_EQ(Wait(), 1);
  EXPECT_THAT(directory_.Read("err"), HasSubstr("coordinator exited with code 3"));
  EXPECT_THAT(directory_.Read("err"), HasSubstr("coordinator refuses: the checkpoint is damaged"));
  EXPECT_FALSE(std::filesystem::exists(directory_.File("started-worker-0")));
}

TEST_F(UpTest, LogDirectoryTakesTheChildrensLines) {
  Start({"--log-dir=" + directory_.File("logs")});
  ASSERT_TRUE(WaitReadyWithLogFiles()) << directory_.Read("err");
  EXPECT_TRUE(
      Eventually([&] { return directory_.Read("logs/worker-1.log") == "worker-1 has started\n"; }));
  EXPECT_THAT(directory_.Read("err"), Not(HasSubstr("has started")));
  kill(pid_, SIGTERM);
  EXPECT_EQ(Wait(), 0);
}

TEST_F(UpTest, RefusalInALogFileIsStillShown) {
  directory_.Write("refuse-coordinator", "");
  Start({"--log-dir=" + directory_.File("logs")});
  EXPECT_EQ(Wait(), 1);
  EXPECT_THAT(directory_.Read("err"), HasSubstr("coordinator refuses: the checkpoint is damaged"));
}

TEST_F(UpTest, MissingProgramIsSaidBeforeAnythingStarts) {
  std::filesystem::remove(directory_.File("epserve-worker"));
  Start();
  EXPECT_EQ(Wait(), 1);
  EXPECT_THAT(directory_.Read("err"), HasSubstr("epserve-worker"));
  EXPECT_THAT(directory_.Read("err"), EndsWith("--program-dir\n"));
  EXPECT_FALSE(std::filesystem::exists(directory_.File("started-coordinator")));
}

TEST_F(UpTest, ReadyFileThatCannotBeWrittenIsSaidBeforeAnythingStarts) {
  std::filesystem::create_directory(directory_.File("directory"));
  std::filesystem::create_symlink("ready", directory_.File("link"));
  for (const char* path : {"no/such/ready", "directory", "link"}) {
    ready_file_ = path;
    Start();
    EXPECT_EQ(Wait(), 1);
    EXPECT_THAT(directory_.Read("err"), HasSubstr("--ready-file '" + directory_.File(path)));
    EXPECT_FALSE(std::filesystem::exists(directory_.File("started-coordinator"))) << path;
  }
}

TEST_F(UpTest, ScratchDirectoryThatCannotBeMadeIsSaidWithWhereToSetIt) {
  const char* const before = getenv("TMPDIR");
  const std::string kept = before != nullptr ? before : "";
  setenv("TMPDIR", directory_.File("missing").c_str(), 1);
  Start();
  before != nullptr ? setenv("TMPDIR", kept.c_str(), 1) : unsetenv("TMPDIR");
  EXPECT_EQ(Wait(), 1);
  EXPECT_THAT(directory_.Read("err"), HasSubstr("FAILED_PRECONDITION"));
  EXPECT_THAT(directory_.Read("err"), HasSubstr(directory_.File("missing") + "': No such file"));
  EXPECT_THAT(directory_.Read("err"), HasSubstr("set TMPDIR to"));
}

TEST_F(UpTest, LogDirectoryThatCannotBeWrittenIsSaidBeforeAnythingStarts) {
  directory_.Write("file", "");
  for (const char* path : {"no/such", "file"}) {
    Start({"--log-dir=" + directory_.File(path)});
    EXPECT_EQ(Wait(), 1);
    EXPECT_THAT(directory_.Read("err"), HasSubstr("--log-dir '" + directory_.File(path)));
    EXPECT_FALSE(std::filesystem::exists(directory_.File("started-coordinator"))) << path;
  }
}

TEST(AddressTest, ReachableAddressIsThatOfAClientOnThisMachine) {
  EXPECT_EQ(ReachableAddress("127.0.0.1:0", 77), "127.0.0.1:77");
  EXPECT_EQ(ReachableAddress("0.0.0.0:8001", 8001), "127.0.0.1:8001");
  EXPECT_EQ(ReachableAddress("[::]:0", 5), "[::1]:5");
  EXPECT_EQ(ReachableAddress("unix:/tmp/s", 1), "unix:/tmp/s");
  EXPECT_EQ(WithPort("[::1]:0", 9), "[::1]:9");
}

}  // namespace
}  // namespace epserve::client
