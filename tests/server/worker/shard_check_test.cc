#include "server/worker/shard_check.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <string>

#include "absl/strings/str_cat.h"
#include "runtime/symmetric/row_arena.h"

namespace epserve::worker {
namespace {

constexpr std::int64_t kMaxTokens = 64;

class ShardInBlockTest : public testing::Test {
 protected:
  void SetUp() override {
    model_.hidden = 4;
    model_.topk = 1;
    runtime::RowArenaSpec spec;
    spec.cluster_id = absl::StrCat("shard-check-", ::getpid());
    spec.epoch = 1;
    spec.num_slots = 1;
    spec.max_batch_tokens = kMaxTokens;
    spec.hidden = model_.hidden;
    spec.topk = model_.topk;
    auto arena = runtime::RowArena::Create(spec);
    ASSERT_TRUE(arena.ok()) << arena.status();
    arena_ = *std::move(arena);
    shard_.num_tokens = 2;
    shard_.topk = 1;
    shard_.routed = true;
    shard_.in_arena = true;
  }

  absl::Status Check() const {
    return CheckShard(shard_, {.max_batch_tokens = kMaxTokens,
                               .max_shard_tokens = kMaxTokens,
                               .model = &model_,
                               .arena = arena_.get(),
                               .takes_shared_batches = true});
  }
  void ExpectPast(const std::string& bytes) const {
    const absl::Status status = Check();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), testing::HasSubstr(bytes));
  }

  runtime::ModelInfo model_;
  std::shared_ptr<runtime::RowArena> arena_;
  Shard shard_;
};

TEST_F(ShardInBlockTest, RowsOfFourBytesAnElementFillAPairOfBlocks) {
  shard_.first_row = kMaxTokens - 2;
  for (const int block : {0, 2}) {
    shard_.row_block = block;
    EXPECT_TRUE(Check().ok()) << Check();
  }
  for (const int block : {1, 3}) {
    shard_.row_block = block;
    ExpectPast(absl::StrCat("1024 bytes from row_block ", block));
  }
  shard_.dtype = runtime::DataType::kBf16;
  EXPECT_TRUE(Check().ok()) << Check();
}

TEST_F(ShardInBlockTest, AllOfASharedBatchMustBeThere) {
  shard_.row_block = 1;
  shard_.shard_begin = {0, 32};
  EXPECT_TRUE(Check().ok()) << Check();
  shard_.shard_begin = {0, 33};
  ExpectPast("528 bytes from row_block 1");
}

TEST_F(ShardInBlockTest, BlockThatIsNotTheArenasIsRefused) {
  for (const int block : {-1, 4, INT32_MAX, INT32_MIN}) {
    shard_.row_block = block;
    ExpectPast(absl::StrCat("row_block ", block));
  }
}

}  // namespace
}  // namespace epserve::worker
