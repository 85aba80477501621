// Handles of GPU heaps: what goes in comes out, and nothing else is believed.
#include "runtime/symmetric/cuda_heap_handle.h"

#include <gtest/gtest.h>

#include <string>

namespace epserve::runtime {
namespace {

CudaHeapHandle Example() {
  constexpr char kSecret[] = "\0secret\xff with a zero";
  CudaHeapHandle handle;
  handle.rank = 3;
  handle.epoch = 77;
  handle.bytes = std::uint64_t{5} << 30;
  handle.layout_digest = 0x0123456789abcdefu;
  handle.address = "@epserve-cluster-77-3";
  handle.secret = std::string(kSecret, sizeof(kSecret) - 1);
  handle.fabric[5] = std::byte{9};
  return handle;
}

TEST(CudaHeapHandleTest, DecodedHandleIsTheEncodedOne) {
  const CudaHeapHandle handle = Example();
  const auto encoded = EncodeHandle(handle);
  ASSERT_TRUE(encoded.ok()) << encoded.status();
  const auto decoded = DecodeHandle(*encoded);
  ASSERT_TRUE(decoded.ok()) << decoded.status();
  EXPECT_EQ(decoded->type, handle.type);
  EXPECT_EQ(decoded->rank, handle.rank);
  EXPECT_EQ(decoded->epoch, handle.epoch);
  EXPECT_EQ(decoded->bytes, handle.bytes);
  EXPECT_EQ(decoded->layout_digest, handle.layout_digest);
  EXPECT_EQ(decoded->address, handle.address);
  EXPECT_EQ(decoded->secret, handle.secret);
  EXPECT_EQ(decoded->fabric, handle.fabric);
  EXPECT_TRUE(CheckHandle(*decoded, 3, handle).ok());
}

TEST(CudaHeapHandleTest, BytesOfAnotherKindAreRefused) {
  std::string encoded = *EncodeHandle(Example());
  EXPECT_EQ(DecodeHandle("").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(DecodeHandle(encoded.substr(1)).status().code(), absl::StatusCode::kInvalidArgument);
  for (const std::size_t damaged : {0u, 8u}) {  // magic, type
    std::string other = encoded;
    other[damaged] = '\x7f';
    EXPECT_EQ(DecodeHandle(other).status().code(), absl::StatusCode::kInvalidArgument) << damaged;
  }
  encoded[40 + 3] = '\x7f';  // The length of the address becomes huge.
  const absl::Status huge = DecodeHandle(encoded).status();
  EXPECT_EQ(huge.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(huge.message().find("address of"), std::string::npos) << huge;
}

TEST(CudaHeapHandleTest, HandleThatIsNotThePeersNamesTheField) {
  const CudaHeapHandle own = Example();
  const auto expect = [&](void (*change)(CudaHeapHandle&), const std::string& field) {
    CudaHeapHandle peer = Example();
    change(peer);
    const absl::Status status = CheckHandle(peer, 3, own);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_NE(status.message().find(field), std::string::npos) << status;
  };
  expect([](CudaHeapHandle& h) { h.rank = 2; }, "rank 2 is not the expected 3");
  expect([](CudaHeapHandle& h) { h.epoch = 76; }, "epoch 76 is not the expected 77");
  expect([](CudaHeapHandle& h) { h.bytes = 1; }, "bytes 1");
  expect([](CudaHeapHandle& h) { h.layout_digest = 1; }, "layout_digest 1");
}

TEST(CudaHeapHandleTest, AddressTooLongForASocketIsRefused) {
  CudaHeapHandle handle = Example();
  handle.address.assign(109, 'a');
  EXPECT_EQ(EncodeHandle(handle).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(CudaHeapHandleTest, SecretsDiffer) {
  const auto one = RandomSecret();
  const auto other = RandomSecret();
  ASSERT_TRUE(one.ok() && other.ok());
  EXPECT_EQ(one->size(), 32u);
  EXPECT_NE(*one, *other);
}

}  // namespace
}  // namespace epserve::runtime
