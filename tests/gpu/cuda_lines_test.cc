// The decode path's lines on the device: lengths and numbers around those of a line, a warp and a
// unit, the same bits as rows give, and waits that give up.
#include "tests/gpu/exchange_fixture.h"

namespace epserve::runtime {
namespace {

// Around a warp's tokens, and as many as go as lines; rows of 56, 60 and 64 elements a line's
// lanes, and of parts of a line.
TEST_F(CudaExchangeTest, DecodeOfLinesOfManyLengthsMatchesReference) {
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

TEST_F(CudaExchangeTest, DecodeOfLinesOfOneRankIsOfItsOwnExperts) {
  Case c;
  c.path = Path::kDecode;
  c.num_ranks = 1;
  c.tokens = {33};
  Run(c, 3, 33);
}

TEST_F(CudaExchangeTest, DecodeOfAsManyLinesAsThereCanBeMatchesReference) {
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

TEST_F(CudaExchangeTest, LinesGiveTheBitsOfRows) {
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

TEST_F(CudaExchangeTest, Fp8LinesGiveTheBitsOfFp8Rows) {
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

TEST_F(CudaExchangeTest, SilentPeerOfFewTokensTimesOutNamingIt) {
  Case c;
  c.num_ranks = 3;
  c.tokens = {4, 4, 4};
  std::mt19937 rng(29);
  std::vector<CudaExchangeConfig> configs;
  std::vector<HostTokens> tokens;
  for (int r = 0; r < c.num_ranks; ++r) {
    configs.push_back(Config(c, r, 1200));
    configs.back().base.peer_timeout = absl::Milliseconds(50);
    tokens.push_back(MakeTokens(c, 4, &rng));
  }
  const auto ranks = OpenAll(configs, num_devices_);
  std::vector<RoundBuffers> buffers(2);
  std::vector<cudaStream_t> streams(2);
  for (int r = 0; r < 2; ++r) {
    ASSERT_EQ(cudaSetDevice(r % num_devices_), cudaSuccess);
    ASSERT_EQ(cudaStreamCreateWithFlags(&streams[r], cudaStreamNonBlocking), cudaSuccess);
    buffers[r].Fill(c, tokens[r], 4);
  }
  for (int r = 0; r < 2; ++r) {
    ASSERT_EQ(cudaSetDevice(r % num_devices_), cudaSuccess);
    ASSERT_TRUE(ranks[r]->Dispatch(Path::kDecode, 0, buffers[r].tokens, nullptr, streams[r]).ok());
  }
  for (int r = 0; r < 2; ++r) {
    ASSERT_EQ(cudaSetDevice(r % num_devices_), cudaSuccess);
    ASSERT_EQ(cudaStreamSynchronize(streams[r]), cudaSuccess);
    const absl::Status status = ranks[r]->CheckWaits();
    EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
    EXPECT_NE(status.message().find("for rank 2"), std::string::npos) << status;
    cudaStreamDestroy(streams[r]);
  }
}

TEST_F(CudaExchangeTest, PeerThatSendsNoSumsAsLinesTimesOutNamingIt) {
  Case c;
  c.num_ranks = 2;
  c.tokens = {4, 4};
  c.one_expert = true;  // The last one, which is rank 1's.
  std::mt19937 rng(39);
  std::vector<CudaExchangeConfig> configs = {Config(c, 0, 1300), Config(c, 1, 1300)};
  for (CudaExchangeConfig& config : configs) config.base.peer_timeout = absl::Milliseconds(500);
  const auto ranks = OpenAll(configs, num_devices_);
  std::vector<RoundBuffers> buffers(2);
  std::vector<cudaStream_t> streams(2);
  for (int r = 0; r < 2; ++r) {
    ASSERT_EQ(cudaSetDevice(r % num_devices_), cudaSuccess);
    ASSERT_EQ(cudaStreamCreateWithFlags(&streams[r], cudaStreamNonBlocking), cudaSuccess);
    buffers[r].Fill(c, MakeTokens(c, 4, &rng), 4);
  }
  for (int r = 0; r < 2; ++r) {
    ASSERT_EQ(cudaSetDevice(r % num_devices_), cudaSuccess);
    ASSERT_TRUE(ranks[r]->Dispatch(Path::kDecode, 0, buffers[r].tokens, nullptr, streams[r]).ok());
  }
  ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
  ASSERT_TRUE(ranks[0]->LayOutExperts(Path::kDecode, 0, streams[0]).ok());
  void* const out = buffers[0].out.as<void>();
  ASSERT_TRUE(ranks[0]->Combine(Path::kDecode, 0, buffers[0].tokens, out, out, streams[0]).ok());
  for (int r = 0; r < 2; ++r) {
    ASSERT_EQ(cudaSetDevice(r % num_devices_), cudaSuccess);
    ASSERT_EQ(cudaStreamSynchronize(streams[r]), cudaSuccess);
    cudaStreamDestroy(streams[r]);
  }
  EXPECT_TRUE(ranks[1]->CheckWaits().ok()) << ranks[1]->CheckWaits();
  const absl::Status status = ranks[0]->CheckWaits();
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
  EXPECT_NE(status.message().find("combine: rank 0"), std::string::npos) << status;
  EXPECT_NE(status.message().find("for rank 1"), std::string::npos) << status;
}

}  // namespace
}  // namespace epserve::runtime
