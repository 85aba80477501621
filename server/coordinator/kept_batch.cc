#include "server/coordinator/kept_batch.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "runtime/base/status.h"
#include "server/coordinator/front_door/shm_registry.h"

namespace epserve::coordinator {
namespace {

// Outputs of fewer bytes are copied, which takes no more than a fifth of a millisecond: blocks that
// are lent are too few to be kept for them.
constexpr std::int64_t kLentBytes = 1 << 20;

const char* RowsInArena(const KeptBatch& batch) {
  return reinterpret_cast<const char*>(batch.blocks->rows());
}

// Calls use(rank, offset among the rows, bytes) for what each rank has of the rows; INTERNAL where
// some are missing.
template <typename Use>
absl::Status ForEachPiece(const KeptBatch& batch, runtime::RowRange rows, const Use& use) {
  std::int64_t num_found = 0;
  for (std::size_t i = 0; i < batch.shards.size(); ++i) {
    const runtime::RowRange& part = batch.shards[i].rows;
    const std::int64_t begin = std::max(rows.begin, part.begin);
    const std::int64_t end = std::min(rows.end, part.end);
    if (begin >= end || !batch.taken[i]) continue;
    const char* const output = batch.in_arena[i] ? RowsInArena(batch) + part.begin * batch.row_bytes
                                                 : batch.outputs[i].data();
    EPS_RETURN_IF_ERROR(
        use(i, (begin - rows.begin) * batch.row_bytes,
            std::span<const char>(output + (begin - part.begin) * batch.row_bytes,
                                  static_cast<std::size_t>((end - begin) * batch.row_bytes))));
    num_found += end - begin;
  }
  if (num_found == rows.size()) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat("batch: ", num_found, " output rows are there of ", rows.size()));
}

}  // namespace

std::int64_t RowTypeBytes(RowType type) { return type == RowType::kFp32 ? 4 : 2; }

absl::Status DeliverOutput(const KeptBatch& batch, const KeptPart& part, std::span<char> out) {
  if (!part.fault.ok()) return part.fault;
  if (part.output.region == nullptr) return CopyOutput(batch, part.rows, out);
  if (InCuda(part.output.region.get())) return absl::OkStatus();
  return ForEachPiece(batch, part.rows,
                      [&](std::size_t rank, std::int64_t at, std::span<const char> rows) {
                        if (batch.direct[rank]) return absl::OkStatus();
                        return part.output.region->Write(
                            part.output.offset_bytes + static_cast<std::uint64_t>(at), rows);
                      });
}

absl::Status CopyOutput(const KeptBatch& batch, runtime::RowRange rows, std::span<char> out) {
  if (static_cast<std::int64_t>(out.size()) != rows.size() * batch.row_bytes) {
    return absl::InternalError(absl::StrCat("batch: place for the output has ", out.size(),
                                            " bytes, which differs from the ",
                                            rows.size() * batch.row_bytes, " of its rows"));
  }
  return ForEachPiece(batch, rows, [&](std::size_t, std::int64_t at, std::span<const char> piece) {
    std::memcpy(out.data() + at, piece.data(), piece.size());
    return absl::OkStatus();
  });
}

std::optional<LentRows> LendOutput(const KeptBatch& batch, const KeptPart& part) {
  const std::int64_t bytes = part.rows.size() * batch.row_bytes;
  if (!part.fault.ok() || part.output.region != nullptr || bytes < kLentBytes) return std::nullopt;
  for (std::size_t i = 0; i < batch.shards.size(); ++i) {
    const runtime::RowRange& shard = batch.shards[i].rows;
    const bool has_some =
        std::max(part.rows.begin, shard.begin) < std::min(part.rows.end, shard.end);
    if (has_some && !(batch.in_arena[i] && batch.taken[i])) return std::nullopt;
  }
  if (batch.blocks == nullptr || !batch.blocks->Lend()) return std::nullopt;
  return LentRows{
      {RowsInArena(batch) + part.rows.begin * batch.row_bytes, static_cast<std::size_t>(bytes)},
      batch.blocks};
}

}  // namespace epserve::coordinator
