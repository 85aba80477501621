// What the front door's tests share: a small model, a valid request to be spoilt in one place, and
// a shared-memory object that does not outlive its test.
#ifndef EPSERVE_TESTS_SERVER_COORDINATOR_FRONT_DOOR_TEST_REQUEST_H_
#define EPSERVE_TESTS_SERVER_COORDINATOR_FRONT_DOOR_TEST_REQUEST_H_

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/base/unique_fd.h"
#include "server/coordinator/front_door/request_view.h"
#include "server/coordinator/front_door/served_model.h"

namespace epserve::coordinator {

// H 4, E 8, K 2, layers 3..5 and 7, at most 16 tokens, messages of at most 1 MiB.
inline ServedModel TestModel() {
  ServedModel model;
  model.name = "tiny";
  model.hidden = 4;
  model.intermediate = 6;
  model.num_experts = 8;
  model.topk = 2;
  model.layers = {3, 4, 5, 7};
  model.has_router = false;
  model.max_batch_tokens = 16;
  model.max_message_bytes = 1 << 20;
  return model;
}

template <typename T>
std::string BytesOf(const std::vector<T>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

struct TestInput {
  std::string name;
  std::string datatype;
  std::vector<std::int64_t> shape;
  std::vector<ParameterView> parameters;
  TypedKind typed_kind = TypedKind::kNone;
  std::string typed_bytes;
};

// Owns what its view shows; the view is valid until the next change.
struct TestRequest {
  std::string model_name = "tiny";
  std::string model_version;
  std::vector<ParameterView> parameters;
  std::vector<TestInput> inputs;
  std::vector<OutputView> outputs;
  std::vector<std::string> raw;

  RequestView View() const {
    RequestView view;
    view.model_name = model_name;
    view.model_version = model_version;
    view.parameters = parameters;
    for (const TestInput& input : inputs) {
      view.inputs.push_back({input.name, input.datatype, input.shape, input.parameters,
                             input.typed_kind, std::string_view(input.typed_bytes)});
    }
    view.outputs = outputs;
    for (const std::string& bytes : raw) view.raw_contents.emplace_back(std::string_view(bytes));
    return view;
  }
};

// Three tokens, FP32, INT32, raw.
inline TestRequest ValidRequest() {
  TestRequest request;
  request.inputs = {{"hidden_states", "FP32", {3, 4}},
                    {"topk_ids", "INT32", {3, 2}},
                    {"topk_weights", "FP32", {3, 2}}};
  request.raw = {BytesOf(std::vector<float>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}),
                 BytesOf(std::vector<std::int32_t>{0, 7, -1, 3, 5, 5}),
                 BytesOf(std::vector<float>{0.5f, 0.5f, 1, 0, 0.25f, 0.75f})};
  return request;
}

// A POSIX shared-memory object of this process, removed with it.
class ShmObject {
 public:
  explicit ShmObject(std::size_t size_bytes, const std::string& prefix = "front-door-test") {
    static std::atomic<int> next{0};
    key_ = prefix + "-" + std::to_string(::getpid()) + "-" + std::to_string(next.fetch_add(1));
    fd_ = runtime::UniqueFd(::shm_open(("/" + key_).c_str(), O_RDWR | O_CREAT | O_EXCL, 0600));
    EXPECT_TRUE(fd_.valid());
    Truncate(size_bytes);
  }
  ~ShmObject() { ::shm_unlink(("/" + key_).c_str()); }

  const std::string& key() const { return key_; }

  void Truncate(std::size_t size_bytes) {
    EXPECT_EQ(::ftruncate(fd_.get(), static_cast<off_t>(size_bytes)), 0);
  }
  std::size_t size() const {
    struct stat info = {};
    EXPECT_EQ(::fstat(fd_.get(), &info), 0);
    return static_cast<std::size_t>(info.st_size);
  }
  void Write(std::size_t offset, const std::string& bytes) {
    EXPECT_EQ(::pwrite(fd_.get(), bytes.data(), bytes.size(), static_cast<off_t>(offset)),
              static_cast<ssize_t>(bytes.size()));
  }
  std::string Read(std::size_t offset, std::size_t size_bytes) const {
    std::string bytes(size_bytes, '\0');
    EXPECT_EQ(::pread(fd_.get(), bytes.data(), size_bytes, static_cast<off_t>(offset)),
              static_cast<ssize_t>(size_bytes));
    return bytes;
  }

 private:
  std::string key_;
  runtime::UniqueFd fd_;
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_TESTS_SERVER_COORDINATOR_FRONT_DOOR_TEST_REQUEST_H_
