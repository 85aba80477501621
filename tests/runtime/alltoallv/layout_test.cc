#include "runtime/alltoallv/layout.h"

#include <gtest/gtest.h>

#include "runtime/alltoallv/host_exchange.h"
#include "tests/runtime/alltoallv/exchange_reference.h"

namespace epserve::runtime {
namespace {

TEST(HeapLayoutTest, RegionsAreAlignedLargeEnoughAndDoNotOverlap) {
  for (const int ranks : {1, 3, 64}) {
    for (const std::int64_t tokens : {1, 7, 4096}) {
      for (const std::int64_t hidden : {1, 5, 96, 7168}) {
        for (const int topk : {1, 3, 16}) {
          const HeapLayout layout = MakeHeapLayout(ranks, tokens, hidden, topk, 3, 37);
          const std::uint64_t rows = tokens;
          EXPECT_EQ(layout.arrivals_offset, 0u);
          EXPECT_GE(layout.partials_ready_offset, ranks * sizeof(Arrival));
          EXPECT_GE(layout.counts_offset, layout.partials_ready_offset + sizeof(SharedFlag));
          EXPECT_GE(layout.count_record_bytes,
                    sizeof(CountRecord) + static_cast<std::uint64_t>(ranks + 37) * 4);
          EXPECT_GE(layout.receive_rows_offset,
                    layout.counts_offset + ranks * layout.count_record_bytes);
          EXPECT_GE(layout.local_experts_offset,
                    layout.receive_rows_offset + rows * ReceiveRowStride(hidden, 4));
          EXPECT_GE(layout.weights_offset, layout.local_experts_offset + rows * topk * 4);
          EXPECT_GE(layout.partial_rows_offset, layout.weights_offset + rows * topk * 4);
          EXPECT_GE(layout.slot_bytes, layout.partial_rows_offset + rows * hidden * 4);
          EXPECT_GE(layout.sums_offset, layout.partial_rows_offset + rows * hidden * 2);
          EXPECT_GE(layout.slot_bytes, layout.sums_offset + MaxSumRows(tokens) * hidden * 4);
          EXPECT_GE(layout.heap_bytes, layout.SlotOffset(3));
          for (const std::uint64_t offset :
               {layout.partials_ready_offset, layout.counts_offset, layout.count_record_bytes,
                layout.receive_rows_offset, layout.local_experts_offset, layout.weights_offset,
                layout.partial_rows_offset, layout.slot_bytes, layout.SlotOffset(2)}) {
            EXPECT_EQ(offset % kRegionAlignment, 0u);
          }
        }
      }
    }
  }
}

TEST(HeapLayoutTest, LargestConfigStaysFarFromOverflow) {
  const HeapLayout layout = MakeHeapLayout(64, std::int64_t{1} << 24, std::int64_t{1} << 20, 16, 16,
                                           std::int64_t{1} << 20);
  EXPECT_GT(layout.heap_bytes, std::uint64_t{1} << 50);
  EXPECT_LT(layout.heap_bytes, std::uint64_t{1} << 60);
}

TEST(LayoutDigestTest, EveryFieldThatShapesTheHeapChangesIt) {
  const ExchangeConfig config = TestConfig(4, 10, 64, 96);
  const std::uint64_t digest = LayoutDigest(config);
  EXPECT_EQ(LayoutDigest(config), digest);
  ExchangeConfig other = config;
  other.rank = 3;  // Not the rank: it is one layout for all.
  EXPECT_EQ(LayoutDigest(other), digest);
  other = config;
  other.max_batch_tokens = 65;
  EXPECT_NE(LayoutDigest(other), digest);
  other = config;
  other.hidden = 97;
  EXPECT_NE(LayoutDigest(other), digest);
  other = config;
  other.max_topk = 15;
  EXPECT_NE(LayoutDigest(other), digest);
  other = config;
  other.num_slots = 3;
  EXPECT_NE(LayoutDigest(other), digest);
  other = config;
  other.placement.first_expert[1] += 1;
  EXPECT_NE(LayoutDigest(other), digest);
}

TEST(HeapBytesTest, IsWhatCreateTakes) {
  const ExchangeConfig config = TestConfig(2, 4, 10, 33);
  auto exchange = HostExchange::Create(config);
  ASSERT_TRUE(exchange.ok()) << exchange.status();
  EXPECT_EQ((*exchange)->heap_bytes(), HeapBytes(config));
}

}  // namespace
}  // namespace epserve::runtime
