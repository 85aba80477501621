#include "runtime/symmetric/symmetric_heap.h"

#include <sys/random.h>

#include <cerrno>
#include <cstring>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "runtime/base/id.h"
#include "runtime/base/status.h"

namespace epserve::runtime {
namespace {

constexpr std::uint64_t kHeapMagic = 0x31706165'68737065;  // "epsheap1" in memory.
constexpr std::uint32_t kHeaderVersion = 1;

// The heap's first bytes, and the bytes of its handle.
struct HeapIdentity {
  std::uint64_t magic;
  std::uint32_t version;
  std::uint32_t rank;
  std::uint64_t epoch;
  std::uint64_t bytes;
  std::uint64_t layout_digest;
  std::uint64_t nonce;
  char cluster_id[kMaxIdBytes + 8];  // Zero-padded, at least one zero at the end.
};
static_assert(sizeof(HeapIdentity) == 120);
static_assert(sizeof(HeapIdentity) <= kHeapHeaderBytes);
static_assert(std::has_unique_object_representations_v<HeapIdentity>, "compared bytewise");

std::string SegmentNameOf(const HeapIdentity& identity) {
  return absl::StrCat("/epserve-", identity.cluster_id, "-", identity.epoch, "-", identity.rank,
                      "-", absl::Hex(identity.nonce, absl::kZeroPad16));
}

HeapIdentity IdentityOf(const HeapSpec& spec, std::uint64_t nonce) {
  HeapIdentity identity{};
  identity.magic = kHeapMagic;
  identity.version = kHeaderVersion;
  identity.rank = static_cast<std::uint32_t>(spec.rank);
  identity.epoch = spec.epoch;
  identity.bytes = spec.bytes;
  identity.layout_digest = spec.layout_digest;
  identity.nonce = nonce;
  std::memcpy(identity.cluster_id, spec.cluster_id.data(), spec.cluster_id.size());
  return identity;
}

absl::StatusOr<std::uint64_t> RandomNonce() {
  std::uint64_t nonce = 0;
  if (::getrandom(&nonce, sizeof(nonce), 0) != sizeof(nonce)) {
    return absl::InternalError(absl::StrCat("heap: getrandom failed: ", std::strerror(errno)));
  }
  return nonce;
}

absl::Status ValidateSpec(const HeapSpec& spec) {
  EPS_RETURN_IF_ERROR(ValidateClusterId(spec.cluster_id));
  if (spec.epoch == 0) return absl::InvalidArgumentError("heap: epoch 0 is below 1");
  if (spec.rank < 0) {
    return absl::InvalidArgumentError(absl::StrCat("heap: rank ", spec.rank, " is below 0"));
  }
  if (spec.bytes < kHeapHeaderBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("heap: bytes ", spec.bytes, " is below the header's ", kHeapHeaderBytes));
  }
  return absl::OkStatus();
}

template <typename T>
absl::Status Differs(const char* field, const T& got, const T& expected) {
  return absl::InvalidArgumentError(
      absl::StrCat("heap handle: ", field, " ", got, " is not the expected ", expected));
}

absl::Status CheckIdentity(const HeapIdentity& got, const HeapIdentity& expected) {
  if (got.magic != expected.magic) return Differs("magic", got.magic, expected.magic);
  if (got.version != expected.version) return Differs("version", got.version, expected.version);
  if (std::memcmp(got.cluster_id, expected.cluster_id, sizeof(got.cluster_id)) != 0) {
    // What came may hold anything, so only what was expected is printed.
    return absl::InvalidArgumentError(
        absl::StrCat("heap handle: cluster_id is not the expected ", expected.cluster_id));
  }
  if (got.epoch != expected.epoch) return Differs("epoch", got.epoch, expected.epoch);
  if (got.rank != expected.rank) return Differs("rank", got.rank, expected.rank);
  if (got.bytes != expected.bytes) return Differs("bytes", got.bytes, expected.bytes);
  if (got.layout_digest != expected.layout_digest) {
    return Differs("layout_digest", got.layout_digest, expected.layout_digest);
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ValidateClusterId(const std::string& cluster_id) {
  if (!IsId(cluster_id)) {
    return absl::InvalidArgumentError(
        absl::StrCat("heap: cluster_id of ", cluster_id.size(),
                     " bytes is not 1 to 64 characters of A-Z a-z 0-9 _ . -"));
  }
  return absl::OkStatus();
}

absl::StatusOr<SymmetricHeap> SymmetricHeap::Create(const HeapSpec& spec) {
  EPS_RETURN_IF_ERROR(ValidateSpec(spec));
  // 64 random bits collide with nothing; what repeats is a name reclaimed while it was made.
  constexpr int kAttempts = 8;
  absl::Status last;
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    EPS_ASSIGN_OR_RETURN(const std::uint64_t nonce, RandomNonce());
    const HeapIdentity identity = IdentityOf(spec, nonce);
    auto segment = CreateSegment(SegmentNameOf(identity), spec.bytes);
    if (!segment.ok()) {
      last = segment.status();
      if (absl::IsAlreadyExists(last)) continue;
      return last;
    }
    EPS_ASSIGN_OR_RETURN(Mapping mapping, Mapping::Map(segment->fd, spec.bytes));
    std::memcpy(mapping.data(), &identity, sizeof(identity));
    std::string handle(reinterpret_cast<const char*>(&identity), sizeof(identity));
    return SymmetricHeap(*std::move(segment), std::move(mapping), std::move(handle));
  }
  return last;
}

absl::StatusOr<PeerHeap> PeerHeap::Open(const std::string& handle, const HeapSpec& expected) {
  EPS_RETURN_IF_ERROR(ValidateSpec(expected));
  HeapIdentity got;
  if (handle.size() != sizeof(got)) {
    return Differs("size", handle.size(), sizeof(got));
  }
  std::memcpy(&got, handle.data(), sizeof(got));
  EPS_RETURN_IF_ERROR(CheckIdentity(got, IdentityOf(expected, got.nonce)));
  EPS_ASSIGN_OR_RETURN(const UniqueFd fd, OpenSegment(SegmentNameOf(got), got.bytes));
  EPS_ASSIGN_OR_RETURN(Mapping mapping, Mapping::Map(fd, got.bytes));
  HeapIdentity found;
  std::memcpy(&found, mapping.data(), sizeof(found));
  if (std::memcmp(&found, &got, sizeof(got)) != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("heap handle: the header in ", SegmentNameOf(got), " is not the handle's"));
  }
  return PeerHeap(std::move(mapping));
}

}  // namespace epserve::runtime
