// A store with a batch of two requests, and one whose workers may have an arena.
#ifndef EPSERVE_TESTS_SERVER_COORDINATOR_BATCH_STORE_FIXTURE_H_
#define EPSERVE_TESTS_SERVER_COORDINATOR_BATCH_STORE_FIXTURE_H_

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/coordinator/batch_store.h"

namespace epserve::coordinator {

inline constexpr std::int64_t kHidden = 2;
inline constexpr int kTopk = 2;

template <typename T>
std::vector<T> Unpack(const std::string& bytes) {
  std::vector<T> values(bytes.size() / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

inline std::string Pack(const std::vector<float>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
}

// Two requests of three rows and one, cut into shards of two rows each.
class BatchStoreTest : public ::testing::Test {
 protected:
  BatchStoreTest() : store_(runtime::EvenPlacement(4, 2), kHidden, kTopk) {
    first_.hidden = first_hidden_bytes_ = Pack({0, 1, 10, 11, 20, 21});
    first_.topk_ids = {0, 1, 2, -1, 3, 3};
    first_.topk_weights = {1, 2, 3, 4, 5, 6};
    second_.hidden = second_hidden_bytes_ = Pack({30, 31});
    second_.topk_ids = {1, 2};
    second_.topk_weights = {7, 8};
    start_.epoch = 5;
    start_.batch = 9;
    start_.slot = 1;
    start_.layer = 3;
    start_.num_tokens = 4;
    start_.requests = {{101, {0, 3}}, {102, {3, 4}}};
    start_.shards = {{0, 11, {0, 2}}, {1, 12, {2, 4}}};
  }

  std::vector<ShardMessage> Start() {
    const ValidatedRequest* requests[] = {&first_, &second_};
    return store_.Start(start_, requests, 1000);
  }

  absl::Status Take(StreamId stream, const std::vector<float>& output, int* rank,
                    BatchId batch = 9) {
    BatchDone done;
    done.stream = stream;
    done.epoch = 5;
    done.batch = batch;
    WorkerTimes times;
    times.ffn_ns = static_cast<std::int64_t>(stream);
    return store_.TakeOutput(done, Pack(output), times, 2000, rank);
  }

  BatchStore store_;
  std::string first_hidden_bytes_;
  std::string second_hidden_bytes_;
  ValidatedRequest first_;
  ValidatedRequest second_;
  StartBatch start_;
};

class BatchStoreArenaTest : public BatchStoreTest {
 protected:
  void SetUp() override {
    runtime::RowArenaSpec spec;
    spec.cluster_id = absl::StrCat("store-test-", ::getpid());
    spec.epoch = 5;
    spec.num_slots = 2;
    spec.max_batch_tokens = 4;
    spec.hidden = kHidden;
    spec.topk = kTopk;
    auto arena = runtime::RowArena::Create(spec);
    ASSERT_TRUE(arena.ok()) << arena.status();
    arena_ = *std::move(arena);
    store_.OpenArena(
        5, std::make_shared<RowBlocks>(arena_, spec.num_slots, std::make_shared<Lender>()));
  }

  // The rows of the batch that was started.
  std::byte* Rows() { return store_.Find(5, 9)->blocks->rows(); }

  std::shared_ptr<runtime::RowArena> arena_;
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_TESTS_SERVER_COORDINATOR_BATCH_STORE_FIXTURE_H_
