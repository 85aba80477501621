#include "runtime/alltoallv/cuda_exchange.h"

#include <algorithm>
#include <cstring>
#include <thread>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "runtime/alltoallv/counts_mailbox.h"
#include "runtime/alltoallv/device_limits.h"
#include "runtime/alltoallv/shard_counts.h"
#include "runtime/alltoallv/wait_report.h"
#include "runtime/base/device_poll.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"
#include "runtime/symmetric/nvlink.h"

namespace epserve::runtime {
namespace {

CudaHeapShape ShapeOf(const CudaExchangeConfig& config) {
  return {config.base.num_ranks,
          config.base.num_slots,
          config.base.max_topk,
          config.base.hidden,
          config.base.max_batch_tokens,
          config.max_decode_tokens,
          config.max_element_bytes,
          config.base.placement.num_experts(),
          config.line_tokens};
}

absl::Status Validate(const CudaExchangeConfig& config) {
  EPS_RETURN_IF_ERROR(CheckDeviceConfig("cuda exchange", config.base));
  if (config.max_decode_tokens < 1 || config.comm_blocks < 1 || config.push_blocks < 0 ||
      config.reduce_blocks < 0 || config.max_reduce_blocks < 1 || config.decode_blocks < 1 ||
      config.decode_combine_blocks < 1) {
    return absl::InvalidArgumentError(
        "cuda exchange: max_decode_tokens and the numbers of blocks must be at least 1, those of "
        "combine's roles 1 or, to have them divided, 0");
  }
  if (config.line_tokens < 0 || config.line_tokens > kMaxLineTokens) {
    return absl::InvalidArgumentError(absl::StrCat("cuda exchange: line_tokens ",
                                                   config.line_tokens, " is outside [0, ",
                                                   kMaxLineTokens, "]"));
  }
  return absl::OkStatus();
}

// Raised when what ranks do to each other's heaps changes, though the layout may not.
constexpr std::int64_t kHeapProtocol = 3;

// Of everything that both sides of a mapping must have alike.
std::uint64_t DigestOf(const CudaExchangeConfig& config, const CudaHeapLayout& layout) {
  return DigestOfDeviceConfig(config.base)
      .Add(kHeapProtocol)
      .Add(config.max_decode_tokens)
      .Add(config.line_tokens)
      .Add(config.max_element_bytes)
      .Add(config.comm_blocks)
      .Add(config.decode_blocks)
      .Add(layout.bytes)
      .Add(static_cast<std::int64_t>(config.settings_digest))
      .value();
}

}  // namespace

// What an area needs beside the heap, and what its present batch looks like.
struct CudaExchange::Local {
  DeviceBuffer send_position;   // i32 [T, R]
  DeviceBuffer expert_index;    // i32 [row_capacity, K]
  DeviceBuffer expert_offset;   // i32 [E_local + 1]
  PinnedBuffer counted_offset;  // the same, of a slot
  DeviceBuffer sequence;        // u64 [4], decode path
  DeviceBuffer tickets;         // of a slot: dispatch's, and kFlagStrideBytes on combine's
  CountsMailboxBuffer counts;   // of a slot
  std::uint64_t counted_batch = 0;
  std::uint64_t uses = 0;
  std::uint64_t combines = 0;  // of a slot
  int topk = 0;
  std::int32_t recv_base[kMaxCudaRanks] = {};
  std::int32_t recv_rows[kMaxCudaRanks] = {};
  std::int32_t return_base[kMaxCudaRanks] = {};
  std::int32_t partial_base[kMaxCudaRanks] = {};
};

CudaExchange::CudaExchange(const CudaExchangeConfig& config)
    : config_(config), layout_(MakeCudaHeapLayout(ShapeOf(config))) {}

CudaExchange::~CudaExchange() = default;

std::int64_t CudaExchange::DeviceBytes(const CudaExchangeConfig& config) {
  const CudaHeapLayout layout = MakeCudaHeapLayout(ShapeOf(config));
  const ExchangeConfig& base = config.base;
  const std::int64_t shard = MaxShardTokens(base.max_batch_tokens, base.num_ranks);
  const auto local_bytes = [&](const AreaLayout& area, std::int64_t tokens) {
    return 4 * (tokens * base.num_ranks + area.row_capacity * base.max_topk +
                base.placement.num_local_experts(base.rank) + 1);
  };
  return layout.bytes + base.num_slots * local_bytes(layout.slot, shard) +
         local_bytes(layout.decode, config.max_decode_tokens);
}

std::int64_t CudaExchange::HeapBytes(const CudaExchangeConfig& config) {
  return MakeCudaHeapLayout(ShapeOf(config)).bytes;
}

absl::StatusOr<std::unique_ptr<CudaExchange>> CudaExchange::Create(
    const CudaExchangeConfig& config) {
  EPS_RETURN_IF_ERROR(Validate(config));
  std::unique_ptr<CudaExchange> exchange(new CudaExchange(config));
  EPS_RETURN_IF_ERROR(exchange->Initialize());
  return exchange;
}

absl::Status CudaExchange::Initialize() {
  if (layout_.decode.line_capacity > 0) {
    // Fabric handles are of GPUs that NVLink alone connects.
    const bool fabric = config_.handle_type == HandleType::kFabric;
    const absl::Status linked = fabric ? absl::OkStatus() : CheckNvLink();
    sends_lines_ = linked.ok();
    if (!linked.ok()) {
      LogWarning("decode_without_lines",
                 {{"reason", linked}, {"effect", "decode's rows go with flags, which is slower"}});
    }
  }
  EPS_RETURN_IF_ERROR(LoadDispatchKernels());
  EPS_RETURN_IF_ERROR(LoadCombineKernels());
  EPS_RETURN_IF_ERROR(LoadBarrierKernel());
  EPS_RETURN_IF_ERROR(LoadCountsKernel());
  EPS_RETURN_IF_ERROR(LoadExpertLayoutKernels());
  EPS_ASSIGN_OR_RETURN(host_words_,
                       PinnedBuffer::Create(sizeof(std::uint64_t) + sizeof(WaitReport)));
  std::memset(host_words_.as<std::byte>(), 0, sizeof(std::uint64_t) + sizeof(WaitReport));
  EPS_ASSIGN_OR_RETURN(barrier_use_, DeviceBuffer::Create(2 * sizeof(std::uint64_t)));
  EPS_RETURN_IF_ERROR(AllocateLocals());
  return ShareHeap();
}

absl::Status CudaExchange::AllocateLocals() {
  const ExchangeConfig& base = config_.base;
  const std::int64_t local_experts = base.placement.num_local_experts(base.rank);
  const std::int64_t shard = MaxShardTokens(base.max_batch_tokens, base.num_ranks);
  for (int i = 0; i <= base.num_slots; ++i) {
    const bool decode = i == base.num_slots;
    const AreaLayout& area = decode ? layout_.decode : layout_.slot;
    const std::int64_t tokens = decode ? config_.max_decode_tokens : shard;
    auto local = std::make_unique<Local>();
    EPS_ASSIGN_OR_RETURN(local->send_position, DeviceBuffer::Create(tokens * base.num_ranks * 4));
    EPS_ASSIGN_OR_RETURN(local->expert_index,
                         DeviceBuffer::Create(area.row_capacity * base.max_topk * 4));
    EPS_ASSIGN_OR_RETURN(local->expert_offset, DeviceBuffer::Create((local_experts + 1) * 4));
    EPS_ASSIGN_OR_RETURN(local->sequence, DeviceBuffer::Create(4 * sizeof(std::uint64_t)));
    if (!decode) {
      EPS_ASSIGN_OR_RETURN(local->tickets, DeviceBuffer::Create(2 * kFlagStrideBytes));
      EPS_ASSIGN_OR_RETURN(
          local->counts, CountsMailboxBuffer::Create(base.num_ranks, base.placement.num_experts()));
      EPS_ASSIGN_OR_RETURN(local->counted_offset, PinnedBuffer::Create((local_experts + 1) * 4));
    }
    locals_.push_back(std::move(local));
  }
  return absl::OkStatus();
}

absl::Status CudaExchange::ShareHeap() {
  const ExchangeConfig& base = config_.base;
  EPS_ASSIGN_OR_RETURN(DeviceAllocation allocation,
                       DeviceAllocation::Create(layout_.bytes, config_.handle_type));
  EPS_ASSIGN_OR_RETURN(heap_, DeviceMapping::Map(std::move(allocation)));
  // Flags start at zero; poisoning the rest is the caller's choice.
  EPS_CUDA_RETURN_IF_ERROR(cudaMemset(heap_.data(), 0, layout_.bytes));
  EPS_CUDA_RETURN_IF_ERROR(cudaDeviceSynchronize());
  own_.type = config_.handle_type;
  own_.rank = base.rank;
  own_.epoch = base.epoch;
  own_.bytes = heap_.bytes();
  own_.layout_digest = DigestOf(config_, layout_);
  if (config_.handle_type == HandleType::kFabric) {
    EPS_ASSIGN_OR_RETURN(own_.fabric, heap_.allocation().ExportFabric());
  } else {
    EPS_ASSIGN_OR_RETURN(own_.secret, RandomSecret());
    own_.address =
        HandleSocketAddress(config_.socket_directory, base.cluster_id, base.epoch, base.rank);
    // Anybody may bind an abstract name: one that cannot be guessed is nobody else's already.
    if (config_.socket_directory.empty()) {
      EPS_ASSIGN_OR_RETURN(const std::string suffix, RandomSecret());
      absl::StrAppend(&own_.address, "-", absl::BytesToHexString(suffix.substr(0, 8)));
    }
    EPS_ASSIGN_OR_RETURN(UniqueFd descriptor, heap_.allocation().Export());
    EPS_ASSIGN_OR_RETURN(server_, HandleServer::Start(own_.address, own_.secret,
                                                      std::move(descriptor), heap_.bytes()));
  }
  EPS_ASSIGN_OR_RETURN(handle_, EncodeHandle(own_));
  return absl::OkStatus();
}

std::string CudaExchange::handle_type() const {
  return std::string(HandleTypeName(config_.handle_type));
}

absl::Status CudaExchange::OpenPeers(std::span<const std::string> handles, absl::Duration timeout) {
  const ExchangeConfig& base = config_.base;
  if (handles.size() != static_cast<std::size_t>(base.num_ranks)) {
    return absl::InvalidArgumentError(absl::StrCat("open peers: ", handles.size(),
                                                   " handles are not one for each of the ",
                                                   base.num_ranks, " ranks"));
  }
  const Deadline deadline(timeout);
  peers_.resize(base.num_ranks);
  for (int r = 0; r < base.num_ranks; ++r) {
    if (r == base.rank) continue;
    EPS_ASSIGN_OR_RETURN(const CudaHeapHandle peer, DecodeHandle(handles[r]));
    EPS_RETURN_IF_ERROR(CheckHandle(peer, r, own_));
    EPS_ASSIGN_OR_RETURN(DeviceAllocation allocation, OpenPeer(peer, deadline));
    EPS_ASSIGN_OR_RETURN(peers_[r], DeviceMapping::Map(std::move(allocation)));
  }
  opened_ = true;
  return absl::OkStatus();
}

absl::StatusOr<DeviceAllocation> CudaExchange::OpenPeer(const CudaHeapHandle& peer,
                                                        const Deadline& deadline) const {
  if (peer.type == HandleType::kFabric) return DeviceAllocation::Import(peer.fabric, peer.bytes);
  auto fetched = FetchHandle(peer.address, peer.secret, absl::Seconds(1));
  // A socket that answers nobody now may be busy with another rank, or belong to a dead one.
  while (absl::IsUnavailable(fetched.status()) && !deadline.passed()) {
    if (aborted_) {
      return absl::AbortedError(
          absl::StrCat("open peers: the epoch ended while rank ", peer.rank, " was awaited"));
    }
    absl::SleepFor(absl::Milliseconds(5));
    fetched = FetchHandle(peer.address, peer.secret, absl::Seconds(1));
  }
  EPS_RETURN_IF_ERROR(fetched.status());
  return DeviceAllocation::Import(fetched->descriptor.get(), peer.bytes);
}

void CudaExchange::Seal() { server_.reset(); }

CudaExchange::Local& CudaExchange::LocalOf(Path path, int slot) {
  return *locals_[path == Path::kDecode ? config_.base.num_slots : slot];
}

const CudaExchange::Local& CudaExchange::LocalOf(Path path, int slot) const {
  return *locals_[path == Path::kDecode ? config_.base.num_slots : slot];
}

WaitControl CudaExchange::Wait() const {
  return {host_words_.as<std::uint32_t>(),
          reinterpret_cast<WaitReport*>(host_words_.as<std::byte>() + sizeof(std::uint64_t)),
          absl::ToInt64Nanoseconds(config_.base.peer_timeout),
          reinterpret_cast<std::uint32_t*>(barrier_use_.as<std::uint64_t>() + 1)};
}

AreaView CudaExchange::ViewOf(Path path, int slot) const {
  AreaView view{};
  for (int r = 0; r < config_.base.num_ranks; ++r) {
    view.heap[r] = r == config_.base.rank ? heap_.data() : peers_[r].data();
  }
  const bool decode = path == Path::kDecode;
  view.layout = decode ? layout_.decode : layout_.slot;
  view.area_offset = decode ? layout_.decodes : layout_.slots + slot * layout_.slot.bytes;
  view.rank = config_.base.rank;
  view.num_ranks = config_.base.num_ranks;
  view.use = LocalOf(path, slot).uses;
  view.max_line_tokens = sends_lines_ ? view.layout.line_capacity : 0;
  view.device_sequence = decode ? LocalOf(path, slot).sequence.as<std::uint64_t>() : nullptr;
  return view;
}

absl::StatusOr<CountMatrix> CudaExchange::ExchangeCounts(int slot, std::uint64_t batch,
                                                         const ShardCounts& counts,
                                                         absl::Duration timeout,
                                                         cudaStream_t stream) {
  if (!opened_) {
    return absl::FailedPreconditionError("counts: the peers are not opened; call OpenPeers first");
  }
  EPS_RETURN_IF_ERROR(ValidateCountsSlot(config_.base, slot));
  Local& local = LocalOf(Path::kPrefill, slot);
  EPS_RETURN_IF_ERROR(ValidateShardCounts(config_.base, slot, batch, local.counted_batch, counts));
  local.counted_batch = batch;
  CountsArgs args{};
  args.area = ViewOf(Path::kPrefill, slot);
  args.batch = batch;
  args.num_experts = config_.base.placement.num_experts();
  args.mailbox = local.counts.Post(counts);
  args.wait = Wait();
  EPS_RETURN_IF_ERROR(LaunchCounts(args, stream));
  for (const DevicePoll poll; !local.counts.IsDone(batch); poll.Pause()) {
    EPS_RETURN_IF_ERROR(CheckWaits());
    if (aborted_) {
      return absl::AbortedError(absl::StrCat("counts: rank ", config_.base.rank,
                                             " was told to stop while it waited for its peers"));
    }
    if (poll.waited() > absl::ToChronoNanoseconds(timeout)) {
      return absl::DeadlineExceededError(absl::StrCat(
          "counts: the GPU of rank ", config_.base.rank, " has not exchanged them within ",
          absl::ToInt64Milliseconds(timeout), " ms; it hangs, restart the worker"));
    }
  }
  return local.counts.Read(batch);
}

absl::Status CudaExchange::Dispatch(Path path, int slot, const CudaTokens& tokens,
                                    const CountMatrix* counts, cudaStream_t stream) {
  const ExchangeConfig& base = config_.base;
  const bool decode = path == Path::kDecode;
  if (!opened_) {
    return absl::FailedPreconditionError(
        "dispatch: the peers are not opened; call OpenPeers first");
  }
  const std::int64_t limit =
      decode ? config_.max_decode_tokens : MaxShardTokens(base.max_batch_tokens, base.num_ranks);
  EPS_RETURN_IF_ERROR(CheckDeviceTokens(tokens, {limit, base.max_topk, config_.max_element_bytes}));
  Local& local = LocalOf(path, slot);
  if (!decode && counts != nullptr) {
    EPS_RETURN_IF_ERROR(ValidateCountMatrix(*counts, base.placement, base.max_batch_tokens));
  }
  if (!decode) ++local.uses;
  local.topk = tokens.topk;
  CudaDispatchArgs args{};
  if (!decode) args.tickets = {local.tickets.as<unsigned long long>(), local.uses};
  args.area = ViewOf(path, slot);
  args.x = tokens.x;
  args.topk_ids = tokens.topk_ids;
  args.topk_weights = tokens.topk_weights;
  args.send_position = local.send_position.as<std::int32_t>();
  args.num_tokens = tokens.num_tokens;
  args.hidden = base.hidden;
  args.topk = tokens.topk;
  args.dtype = tokens.dtype;
  args.payload = tokens.payload;
  args.num_blocks = decode ? config_.decode_blocks : config_.comm_blocks;
  args.wait = Wait();
  for (int r = 0; r <= base.num_ranks; ++r) {
    args.first_expert[r] = static_cast<std::int32_t>(base.placement.first_expert[r]);
  }
  if (!decode && counts != nullptr) {
    PlaceByCounts(*counts, local, args);
  } else {
    PlaceBySource(limit, local, args);
  }
  return LaunchDispatch(args, stream);
}

void CudaExchange::PlaceByCounts(const CountMatrix& counts, Local& local,
                                 CudaDispatchArgs& args) const {
  const int rank = config_.base.rank;
  for (int r = 0; r < config_.base.num_ranks; ++r) {
    args.row_base[r] = static_cast<std::int32_t>(counts.ReceiveOffset(rank, r));
    args.row_limit[r] = counts.at(rank, r);
    local.recv_base[r] = static_cast<std::int32_t>(counts.ReceiveOffset(r, rank));
    local.recv_rows[r] = counts.at(r, rank);
    local.return_base[r] = static_cast<std::int32_t>(counts.SendOffset(r, rank));
    local.partial_base[r] = static_cast<std::int32_t>(counts.SendOffset(rank, r));
  }
}

void CudaExchange::PlaceBySource(std::int64_t most_rows, Local& local,
                                 CudaDispatchArgs& args) const {
  const auto most = static_cast<std::int32_t>(most_rows);
  for (int r = 0; r < config_.base.num_ranks; ++r) {
    args.row_base[r] = config_.base.rank * most;
    args.row_limit[r] = most;
    local.recv_base[r] = r * most;
    local.recv_rows[r] = -1;
    local.return_base[r] = config_.base.rank * most;
    local.partial_base[r] = r * most;
  }
}

absl::Status CudaExchange::LayOutExperts(Path path, int slot, cudaStream_t stream) {
  Local& local = LocalOf(path, slot);
  ExpertLayoutArgs args{};
  args.wait = Wait();
  args.area = ViewOf(path, slot);
  std::copy_n(local.recv_base, kMaxCudaRanks, args.recv_base);
  std::copy_n(local.recv_rows, kMaxCudaRanks, args.recv_rows);
  args.topk = local.topk;
  args.num_local_experts =
      static_cast<int>(config_.base.placement.num_local_experts(config_.base.rank));
  args.expert_index = local.expert_index.as<std::int32_t>();
  args.expert_offset = local.expert_offset.as<std::int32_t>();
  // A batch whose matrix the host has needs no trip there.
  args.host_expert_offset =
      local.recv_rows[0] < 0 ? local.counted_offset.as<std::int32_t>() : nullptr;
  return LaunchExpertLayout(args, stream);
}

absl::Status CudaExchange::Gather(Path path, int slot, const CudaTokens& tokens,
                                  void* expert_inputs, cudaStream_t stream) {
  Local& local = LocalOf(path, slot);
  GatherArgs args{};
  args.wait = Wait();
  args.area = ViewOf(path, slot);
  std::copy_n(local.recv_base, kMaxCudaRanks, args.recv_base);
  std::copy_n(local.recv_rows, kMaxCudaRanks, args.recv_rows);
  args.x = tokens.x;
  args.expert_index = local.expert_index.as<std::int32_t>();
  args.expert_inputs = expert_inputs;
  args.hidden = config_.base.hidden;
  args.topk = tokens.topk;
  args.dtype = tokens.dtype;
  args.payload = tokens.payload;
  args.num_blocks = 2 * 132;  // memory-bound: two blocks on each of an H200's multiprocessors
  return LaunchGather(args, stream);
}

CombineBlocks CudaExchange::PrefillCombineBlocks(int topk) const {
  CombineBlocks blocks = DivideCombineBlocks(2 * config_.comm_blocks, config_.base.num_ranks, topk);
  blocks.reduce = std::min(blocks.reduce, config_.max_reduce_blocks);
  if (config_.push_blocks > 0) blocks.push = config_.push_blocks;
  if (config_.reduce_blocks > 0) blocks.reduce = config_.reduce_blocks;
  return blocks;
}

absl::Status CudaExchange::Combine(Path path, int slot, const CudaTokens& tokens,
                                   const void* expert_rows, void* out, cudaStream_t stream) {
  Local& local = LocalOf(path, slot);
  CudaCombineArgs args{};
  args.area = ViewOf(path, slot);
  args.expert_rows = expert_rows;
  args.expert_index = local.expert_index.as<std::int32_t>();
  args.send_position = local.send_position.as<std::int32_t>();
  args.out = out;
  args.num_tokens = tokens.num_tokens;
  args.hidden = config_.base.hidden;
  args.topk = tokens.topk;
  args.dtype = tokens.dtype;
  std::copy_n(local.recv_base, kMaxCudaRanks, args.recv_base);
  std::copy_n(local.recv_rows, kMaxCudaRanks, args.recv_rows);
  std::copy_n(local.return_base, kMaxCudaRanks, args.return_base);
  std::copy_n(local.partial_base, kMaxCudaRanks, args.partial_base);
  const bool decode = path == Path::kDecode;
  const CombineBlocks blocks = PrefillCombineBlocks(tokens.topk);
  args.push_blocks = decode ? config_.decode_combine_blocks : blocks.push;
  args.reduce_blocks = decode ? config_.decode_combine_blocks : blocks.reduce;
  args.merged_roles = decode;
  if (!decode) {
    args.tickets = {local.tickets.as<unsigned long long>() + kFlagStrideBytes / 8,
                    ++local.combines};
  }
  args.wait = Wait();
  return LaunchCombine(args, stream);
}

absl::Status CudaExchange::Barrier(cudaStream_t stream) {
  const AreaView view = ViewOf(Path::kDecode, 0);
  return LaunchBarrier(view.heap, config_.base.rank, config_.base.num_ranks, layout_.barrier,
                       barrier_use_.as<std::uint64_t>(), Wait(), stream);
}

const std::int32_t* CudaExchange::expert_offset(Path path, int slot) const {
  return LocalOf(path, slot).expert_offset.as<std::int32_t>();
}

const std::int32_t* CudaExchange::counted_offset(int slot) const {
  return LocalOf(Path::kPrefill, slot).counted_offset.as<std::int32_t>();
}

std::int64_t CudaExchange::row_capacity(Path path) const {
  return path == Path::kDecode ? layout_.decode.row_capacity : layout_.slot.row_capacity;
}

std::byte* CudaExchange::PeerRows(int rank) const {
  std::byte* heap = rank == config_.base.rank ? heap_.data() : peers_[rank].data();
  return heap + layout_.slots + layout_.slot.rows;
}

absl::Status CudaExchange::CheckWaits() const {
  return StatusOfWaits(Wait().report, config_.base.rank, config_.base.peer_timeout);
}

void CudaExchange::Abort() {
  aborted_ = true;
  *host_words_.as<volatile std::uint32_t>() = 1;
}

}  // namespace epserve::runtime
