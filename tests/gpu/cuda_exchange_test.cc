// The device exchanges against a plain CPU reference.
#include "tests/gpu/exchange_fixture.h"

namespace epserve::runtime {
namespace {

TEST_F(CudaExchangeTest, PrefillBf16MatchesReference) { Run({}, 5, 1); }

TEST_F(CudaExchangeTest, PrefillFp32MatchesReference) {
  Case c;
  c.dtype = DataType::kFp32;
  c.limit = 1e-5;
  c.hidden = 68;  // Rows shorter than a warp's reach.
  Run(c, 3, 2);
}

TEST_F(CudaExchangeTest, PrefillFp16OddTopkMatchesReference) {
  Case c;
  c.dtype = DataType::kFp16;
  c.topk = 3;
  Run(c, 3, 3);
}

TEST_F(CudaExchangeTest, PrefillManyTokensAWarpEachMatchesReference) {
  Case c;
  c.tokens = {1500, 700, 1, 1100};
  c.comm_blocks = 3;
  Run(c, 3, 4);
}

TEST_F(CudaExchangeTest, PrefillOfChunksLongerThanAWarpMatchesReference) {
  Case c;
  c.tokens = {40000, 300, 0, 17001};  // Two or three warps' widths a chunk, and one.
  c.hidden = 64;
  c.topk = 2;
  Run(c, 2, 20);
}

TEST_F(CudaExchangeTest, PrefillOfMoreExpertsThanAreListedMatchesReference) {
  Case c;
  c.experts = 1500;
  c.topk = 6;
  c.tokens = {700, 300, 0, 64};
  Run(c, 2, 21);
}

TEST_F(CudaExchangeTest, PrefillFp8MatchesReferenceWithinItsPrecision) {
  Case c;
  c.payload = RowPayload::kFp8;
  c.limit = 4e-2;
  Run(c, 3, 5);
  c.tokens = {900, 300, 2, 1000};
  Run(c, 2, 6);
}

TEST_F(CudaExchangeTest, DecodeMatchesReferenceOverManyReplays) {
  Case c;
  c.path = Path::kDecode;
  c.tokens = {128, 1, 0, 77};
  Run(c, 7, 7);
  c.payload = RowPayload::kFp8;
  c.limit = 4e-2;
  Run(c, 4, 8);
}

TEST_F(CudaExchangeTest, PrefillFp8OddGroupsOverManyRowsMatchesReference) {
  Case c;
  c.payload = RowPayload::kFp8;
  c.limit = 4e-2;
  c.tokens = {900, 300, 2, 1000};
  for (const std::int64_t hidden : {128, 384, 4224}) {  // 1, 3 and 33 groups: parts of a line
    c.hidden = hidden;
    Run(c, 1, 14);
  }
}

TEST_F(CudaExchangeTest, Fp8GroupsOfZerosAndOfTinyValuesStayFinite) {
  Case c;
  c.payload = RowPayload::kFp8;
  c.odd_groups = true;
  c.limit = 4e-2;
  c.tokens = {900, 3, 0, 64};
  Run(c, 1, 18);
  c.path = Path::kDecode;
  c.tokens = {128, 3, 0, 64};
  Run(c, 1, 19);
}

TEST_F(CudaExchangeTest, PrefillRowsOfManyLengthsMatchReference) {
  Case c;
  for (const std::int64_t hidden : {8, 256, 1032, 7168}) {  // below, at and past a warp's piece
    c.hidden = hidden;
    Run(c, 2, 15);
  }
}

TEST_F(CudaExchangeTest, PrefillRowsOfUnequalPiecesMatchReference) {
  Case c;
  c.dtype = DataType::kFp32;
  c.limit = 1e-5;
  for (const std::int64_t hidden : {1796, 5380}) {  // 449 vectors: two pieces; 1345: four
    c.hidden = hidden;
    Run(c, 2, 17);
  }
}

TEST_F(CudaExchangeTest, PrefillTokensOfOneExpertOrNoneMatchReference) {
  Case c;
  c.topk = 1;
  c.experts = 4;  // A fifth of the tokens has none; of the others some are local, some not.
  c.tokens = {400, 90, 0, 129};
  Run(c, 3, 18);
}

TEST_F(CudaExchangeTest, DecodeWithMoreTokensThanALookMatchesReference) {
  Case c;
  c.path = Path::kDecode;
  c.tokens = {256, 255, 3, 0};
  c.hidden = 4352;  // Rows longer than a block's first pieces.
  Run(c, 3, 16);
}

TEST_F(CudaExchangeTest, DecodeOfFewTokensMatchesReference) {
  Case c;
  c.path = Path::kDecode;
  c.tokens = {1, 16, 0, 5};
  for (const std::int64_t hidden : {16, 4352, 7168}) {  // Below, at and past a warp's pieces.
    c.hidden = hidden;
    Run(c, 5, 21);
  }
  c.dtype = DataType::kFp32;
  c.limit = 1e-5;
  c.topk = 3;
  Run(c, 4, 22);
}

TEST_F(CudaExchangeTest, DecodeOfFewTokensCastToFp8MatchesReference) {
  Case c;
  c.path = Path::kDecode;
  c.payload = RowPayload::kFp8;
  c.odd_groups = true;
  c.limit = 4e-2;
  for (const std::int64_t hidden :
       {384, 896, 4224}) {  // 3, 7 and 33 groups: below, at, past a unit
    c.hidden = hidden;
    c.tokens = {1, 16, 0, 5};
    Run(c, 4, 23);
    c.tokens = {128, 33, 32, 31};
    Run(c, 4, 36);
  }
}

// Few tokens of one round and many of another come in the same area, and from other ranks at once.
TEST_F(CudaExchangeTest, DecodeOfFewAndOfManyTokensInTurnMatchesReference) {
  Case c;
  c.path = Path::kDecode;
  c.line_tokens = 16;
  c.tokens = {1, 100, 0, 16};
  c.later_tokens = {60, 3, 17, 0};
  Run(c, 12, 24);
  c.payload = RowPayload::kFp8;
  c.limit = 4e-2;
  Run(c, 12, 37);
}

// What takes long is not dead: a first use, say, or a peer that is being debugged.
TEST_F(CudaExchangeTest, PeerThatComesLateWithinTheTimeoutIsWaitedFor) {
  Case c;
  c.late = absl::Seconds(3);
  Run(c, 2, 26);
  c.path = Path::kDecode;
  Run(c, 2, 27);
  c.tokens = {4, 1, 0, 16};
  Run(c, 2, 28);
}

TEST_F(CudaExchangeTest, AllTokensOnOneExpertMatchReference) {
  Case c;
  c.one_expert = true;
  Run(c, 2, 9);
}

TEST_F(CudaExchangeTest, OneRankMatchesReference) {
  Case c;
  c.num_ranks = 1;
  c.tokens = {50};
  Run(c, 2, 10);
}

TEST_F(CudaExchangeTest, EightRanksTopkSixteenMatchReference) {
  Case c;
  c.num_ranks = 8;
  if (NoPlaceFor(c.num_ranks)) GTEST_SKIP() << "eight ranks need more GPUs";
  c.tokens = {40, 3, 0, 9, 100, 1, 64, 31};
  c.topk = 16;
  c.experts = 100;
  Run(c, 3, 11);
}

TEST_F(CudaExchangeTest, DecodeOfEightRanksMatchesReference) {
  Case c = WideCase(Path::kDecode);
  c.num_ranks = 8;
  if (NoPlaceFor(c.num_ranks)) GTEST_SKIP() << "eight ranks need more GPUs";
  c.tokens = {40, 3, 0, 9, 200, 1, 64, 131};
  Run(c, 3, 44);
  c.line_tokens = 0;
  Run(c, 3, 45);
  c.payload = RowPayload::kFp8;
  c.limit = 4e-2;
  Run(c, 3, 46);
}

TEST_F(CudaExchangeTest, PrefillOfTopkSixteenOfManyExpertsMatchesReference) {
  Case c = WideCase(Path::kPrefill);
  c.tokens = {300, 64, 0, 129};
  for (const std::int64_t hidden : {8, 2048, 7168}) {
    c.hidden = hidden;
    Run(c, 2, 47);
  }
  c.payload = RowPayload::kFp8;
  c.limit = 4e-2;
  Run(c, 2, 48);
}

// Too many tokens to go as lines, but for one rank's.
TEST_F(CudaExchangeTest, DecodeOfTopkSixteenOfManyExpertsMatchesReference) {
  Case c = WideCase(Path::kDecode);
  c.tokens = {200, 256, 5, 0};
  for (const std::int64_t hidden : {8, 2048, 7168}) {
    c.hidden = hidden;
    Run(c, 2, 49);
  }
  c.payload = RowPayload::kFp8;
  c.limit = 4e-2;
  Run(c, 2, 50);
}

// Rows of any number of 16-byte vectors, and any number of experts, as rows with flags.
TEST_F(CudaExchangeTest, DecodeOfRowsOfManyLengthsMatchesReference) {
  Case c;
  c.path = Path::kDecode;
  c.line_tokens = 0;
  c.tokens = {33, 1, 0, 128};
  for (const std::int64_t hidden : {8, 24, 264, 1032, 5384}) {
    c.hidden = hidden;
    c.topk = hidden == 24 ? 1 : hidden == 264 ? 5 : kMaxTopk;
    Run(c, 2, 51);
  }
  c.dtype = DataType::kFp32;
  c.limit = 1e-5;
  for (const std::int64_t hidden : {4, 1796}) {
    c.hidden = hidden;
    Run(c, 2, 52);
  }
}

TEST_F(CudaExchangeTest, SameInputsGiveSameBits) {
  Case c;
  c.tokens = {500, 300, 0, 129};
  EXPECT_EQ(Run(c, 2, 12), Run(c, 2, 12));
}

// Blocks decide who adds what, and whether a block or a team's ring does; never in what order.
TEST_F(CudaExchangeTest, AnyNumberOfBlocksGivesSameBits) {
  for (const std::int64_t hidden : {512, 7168}) {
    Case c;
    c.hidden = hidden;
    c.tokens = {40, 37, 0, 33};
    const auto many_rows_a_block = Run(c, 2, 19);
    c.push_blocks = 9;
    EXPECT_EQ(Run(c, 2, 19), many_rows_a_block);
    c.push_blocks = 0;
    c.comm_blocks = 1;
    c.reduce_blocks = 1;
    EXPECT_EQ(Run(c, 2, 19), many_rows_a_block);
    c.comm_blocks = 16;
    c.reduce_blocks = 5;
    EXPECT_EQ(Run(c, 2, 19), many_rows_a_block);  // Eight rows a block or fewer.
  }
}

#ifndef EPSERVE_TEST_NCCL
TEST_F(CudaExchangeTest, BatchesWithoutACountMatrixGiveTheBitsOfThoseWithOne) {
  for (const std::vector<std::int64_t>& tokens :
       {std::vector<std::int64_t>{37, 64, 0, 129}, {1, 0, 0, 0}, {300, 300, 299, 299}}) {
    for (const RowPayload payload : {RowPayload::kCopy, RowPayload::kFp8}) {
      Case c;
      c.tokens = tokens;
      c.payload = payload;
      c.limit = payload == RowPayload::kFp8 ? 4e-2 : 1e-2;
      const auto counted = Run(c, 6, 23);
      c.uncounted = true;
      EXPECT_EQ(Run(c, 6, 23), counted);
    }
  }
}
#endif

TEST_F(CudaExchangeTest, DispatchWithoutACountMatrixIsRefusedWhereItIsNotToBeHad) {
  Case c;
  c.num_ranks = 1;
  c.tokens = {4};
  std::mt19937 rng(29);
  RoundBuffers buffers;
  buffers.Fill(c, MakeTokens(c, 4, &rng), 4);
  const auto ranks = OpenAll({Config(c, 0, 2500)}, num_devices_);
  const absl::Status status =
      ranks[0]->Dispatch(Path::kPrefill, 0, buffers.tokens, nullptr, nullptr);
  EXPECT_EQ(status.code(), ranks[0]->dispatches_uncounted() ? absl::StatusCode::kOk
                                                            : absl::StatusCode::kInvalidArgument)
      << status;
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
}

TEST_F(CudaExchangeTest, SilentPeerTimesOutNamingIt) {
  Case c;
  c.num_ranks = 2;
  c.tokens = {4, 4};
  if (NoPlaceFor(c.num_ranks)) GTEST_SKIP() << "two ranks need two GPUs over NCCL";
  std::mt19937 rng(13);
  std::vector<HostTokens> tokens = {MakeTokens(c, 4, &rng), MakeTokens(c, 4, &rng)};
  std::vector<CudaExchangeConfig> configs = {Config(c, 0, 1000), Config(c, 1, 1000)};
  for (CudaExchangeConfig& config : configs) config.base.peer_timeout = absl::Milliseconds(50);
  const auto ranks = OpenAll(configs, num_devices_);
  ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
  RoundBuffers buffers;
  buffers.Fill(c, tokens[0], 4);
  const CountMatrix counts = Counts(c, tokens);
  ASSERT_TRUE(ranks[0]->Dispatch(Path::kPrefill, 0, buffers.tokens, &counts, nullptr).ok());
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  const absl::Status status = ranks[0]->CheckWaits();
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
  EXPECT_NE(status.message().find("dispatch: rank 0"), std::string::npos) << status;
#ifndef EPSERVE_TEST_NCCL  // NCCL does not say which.
  EXPECT_NE(status.message().find("for rank 1"), std::string::npos) << status;
  // What comes behind a wait that gave up has no rows to work on.
  ASSERT_TRUE(ranks[0]->LayOutExperts(Path::kPrefill, 0, nullptr).ok());
  std::vector<std::int32_t> offsets(configs[0].base.placement.num_local_experts(0) + 1, -1);
  ASSERT_EQ(cudaMemcpy(offsets.data(), ranks[0]->expert_offset(Path::kPrefill, 0),
                       offsets.size() * sizeof(offsets[0]), cudaMemcpyDeviceToHost),
            cudaSuccess);
  EXPECT_EQ(offsets, std::vector<std::int32_t>(offsets.size(), 0));
#endif
}

TEST_F(CudaExchangeTest, PeerThatNeverTellsItsCountsTimesOutNamingIt) {
  Case c;
  c.num_ranks = 2;
  c.tokens = {4, 4};
  if (NoPlaceFor(c.num_ranks)) GTEST_SKIP() << "two ranks need two GPUs over NCCL";
  std::mt19937 rng(17);
  const HostTokens tokens = MakeTokens(c, 4, &rng);
  std::vector<CudaExchangeConfig> configs = {Config(c, 0, 1500), Config(c, 1, 1500)};
  for (CudaExchangeConfig& config : configs) config.base.peer_timeout = absl::Milliseconds(50);
  const auto ranks = OpenAll(configs, num_devices_);
  ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
  const auto told =
      ranks[0]->ExchangeCounts(0, 1, ShardCountsOf(c, tokens), absl::Seconds(10), nullptr);
  ASSERT_FALSE(told.ok());
  if (!ranks[0]->exchanges_counts()) {
    EXPECT_EQ(told.status().code(), absl::StatusCode::kUnimplemented) << told.status();
    return;
  }
  EXPECT_EQ(told.status().code(), absl::StatusCode::kDeadlineExceeded) << told.status();
  EXPECT_NE(told.status().message().find("counts: rank 0 waited"), std::string::npos)
      << told.status();
  EXPECT_NE(told.status().message().find("for rank 1"), std::string::npos) << told.status();
  // A batch's number is used once in a slot.
  EXPECT_EQ(ranks[0]
                ->ExchangeCounts(0, 1, ShardCountsOf(c, tokens), absl::Seconds(10), nullptr)
                .status()
                .code(),
            absl::StatusCode::kInvalidArgument);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
}

TEST_F(CudaExchangeTest, AbortEndsADeviceWait) {
  Case c;
  c.num_ranks = 2;
  c.tokens = {4, 4};
  if (NoPlaceFor(c.num_ranks)) GTEST_SKIP() << "two ranks need two GPUs over NCCL";
  std::mt19937 rng(14);
  std::vector<HostTokens> tokens = {MakeTokens(c, 4, &rng), MakeTokens(c, 4, &rng)};
  const auto ranks = OpenAll({Config(c, 0, 2000), Config(c, 1, 2000)}, num_devices_);
  ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
  RoundBuffers buffers;
  buffers.Fill(c, tokens[0], 4);
  const CountMatrix counts = Counts(c, tokens);
  ASSERT_TRUE(ranks[0]->Dispatch(Path::kPrefill, 0, buffers.tokens, &counts, nullptr).ok());
  ranks[0]->Abort();
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_EQ(ranks[0]->CheckWaits().code(), absl::StatusCode::kAborted);
}

TEST_F(CudaExchangeTest, MissingPeerEndsOpenPeersInTime) {
  Case c;
  c.num_ranks = 2;
  c.tokens = {4, 4};
  std::vector<std::unique_ptr<DeviceExchange>> ranks;
  std::vector<std::string> handles;
  for (int r = 0; r < 2; ++r) {
    auto created = CreateExchange(Config(c, r, 3000));
    ASSERT_TRUE(created.ok()) << created.status();
    handles.push_back((*created)->handle());
    ranks.push_back(std::move(created).value());
  }
  ranks[1].reset();
  const absl::Status status = ranks[0]->OpenPeers(handles, absl::Milliseconds(500));
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
}

TEST_F(CudaExchangeTest, HandleOfAnotherEpochIsRefused) {
  Case c;
  c.num_ranks = 2;
  c.tokens = {4, 4};
  auto own = CreateExchange(Config(c, 0, 4000));
  auto other = CreateExchange(Config(c, 1, 4001));
  ASSERT_TRUE(own.ok() && other.ok());
  const std::vector<std::string> handles = {(*own)->handle(), (*other)->handle()};
  const absl::Status status = (*own)->OpenPeers(handles, absl::Milliseconds(500));
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  EXPECT_NE(status.message().find("epoch"), std::string::npos) << status;
}

}  // namespace
}  // namespace epserve::runtime
