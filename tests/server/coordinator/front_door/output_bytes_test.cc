#include "server/coordinator/front_door/output_bytes.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <string>
#include <utility>

namespace epserve::coordinator {
namespace {

std::string TextOf(const grpc::Slice& slice) {
  return std::string(reinterpret_cast<const char*>(slice.begin()), slice.size());
}

TEST(OutputBytesTest, OwnBytesBecomeTheSliceWithoutACopy) {
  for (const std::size_t size : {std::size_t{1}, std::size_t{5} << 20}) {
    OutputBytes output(size);
    std::fill(output.mutable_bytes().begin(), output.mutable_bytes().end(), 'x');
    OutputBytes moved = std::move(output);
    EXPECT_EQ(output.size(), 0u);
    const void* const where = moved.bytes().data();
    const grpc::Slice slice = moved.Release();
    EXPECT_EQ(moved.size(), 0u);
    EXPECT_EQ(static_cast<const void*>(slice.begin()), where);
    EXPECT_EQ(TextOf(slice), std::string(size, 'x'));
  }
}

TEST(OutputBytesTest, LentBytesStayWithTheirOwnerUntilTheLastSliceHasGone) {
  auto rows = std::make_shared<const std::string>(100'000, 'r');
  const std::weak_ptr<const std::string> watched = rows;
  OutputBytes output(*rows, rows);
  const void* const where = rows->data();
  rows.reset();
  OutputBytes moved;
  moved = std::move(output);
  EXPECT_EQ(moved.size(), 100'000u);
  auto slice = std::make_unique<grpc::Slice>(moved.Release());
  moved = OutputBytes();
  auto copy = std::make_unique<grpc::Slice>(*slice);
  slice.reset();
  EXPECT_FALSE(watched.expired());
  EXPECT_EQ(static_cast<const void*>(copy->begin()), where);
  EXPECT_EQ(TextOf(*copy), std::string(100'000, 'r'));
  copy.reset();
  EXPECT_TRUE(watched.expired());
}

TEST(OutputBytesTest, LentBytesThatNobodySendsAreLetGo) {
  auto rows = std::make_shared<const std::string>("rows");
  {
    const OutputBytes output(*rows, rows);
    EXPECT_EQ(rows.use_count(), 2);
  }
  EXPECT_EQ(rows.use_count(), 1);
}

}  // namespace
}  // namespace epserve::coordinator
