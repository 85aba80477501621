// The decode path's lines on the device: lengths and numbers around those of a line, a warp and a
// unit, the same bits as rows give, and waits that give up.
#include "runtime/symmetric/nvlink.h"
#include "tests/gpu/exchange_fixture.h"

namespace epserve::runtime {
namespace {

class CudaLinesTest : public CudaExchangeTest {
 protected:
  // Where no lines can be sent, rows would be compared with rows.
  void SetUp() override {
    CudaExchangeTest::SetUp();
    if (IsSkipped()) return;
    Case c;
    c.num_ranks = 1;
    c.tokens = {1};
    const auto exchange = CreateExchange(Config(c, 0, 900));
    ASSERT_TRUE(exchange.ok()) << exchange.status();
    if (!(*exchange)->sends_lines()) {
      GTEST_SKIP() << "no lines can be sent here: " << CheckNvLink();
    }
  }

  // Ranks of which the first two dispatch four tokens each, for waits that give up.
  struct FewTokens {
    std::vector<std::unique_ptr<DeviceExchange>> ranks;
    RoundBuffers buffers[2];
    cudaStream_t streams[2] = {};
  };

  void UseDeviceOf(int rank) { ASSERT_EQ(cudaSetDevice(rank % num_devices_), cudaSuccess); }

  void Dispatch(const Case& c, std::uint64_t epoch, absl::Duration peer_timeout, FewTokens* few) {
    std::mt19937 rng(29);
    std::vector<CudaExchangeConfig> configs;
    for (int r = 0; r < c.num_ranks; ++r) {
      configs.push_back(Config(c, r, epoch));
      configs.back().base.peer_timeout = peer_timeout;
    }
    few->ranks = OpenAll(configs, num_devices_);
    // All of them first: allocating waits for the device, and so for what is dispatched.
    for (int r = 0; r < 2; ++r) {
      UseDeviceOf(r);
      ASSERT_EQ(cudaStreamCreateWithFlags(&few->streams[r], cudaStreamNonBlocking), cudaSuccess);
      few->buffers[r].Fill(c, MakeTokens(c, c.tokens[r], &rng), c.tokens[r]);
    }
    for (int r = 0; r < 2; ++r) {
      UseDeviceOf(r);
      const absl::Status status = few->ranks[r]->Dispatch(Path::kDecode, 0, few->buffers[r].tokens,
                                                          nullptr, few->streams[r]);
      ASSERT_TRUE(status.ok()) << status;
    }
  }

  // Waits for all that the two have enqueued.
  void Finish(const FewTokens& few) {
    for (int r = 0; r < 2; ++r) {
      UseDeviceOf(r);
      EXPECT_EQ(cudaStreamSynchronize(few.streams[r]), cudaSuccess);
      cudaStreamDestroy(few.streams[r]);
    }
  }
};

// Around a warp's tokens, and as many as go as lines; rows of 56, 60 and 64 elements a line's
// lanes, and of parts of a line.
TEST_F(CudaLinesTest, DecodeOfLinesOfManyLengthsMatchesReference) {
  Case c;
  c.path = Path::kDecode;
  c.tokens = {31, 32, 33, 128};
  for (const std::int64_t hidden : {8, 56, 64, 120, 424, 1032, 4352}) {
    c.hidden = hidden;
    Run(c, 5, 31);
  }
  c.dtype = DataType::kFp32;
  c.limit = 1e-5;
  c.topk = 16;
  for (const std::int64_t hidden : {4, 68, 1796}) {
    c.hidden = hidden;
    Run(c, 3, 32);
  }
}

// The widest routing there is, of a published model's sizes and of the shortest row.
TEST_F(CudaLinesTest, DecodeOfLinesOfTopkSixteenOfManyExpertsMatchesReference) {
  Case c = WideCase(Path::kDecode);
  c.tokens = {128, 1, 0, 77};
  for (const std::int64_t hidden : {8, 2048, 7168}) {
    c.hidden = hidden;
    Run(c, 2, 40);
  }
  c.payload = RowPayload::kFp8;
  c.limit = 4e-2;
  for (const std::int64_t hidden : {128, 7168}) {
    c.hidden = hidden;
    Run(c, 2, 41);
  }
}

TEST_F(CudaLinesTest, DecodeOfLinesOfEightRanksMatchesReference) {
  Case c = WideCase(Path::kDecode);
  c.num_ranks = 8;
  if (NoPlaceFor(c.num_ranks)) GTEST_SKIP() << "eight ranks need more GPUs";
  c.tokens = {40, 3, 0, 9, 128, 1, 64, 31};
  Run(c, 3, 42);
  c.payload = RowPayload::kFp8;
  c.limit = 4e-2;
  Run(c, 3, 43);
}

TEST_F(CudaLinesTest, DecodeOfLinesOfOneRankIsOfItsOwnExperts) {
  Case c;
  c.path = Path::kDecode;
  c.num_ranks = 1;
  c.tokens = {33};
  Run(c, 3, 33);
}

TEST_F(CudaLinesTest, DecodeOfAsManyLinesAsThereCanBeMatchesReference) {
  Case c;
  c.path = Path::kDecode;
  c.num_ranks = 2;
  c.line_tokens = kMaxLineTokens;
  c.decode_tokens = kMaxLineTokens;
  c.tokens = {kMaxLineTokens, kMaxLineTokens - 1};
  Run(c, 3, 34);
  c.payload = RowPayload::kFp8;
  c.limit = 4e-2;
  Run(c, 3, 35);
}

TEST_F(CudaLinesTest, LinesGiveTheBitsOfRows) {
  for (const DataType dtype : {DataType::kBf16, DataType::kFp32}) {
    for (const std::vector<std::int64_t>& tokens :
         {std::vector<std::int64_t>{7, 16, 1, 0}, {128, 33, 64, 127}}) {
      Case c;
      c.path = Path::kDecode;
      c.dtype = dtype;
      c.hidden = 1032;
      c.tokens = tokens;
      const auto as_lines = Run(c, 4, 25);
      EXPECT_EQ(Run(c, 4, 25), as_lines);
      c.line_tokens = 0;
      EXPECT_EQ(Run(c, 4, 25), as_lines);
    }
  }
}

TEST_F(CudaLinesTest, Fp8LinesGiveTheBitsOfFp8Rows) {
  Case c;
  c.path = Path::kDecode;
  c.payload = RowPayload::kFp8;
  c.limit = 4e-2;
  c.hidden = 1152;  // 9 groups
  c.tokens = {100, 33, 1, 0};
  const auto as_lines = Run(c, 4, 38);
  c.line_tokens = 0;
  EXPECT_EQ(Run(c, 4, 38), as_lines);
}

TEST_F(CudaLinesTest, SilentPeerOfFewTokensTimesOutNamingIt) {
  Case c;
  c.num_ranks = 3;
  c.tokens = {4, 4, 4};
  FewTokens few;
  ASSERT_NO_FATAL_FAILURE(Dispatch(c, 1200, absl::Milliseconds(50), &few));
  Finish(few);
  for (int r = 0; r < 2; ++r) {
    const absl::Status status = few.ranks[r]->CheckWaits();
    EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
    EXPECT_NE(status.message().find("for rank 2"), std::string::npos) << status;
  }
}

TEST_F(CudaLinesTest, PeerThatSendsNoSumsAsLinesTimesOutNamingIt) {
  Case c;
  c.num_ranks = 2;
  c.tokens = {4, 4};
  c.one_expert = true;  // The last one, which is rank 1's.
  FewTokens few;
  ASSERT_NO_FATAL_FAILURE(Dispatch(c, 1300, absl::Milliseconds(500), &few));
  UseDeviceOf(0);
  ASSERT_TRUE(few.ranks[0]->LayOutExperts(Path::kDecode, 0, few.streams[0]).ok());
  const CudaTokens& tokens = few.buffers[0].tokens;
  void* const out = few.buffers[0].out.as<void>();
  ASSERT_TRUE(few.ranks[0]->Combine(Path::kDecode, 0, tokens, out, out, few.streams[0]).ok());
  Finish(few);
  EXPECT_TRUE(few.ranks[1]->CheckWaits().ok()) << few.ranks[1]->CheckWaits();
  const absl::Status status = few.ranks[0]->CheckWaits();
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
  EXPECT_NE(status.message().find("combine: rank 0"), std::string::npos) << status;
  EXPECT_NE(status.message().find("for rank 1"), std::string::npos) << status;
}

}  // namespace
}  // namespace epserve::runtime
