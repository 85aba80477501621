#include "runtime/alltoallv/host_exchange.h"

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cstring>
#include <new>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "runtime/alltoallv/partial_sums.h"
#include "runtime/base/limits.h"
#include "runtime/base/status.h"
#include "runtime/base/streamed_copy.h"
#include "runtime/symmetric/shared_flag.h"

namespace epserve::runtime {
namespace {

// Limits that keep every size in 64 bits with room to spare.
constexpr std::int64_t kMaxBatchTokens = std::int64_t{1} << 24;
constexpr std::int64_t kMaxHidden = std::int64_t{1} << 20;
constexpr std::int64_t kMaxExperts = std::int64_t{1} << 20;

template <typename... Parts>
absl::Status Refuse(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat(parts...));
}

absl::Status CheckRange(const char* field, std::int64_t value, std::int64_t low,
                        std::int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return Refuse("exchange: ", field, " ", value, " is outside [", low, ", ", high, "]");
}

HeapLayout LayoutOf(const ExchangeConfig& config) {
  return MakeHeapLayout(config.num_ranks, config.max_batch_tokens, config.hidden, config.max_topk,
                        config.num_slots, config.placement.num_experts());
}

HeapSpec SpecOf(const ExchangeConfig& config, int rank) {
  HeapSpec spec;
  spec.cluster_id = config.cluster_id;
  spec.epoch = config.epoch;
  spec.rank = rank;
  spec.bytes = HeapBytes(config);
  spec.layout_digest = LayoutDigest(config);
  return spec;
}

std::chrono::steady_clock::time_point After(absl::Duration timeout) {
  return std::chrono::steady_clock::now() + absl::ToChronoNanoseconds(timeout);
}

// Typed views of one slot of one rank's heap.
struct SlotView {
  std::byte* base;
  const HeapLayout* layout;

  Arrival& arrival(int src) const {
    return reinterpret_cast<Arrival*>(base + layout->arrivals_offset)[src];
  }
  SharedFlag* partials_ready() const {
    return reinterpret_cast<SharedFlag*>(base + layout->partials_ready_offset);
  }
  std::byte* receive_rows() const { return base + layout->receive_rows_offset; }
  std::int32_t* local_experts() const {
    return reinterpret_cast<std::int32_t*>(base + layout->local_experts_offset);
  }
  float* weights() const { return reinterpret_cast<float*>(base + layout->weights_offset); }
  std::byte* partial_rows() const { return base + layout->partial_rows_offset; }
  float* sums() const { return reinterpret_cast<float*>(base + layout->sums_offset); }
};

}  // namespace

absl::Status ValidateExchangeConfig(const ExchangeConfig& config) {
  EPS_RETURN_IF_ERROR(ValidateClusterId(config.cluster_id));
  if (config.epoch == 0) return Refuse("exchange: epoch 0 is below 1");
  EPS_RETURN_IF_ERROR(CheckRange("num_ranks", config.num_ranks, 1, kMaxRanks));
  EPS_RETURN_IF_ERROR(CheckRange("rank", config.rank, 0, config.num_ranks - 1));
  EPS_RETURN_IF_ERROR(CheckRange("max_batch_tokens", config.max_batch_tokens, 1, kMaxBatchTokens));
  EPS_RETURN_IF_ERROR(CheckRange("hidden", config.hidden, 1, kMaxHidden));
  EPS_RETURN_IF_ERROR(CheckRange("max_topk", config.max_topk, 1, kMaxTopk));
  EPS_RETURN_IF_ERROR(CheckRange("num_slots", config.num_slots, 1, kMaxSlots));
  const std::vector<std::int64_t>& first = config.placement.first_expert;
  if (first.size() != static_cast<std::size_t>(config.num_ranks) + 1) {
    return Refuse("exchange: placement of ", first.size(), " entries is not the ",
                  config.num_ranks + 1, " of ", config.num_ranks, " ranks");
  }
  if (first.front() != 0 || !std::is_sorted(first.begin(), first.end())) {
    return Refuse("exchange: placement is not ascending from 0");
  }
  EPS_RETURN_IF_ERROR(CheckRange("num_experts", first.back(), 1, kMaxExperts));
  if (config.peer_timeout <= absl::ZeroDuration() || config.peer_timeout > absl::Hours(24)) {
    return Refuse("exchange: peer_timeout ", absl::ToInt64Milliseconds(config.peer_timeout),
                  " ms is outside (0, 24 hours]");
  }
  return absl::OkStatus();
}

std::uint64_t HeapBytes(const ExchangeConfig& config) { return LayoutOf(config).heap_bytes; }

absl::StatusOr<std::unique_ptr<HostExchange>> HostExchange::Create(const ExchangeConfig& config) {
  EPS_RETURN_IF_ERROR(ValidateExchangeConfig(config));
  EPS_ASSIGN_OR_RETURN(SymmetricHeap heap, SymmetricHeap::Create(SpecOf(config, config.rank)));
  return std::unique_ptr<HostExchange>(new HostExchange(config, LayoutOf(config), std::move(heap)));
}

HostExchange::HostExchange(const ExchangeConfig& config, const HeapLayout& layout,
                           SymmetricHeap heap)
    : config_(config), layout_(layout), heap_(std::move(heap)), slots_(config.num_slots) {
  owner_.resize(config.placement.num_experts());
  for (int rank = 0; rank < config.num_ranks; ++rank) {
    std::fill(owner_.begin() + config.placement.first_expert[rank],
              owner_.begin() + config.placement.first_expert[rank + 1], rank);
  }
  for (int index = 0; index < config.num_slots; ++index) {
    Slot& slot = slots_[index];
    slot.row_pointers.resize(config.max_batch_tokens);
    slot.token_destinations.resize(MaxShardTokens(config.max_batch_tokens, config.num_ranks));
    const SlotView view{heap_.data() + layout_.SlotOffset(index), &layout_};
    for (int src = 0; src < config.num_ranks; ++src) new (&view.arrival(src)) Arrival{};
    new (view.partials_ready()) SharedFlag;
    CountRecords(view.base, layout_, config.num_ranks).Initialize();
  }
}

HostExchange::~HostExchange() = default;

absl::Status HostExchange::OpenPeers(std::span<const std::string> handles) {
  if (!heaps_.empty()) {
    return absl::FailedPreconditionError("open peers: they are open; create a new exchange");
  }
  if (handles.size() != static_cast<std::size_t>(config_.num_ranks)) {
    return Refuse("open peers: ", handles.size(), " handles are not one for each of the ",
                  config_.num_ranks, " ranks");
  }
  if (handles[config_.rank] != heap_.handle()) {
    return Refuse("open peers: handle ", config_.rank, " is not the one of this rank's own heap");
  }
  std::vector<PeerHeap> peers;
  std::vector<std::byte*> heaps;
  for (int rank = 0; rank < config_.num_ranks; ++rank) {
    if (rank == config_.rank) {
      heaps.push_back(heap_.data());
      continue;
    }
    auto peer = PeerHeap::Open(handles[rank], SpecOf(config_, rank));
    if (!peer.ok()) {
      return absl::Status(peer.status().code(),
                          absl::StrCat("open peers: rank ", config_.rank, " opening rank ", rank,
                                       ": ", std::string(peer.status().message())));
    }
    heaps.push_back(peer->data());
    peers.push_back(*std::move(peer));
  }
  peers_ = std::move(peers);
  heaps_ = std::move(heaps);
  return absl::OkStatus();
}

std::span<std::byte> HostExchange::ReceiveRegion(int peer, int slot) const {
  const SlotView view{heaps_[peer] + layout_.SlotOffset(slot), &layout_};
  return {view.receive_rows(), layout_.local_experts_offset - layout_.receive_rows_offset};
}

absl::Status HostExchange::Aborted(const char* stage) const {
  return absl::AbortedError(
      absl::StrCat(stage, ": rank ", config_.rank, " of epoch ", config_.epoch, " was aborted"));
}

absl::Status HostExchange::ValidateDispatch(const DispatchArgs& args) const {
  if (heaps_.empty()) {
    return absl::FailedPreconditionError("dispatch: peers are not open; call OpenPeers first");
  }
  if (args.slot < 0 || args.slot >= config_.num_slots) {
    return Refuse("dispatch: slot ", args.slot, " is outside [0, ", config_.num_slots, ")");
  }
  if (args.sequence <= slots_[args.slot].sequence) {
    return Refuse("dispatch: sequence ", args.sequence, " does not exceed ",
                  slots_[args.slot].sequence, ", the last one of slot ", args.slot);
  }
  if (args.dtype != DataType::kFp32 && args.dtype != DataType::kFp16 &&
      args.dtype != DataType::kBf16) {
    return Refuse("dispatch: dtype ", std::string(DataTypeName(args.dtype)),
                  " is none of fp32, fp16, bf16");
  }
  const std::int64_t max_tokens = MaxShardTokens(config_.max_batch_tokens, config_.num_ranks);
  if (args.num_tokens < 0 || args.num_tokens > max_tokens) {
    return Refuse("dispatch: num_tokens ", args.num_tokens, " is outside [0, ", max_tokens,
                  "], a rank's share of max_batch_tokens ", config_.max_batch_tokens);
  }
  if (args.topk < 1 || args.topk > config_.max_topk) {
    return Refuse("dispatch: topk ", args.topk, " is outside [1, ", config_.max_topk, "]");
  }
  if (args.counts == nullptr) return Refuse("dispatch: counts is null");
  const bool shared = !args.shared.empty();
  if (!shared && args.num_tokens > 0 &&
      (args.x == nullptr || args.topk_ids == nullptr || args.topk_weights == nullptr)) {
    return Refuse("dispatch: x, topk_ids or topk_weights is null with num_tokens ",
                  args.num_tokens);
  }
  const void* const x = shared ? args.shared.x : args.x;
  if (reinterpret_cast<std::uintptr_t>(x) % DataTypeBytes(args.dtype) != 0) {
    return Refuse("dispatch: x is not aligned to its element of ", DataTypeBytes(args.dtype),
                  " bytes");
  }
  return ValidateCountMatrix(*args.counts, config_.placement, config_.max_batch_tokens);
}

absl::Status HostExchange::RouteShard(const DispatchArgs& args, Slot* slot) const {
  const auto num_experts = static_cast<std::uint32_t>(owner_.size());
  std::array<std::int32_t, kMaxRanks> rows_to_rank{};
  for (std::int64_t t = 0; t < args.num_tokens; ++t) {
    std::uint64_t destinations = 0;
    for (int k = 0; k < args.topk; ++k) {
      const std::int32_t expert = args.topk_ids[t * args.topk + k];
      if (expert == -1) continue;
      if (static_cast<std::uint32_t>(expert) >= num_experts) {  // Negative ones are huge here.
        return Refuse("dispatch: topk_ids[", t, "][", k, "] ", expert, " is outside [-1, ",
                      num_experts, ")");
      }
      destinations |= std::uint64_t{1} << owner_[expert];
    }
    slot->token_destinations[t] = destinations;
    for (; destinations != 0; destinations &= destinations - 1) {
      ++rows_to_rank[std::countr_zero(destinations)];
    }
  }
  for (int dst = 0; dst < config_.num_ranks; ++dst) {
    if (rows_to_rank[dst] != args.counts->at(config_.rank, dst)) {
      return Refuse("dispatch: counts has ", args.counts->at(config_.rank, dst), " rows from rank ",
                    config_.rank, " to rank ", dst, ", but topk_ids give ", rows_to_rank[dst]);
    }
  }
  return absl::OkStatus();
}

absl::Status HostExchange::TakeShared(const DispatchArgs& args, Slot* slot) const {
  const SlotView view{heap_.data() + layout_.SlotOffset(args.slot), &layout_};
  EPS_RETURN_IF_ERROR(TakeSharedRows(args.shared,
                                     {.rank = config_.rank,
                                      .max_batch_tokens = config_.max_batch_tokens,
                                      .placement = &config_.placement,
                                      .owner = owner_},
                                     *args.counts, args.topk,
                                     config_.hidden * DataTypeBytes(args.dtype),
                                     {.rows = slot->row_pointers.data(),
                                      .local_experts = view.local_experts(),
                                      .weights = view.weights(),
                                      .token_destinations = slot->token_destinations.data()}));
  const std::int64_t in_batch =
      args.shared.shard_begin[config_.rank + 1] - args.shared.shard_begin[config_.rank];
  if (in_batch == args.num_tokens) return absl::OkStatus();
  return Refuse("dispatch: num_tokens ", args.num_tokens, " is not the ", in_batch,
                " of this rank's shard in the shared batch");
}

void HostExchange::PushRows(const DispatchArgs& args, Slot* slot) const {
  const std::uint64_t row_bytes = config_.hidden * DataTypeBytes(args.dtype);
  const std::uint64_t stride = ReceiveRowStride(config_.hidden, DataTypeBytes(args.dtype));
  const std::int64_t remote_rows =
      args.counts->NumSent(config_.rank) - args.counts->at(config_.rank, config_.rank);
  const CopyKind kind = CopyKindFor(remote_rows * row_bytes);
  std::array<std::int64_t, kMaxRanks> next{};  // By destination: where its next row goes.
  for (int dst = 0; dst < config_.num_ranks; ++dst) {
    next[dst] = args.counts->ReceiveOffset(config_.rank, dst);
  }
  const int topk = args.topk;
  for (std::int64_t t = 0; t < args.num_tokens; ++t) {
    const std::byte* row = static_cast<const std::byte*>(args.x) + t * row_bytes;
    const std::int32_t* ids = args.topk_ids + t * topk;
    const float* weights = args.topk_weights + t * topk;
    for (std::uint64_t left = slot->token_destinations[t]; left != 0; left &= left - 1) {
      const int dst = std::countr_zero(left);
      const std::int64_t index = next[dst]++;
      const SlotView view{heaps_[dst] + layout_.SlotOffset(args.slot), &layout_};
      if (dst == config_.rank) {
        slot->row_pointers[index] = row;
      } else {
        CopyBytes(kind, row, view.receive_rows() + index * stride, row_bytes);
      }
      const auto first = static_cast<std::int32_t>(config_.placement.first_expert[dst]);
      for (int k = 0; k < topk; ++k) {
        const bool here = ids[k] >= 0 && owner_[ids[k]] == dst;
        view.local_experts()[index * topk + k] = here ? ids[k] - first : -1;
        view.weights()[index * topk + k] = here ? weights[k] : 0.0f;
      }
    }
  }
  if (kind == CopyKind::kStreamed) FenceStreamedCopies();
}

void HostExchange::PublishRows(const DispatchArgs& args) const {
  for (int dst = 0; dst < config_.num_ranks; ++dst) {
    // Both sides skip a pair without rows: they agree on the matrix.
    if (dst == config_.rank || args.counts->at(config_.rank, dst) == 0) continue;
    const SlotView view{heaps_[dst] + layout_.SlotOffset(args.slot), &layout_};
    Arrival& arrival = view.arrival(config_.rank);
    arrival.sequence = args.sequence;
    arrival.num_rows = args.counts->at(config_.rank, dst);
    arrival.receive_offset = args.counts->ReceiveOffset(config_.rank, dst);
    arrival.topk = args.topk;
    arrival.dtype = static_cast<std::int32_t>(args.dtype);
    Publish(&arrival.flag,
            args.sequence);  // Rows, metadata and the record first; see shared_flag.h.
  }
}

absl::Status HostExchange::AwaitRows(const DispatchArgs& args) const {
  const SlotView view{heap_.data() + layout_.SlotOffset(args.slot), &layout_};
  const WaitLimits limits{After(config_.peer_timeout), &abort_,
                          absl::ToChronoNanoseconds(config_.busy_poll)};
  for (int src = 0; src < config_.num_ranks; ++src) {
    if (src == config_.rank || args.counts->at(src, config_.rank) == 0) continue;
    Arrival& arrival = view.arrival(src);
    EPS_RETURN_IF_ERROR(
        AwaitPeer("dispatch", args.slot, args.sequence, src, &arrival.flag, limits));
    if (arrival.sequence != args.sequence ||
        arrival.num_rows != args.counts->at(src, config_.rank) ||
        arrival.receive_offset != args.counts->ReceiveOffset(src, config_.rank) ||
        arrival.topk != args.topk || arrival.dtype != static_cast<std::int32_t>(args.dtype)) {
      return absl::InternalError(absl::StrCat(
          "dispatch: rank ", src, " sent batch ", arrival.sequence, " with ", arrival.num_rows,
          " rows at ", arrival.receive_offset, ", topk ", arrival.topk, ", dtype ", arrival.dtype,
          ", which is not what rank ", config_.rank, " expected: batch ", args.sequence, " with ",
          args.counts->at(src, config_.rank), " rows at ",
          args.counts->ReceiveOffset(src, config_.rank), ", topk ", args.topk, ", dtype ",
          static_cast<int>(args.dtype)));
    }
  }
  return absl::OkStatus();
}

absl::Status HostExchange::AwaitPeers(const char* stage, int slot, std::uint64_t sequence,
                                      std::uint64_t peers, std::uint64_t awaited,
                                      absl::FunctionRef<SharedFlag*(int)> flag_of,
                                      const WaitLimits& limits) const {
  std::array<SharedFlag*, kMaxRanks> flags{};
  std::size_t num_flags = 0;
  for (; awaited != 0; awaited &= awaited - 1) {
    flags[num_flags++] = flag_of(std::countr_zero(awaited));
  }
  switch (WaitForAny(std::span(flags).first(num_flags), sequence, limits)) {
    case WaitResult::kReached:
      return absl::OkStatus();
    case WaitResult::kAborted:
      return Aborted(stage);
    case WaitResult::kTimedOut:
      break;
  }
  std::vector<int> missing;
  for (; peers != 0; peers &= peers - 1) {
    const int peer = std::countr_zero(peers);
    if (flag_of(peer)->value.load(std::memory_order_acquire) < sequence) missing.push_back(peer);
  }
  if (missing.empty()) return absl::OkStatus();  // The last came just now.
  const bool several = missing.size() > 1;
  const auto over = std::chrono::steady_clock::now() - limits.deadline;
  const std::int64_t waited_ms =
      absl::ToInt64Milliseconds(config_.peer_timeout + absl::FromChrono(over));
  return absl::DeadlineExceededError(absl::StrCat(
      stage, ": rank ", config_.rank, " waited ", waited_ms,
      several ? " ms for ranks " : " ms for rank ", absl::StrJoin(missing, ", "), " (epoch ",
      config_.epoch, ", slot ", slot, ", batch ", sequence, "), which exceeds peer_timeout ",
      absl::ToInt64Milliseconds(config_.peer_timeout),
      several ? " ms; those workers are gone or stuck" : " ms; that worker is gone or stuck"));
}

void HostExchange::PointAtReceived(const DispatchArgs& args, Slot* slot) const {
  const SlotView view{heap_.data() + layout_.SlotOffset(args.slot), &layout_};
  const std::uint64_t stride = ReceiveRowStride(config_.hidden, DataTypeBytes(args.dtype));
  std::int64_t index = 0;
  for (int src = 0; src < config_.num_ranks; ++src) {
    const std::int64_t end = index + args.counts->at(src, config_.rank);
    if (src == config_.rank) {
      index = end;  // PushRows has set these.
      continue;
    }
    for (; index < end; ++index) slot->row_pointers[index] = view.receive_rows() + index * stride;
  }
}

void HostExchange::DescribeReceived(const DispatchArgs& args, Slot* slot) const {
  const SlotView view{heap_.data() + layout_.SlotOffset(args.slot), &layout_};
  const std::int64_t num_rows = args.counts->NumReceived(config_.rank);
  slot->received.dtype = args.dtype;
  slot->received.num_rows = num_rows;
  slot->received.topk = args.topk;
  slot->received.rows = std::span(slot->row_pointers).first(num_rows);
  slot->received.local_experts = view.local_experts();
  slot->received.weights = view.weights();
  slot->received.partial_rows = view.partial_rows();
  slot->received.sums = view.sums();
}

absl::Status HostExchange::Dispatch(const DispatchArgs& args) {
  EPS_RETURN_IF_ERROR(ValidateDispatch(args));
  Slot& slot = slots_[args.slot];
  slot.dispatched = false;
  const bool shared = !args.shared.empty();
  EPS_RETURN_IF_ERROR(shared ? TakeShared(args, &slot) : RouteShard(args, &slot));
  // Relaxed: the word orders nothing. After an abort not one more byte goes to a peer.
  if (abort_.load(std::memory_order_relaxed) != 0) return Aborted("dispatch");
  slot.sequence = args.sequence;
  if (!shared) PushRows(args, &slot);
  if (!shared || args.shared.rows_follow) {
    PublishRows(args);
    EPS_RETURN_IF_ERROR(AwaitRows(args));
  }
  if (!shared) PointAtReceived(args, &slot);
  DescribeReceived(args, &slot);
  slot.num_tokens = args.num_tokens;
  slot.counts = args.counts;
  slot.dispatched = true;
  return absl::OkStatus();
}

SharedFlag* HostExchange::PartialsReady(int slot, int rank) const {
  return SlotView{heaps_[rank] + layout_.SlotOffset(slot), &layout_}.partials_ready();
}

// Of `ranks`, a bit each, those whose partial rows are there. Pairs with Combine's publication.
std::uint64_t HostExchange::RanksWithPartials(int slot, std::uint64_t ranks) const {
  std::uint64_t ready = 0;
  for (; ranks != 0; ranks &= ranks - 1) {
    const SharedFlag* const flag = PartialsReady(slot, std::countr_zero(ranks));
    const bool reached = flag->value.load(std::memory_order_acquire) >= slots_[slot].sequence;
    if (reached) ready |= ranks & -ranks;
  }
  return ready;
}

absl::Status HostExchange::SumPartials(int slot_index, void* out) const {
  const Slot& slot = slots_[slot_index];
  const WaitLimits limits{After(config_.peer_timeout), &abort_,
                          absl::ToChronoNanoseconds(config_.busy_poll)};
  const std::uint64_t row_bytes = config_.hidden * DataTypeBytes(slot.received.dtype);
  const auto num_tokens = static_cast<std::size_t>(slot.num_tokens);
  PartialSums sums{.dtype = slot.received.dtype,
                   .hidden = config_.hidden,
                   .token_destinations = std::span(slot.token_destinations).first(num_tokens),
                   .kind = CopyKindFor(num_tokens * row_bytes),
                   .out = static_cast<std::byte*>(out)};
  std::uint64_t awaited = 0;  // A bit for each rank whose partial rows are still to come.
  for (int rank = 0; rank < config_.num_ranks; ++rank) {
    const SlotView view{heaps_[rank] + layout_.SlotOffset(slot_index), &layout_};
    sums.rows[rank] =
        view.partial_rows() + slot.counts->ReceiveOffset(config_.rank, rank) * row_bytes;
    const bool has_rows = slot.counts->at(config_.rank, rank) > 0;
    if (rank != config_.rank && has_rows) awaited |= std::uint64_t{1} << rank;
  }
  // Many rows are summed as they come, so that no core idles while the slowest rank works. Few take
  // less than to be woken for each rank's.
  const bool as_they_come = sums.kind == CopyKind::kStreamed;
  std::optional<std::uint64_t> summed;
  for (;;) {
    awaited &= ~RanksWithPartials(slot_index, awaited);
    if (as_they_come || awaited == 0) SumReadyTokens(sums, ~awaited, summed);
    if (awaited == 0) break;
    if (as_they_come) summed = ~awaited;
    EPS_RETURN_IF_ERROR(AwaitPeers(
        "combine", slot_index, slot.sequence, awaited, as_they_come ? awaited : awaited & -awaited,
        [&](int rank) { return PartialsReady(slot_index, rank); }, limits));
  }
  if (sums.kind == CopyKind::kStreamed) FenceStreamedCopies();
  return absl::OkStatus();
}

absl::Status HostExchange::Combine(int slot_index, void* out) {
  if (slot_index < 0 || slot_index >= config_.num_slots) {
    return Refuse("combine: slot ", slot_index, " is outside [0, ", config_.num_slots, ")");
  }
  Slot& slot = slots_[slot_index];
  if (!slot.dispatched) {
    return absl::FailedPreconditionError(
        absl::StrCat("combine: slot ", slot_index, " holds no batch; call Dispatch first"));
  }
  const std::size_t element_bytes = DataTypeBytes(slot.received.dtype);
  if ((out == nullptr && slot.num_tokens > 0) ||
      reinterpret_cast<std::uintptr_t>(out) % element_bytes != 0) {
    return Refuse("combine: out is null or not aligned to its element of ", element_bytes,
                  " bytes");
  }
  if (abort_.load(std::memory_order_relaxed) != 0) return Aborted("combine");
  slot.dispatched = false;
  const SlotView own{heap_.data() + layout_.SlotOffset(slot_index), &layout_};
  // Partial rows first; pairs with the peers' look in RanksWithPartials. See shared_flag.h.
  Publish(own.partials_ready(), slot.sequence);
  EPS_RETURN_IF_ERROR(SumPartials(slot_index, out));
  slot.received.num_rows = 0;
  slot.received.rows = {};
  return absl::OkStatus();
}

}  // namespace epserve::runtime
