// A directory for one test, removed with what is in it.
#ifndef EPSERVE_TESTS_CLIENT_TEST_DIRECTORY_H_
#define EPSERVE_TESTS_CLIENT_TEST_DIRECTORY_H_

#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

namespace epserve::client {

class TestDirectory {
 public:
  TestDirectory() : path_(std::filesystem::temp_directory_path() / "epserve-test-XXXXXX") {
    if (mkdtemp(path_.data()) == nullptr) abort();
  }
  ~TestDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TestDirectory(const TestDirectory&) = delete;
  TestDirectory& operator=(const TestDirectory&) = delete;

  const std::string& path() const { return path_; }
  std::string File(const std::string& name) const { return path_ + "/" + name; }

  void Write(const std::string& name, const std::string& text) const {
    std::ofstream(File(name), std::ios::binary | std::ios::trunc) << text;
  }
  std::string Read(const std::string& name) const {
    std::ifstream file(File(name), std::ios::binary);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  }

 private:
  std::string path_;
};

}  // namespace epserve::client

#endif  // EPSERVE_TESTS_CLIENT_TEST_DIRECTORY_H_
