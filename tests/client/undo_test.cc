#include "client/command/undo.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>

#include "tests/client/test_directory.h"

namespace epserve::client {
namespace {

void MakeFile(Undo* undo, const TestDirectory& directory, const std::string& name) {
  Undo::Step step(undo);
  directory.Write(name, "text");
  step.Made(directory.File(name));
}

TEST(UndoTest, WhatWasMadeGoesInTheOppositeOrder) {
  const TestDirectory directory;
  {
    Undo undo(nullptr);
    {
      Undo::Step step(&undo);
      std::filesystem::create_directory(directory.File("made"));
      step.Made(directory.File("made"));
    }
    MakeFile(&undo, directory, "made/file");
  }
  EXPECT_TRUE(std::filesystem::is_empty(directory.path()));
}

TEST(UndoTest, DirectoryThatSomebodyElseUsesStays) {
  const TestDirectory directory;
  {
    Undo undo(nullptr);
    Undo::Step step(&undo);
    std::filesystem::create_directory(directory.File("made"));
    step.Made(directory.File("made"));
    directory.Write("made/of another", "text");
  }
  EXPECT_EQ(directory.Read("made/of another"), "text");
}

TEST(UndoTest, WhatIsKeptStays) {
  const TestDirectory directory;
  {
    Undo undo(nullptr);
    MakeFile(&undo, directory, "file");
    undo.Keep();
  }
  EXPECT_EQ(directory.Read("file"), "text");
}

// The signal that ends a process which does `work` with files in the same directory.
template <typename Work>
int SignalThatEnds(Work work) {
  constexpr unsigned kPatienceS = 10;
  const pid_t pid = fork();
  if (pid == 0) {
    alarm(kPatienceS);
    const auto interruption = Interruption::Create().value();
    Undo undo(interruption.get());
    work(&undo);
    while (true) pause();
  }
  int status = 0;
  EXPECT_EQ(waitpid(pid, &status, 0), pid);
  return WIFSIGNALED(status) ? WTERMSIG(status) : 0;
}

TEST(UndoTest, SignalUndoesAndNothingIsMadeAfterIt) {
  const TestDirectory directory;
  EXPECT_EQ(SignalThatEnds([&](Undo* undo) {
              MakeFile(undo, directory, "before");
              kill(getpid(), SIGTERM);
              while (true) MakeFile(undo, directory, "meanwhile");
            }),
            SIGTERM);
  EXPECT_TRUE(std::filesystem::is_empty(directory.path()));
}

TEST(UndoTest, SignalAfterKeepUndoesNothing) {
  const TestDirectory directory;
  EXPECT_EQ(SignalThatEnds([&](Undo* undo) {
              MakeFile(undo, directory, "file");
              undo->Keep();
              kill(getpid(), SIGTERM);
            }),
            SIGTERM);
  EXPECT_EQ(directory.Read("file"), "text");
}

}  // namespace
}  // namespace epserve::client
