#include "runtime/alltoallv/nccl_exchange.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "runtime/alltoallv/cuda_layout.h"
#include "runtime/alltoallv/device_limits.h"
#include "runtime/alltoallv/nccl_kernels.h"
#include "runtime/base/cuda_stream.h"
#include "runtime/base/status.h"

namespace epserve::runtime {
namespace {

// Of kernels that only move rows within this device and wait for nobody, so that they may fill it:
// one or two blocks, as large as they are, on each of an H200's 132 multiprocessors.
constexpr int kPackBlocks = 132;
constexpr int kGatherBlocks = 2 * 132;
constexpr int kSumBlocks = 2 * 132;

constexpr std::size_t kWordsOffset = 64;  // of the watch's words, after NoWait's
static_assert(sizeof(std::uint64_t) + sizeof(WaitReport) <= kWordsOffset);
constexpr int kStages = 2;  // of a lane: dispatch, combine
constexpr absl::Duration kPause = absl::Microseconds(200);

// Bytes of a connection's first transfer.
constexpr std::size_t kGreetingBytes = kFlagStrideBytes;

static_assert(sizeof(ncclUniqueId) == sizeof(NcclHandle::unique_id));

absl::Status Validate(const NcclExchangeConfig& config) {
  EPS_RETURN_IF_ERROR(CheckDeviceConfig("nccl exchange", config.base));
  if (config.max_decode_tokens < 0 || config.comm_blocks < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("nccl exchange: max_decode_tokens ", config.max_decode_tokens,
                     " and comm_blocks ", config.comm_blocks, " must be at least 0 and 1"));
  }
  return absl::OkStatus();
}

// Raised when what ranks send each other changes.
constexpr std::int64_t kTransferProtocol = 2;

std::uint64_t DigestOf(const NcclExchangeConfig& config) {
  return DigestOfDeviceConfig(config.base)
      .Add(kTransferProtocol)
      .Add(config.max_decode_tokens)
      .Add(config.max_element_bytes)
      .Add(static_cast<std::int64_t>(config.settings_digest))
      .value();
}

// One area takes what is received, or what is to be sent, in either direction: at most a whole
// batch's tokens that come from all ranks, and a shard's that go to all.
AreaLayout LayoutOf(const NcclExchangeConfig& config, bool decode) {
  const ExchangeConfig& base = config.base;
  const CudaHeapShape shape{base.num_ranks,
                            base.num_slots,
                            base.max_topk,
                            base.hidden,
                            base.max_batch_tokens,
                            config.max_decode_tokens,
                            config.max_element_bytes,
                            /*num_experts=*/0};
  const std::int64_t shard =
      decode ? config.max_decode_tokens : MaxShardTokens(base.max_batch_tokens, base.num_ranks);
  return MakeAreaLayout(shape, shard * base.num_ranks, shard * base.num_ranks);
}

int NumLanes(const NcclExchangeConfig& config) {
  return config.base.num_slots + (config.max_decode_tokens > 0 ? 1 : 0);
}

NcclLanesConfig LanesConfigOf(const NcclExchangeConfig& config) {
  return {config.base.rank, config.base.num_ranks, NumLanes(config), config.comm_blocks};
}

}  // namespace

// A lane's two areas, what it needs beside them, and what its present batch looks like.
struct NcclExchange::Lane {
  bool decode = false;
  std::int64_t max_tokens = 0;  // of this rank
  AreaLayout layout;
  DeviceBuffer areas;          // the receiving area, then the sending one
  DeviceBuffer send_position;  // i32 [T, R]
  DeviceBuffer send_counts;    // i32 [R], decode path
  DeviceBuffer expert_index;   // i32 [row_capacity, K]
  DeviceBuffer expert_offset;  // i32 [E_local + 1]

  int topk = 0;
  // Rows to and from each rank, and where they begin: sent ones in the sending area in dispatch and
  // in the receiving one in combine, received ones the other way round.
  std::int32_t rows_to[kMaxCudaRanks] = {};
  std::int32_t rows_from[kMaxCudaRanks] = {};
  std::int32_t send_base[kMaxCudaRanks] = {};
  std::int32_t recv_base[kMaxCudaRanks] = {};

  std::byte* receiving() const { return areas.as<std::byte>(); }
  std::byte* sending() const { return areas.as<std::byte>() + layout.bytes; }
  // What the kernels are told of rows_from.
  void CopyArrived(std::int32_t* base, std::int32_t* rows) const {
    std::copy_n(recv_base, kMaxCudaRanks, base);
    for (int r = 0; r < kMaxCudaRanks; ++r) rows[r] = decode ? -1 : rows_from[r];
  }
};

NcclExchange::NcclExchange(const NcclApi& api, const NcclExchangeConfig& config)
    : config_(config), api_(api), lanes_(api, LanesConfigOf(config)) {}

NcclExchange::~NcclExchange() = default;

std::int64_t NcclExchange::DeviceBytes(const NcclExchangeConfig& config) {
  const ExchangeConfig& base = config.base;
  std::int64_t bytes = 0;
  for (int i = 0; i < NumLanes(config); ++i) {
    const AreaLayout layout = LayoutOf(config, /*decode=*/i == base.num_slots);
    bytes += 2 * layout.bytes + 4 * (layout.row_capacity * (1 + base.max_topk) + base.num_ranks +
                                     base.placement.num_local_experts(base.rank) + 1);
  }
  return bytes;
}

absl::StatusOr<std::unique_ptr<NcclExchange>> NcclExchange::Create(
    const NcclExchangeConfig& config) {
  EPS_RETURN_IF_ERROR(Validate(config));
  EPS_ASSIGN_OR_RETURN(const NcclApi* api, LoadNcclApi());
  std::unique_ptr<NcclExchange> exchange(new NcclExchange(*api, config));
  EPS_RETURN_IF_ERROR(exchange->Initialize());
  return exchange;
}

absl::Status NcclExchange::Initialize() {
  const ExchangeConfig& base = config_.base;
  EPS_RETURN_IF_ERROR(LoadDispatchKernels());
  EPS_RETURN_IF_ERROR(LoadCombineKernels());
  EPS_RETURN_IF_ERROR(LoadExpertLayoutKernels());
  EPS_RETURN_IF_ERROR(LoadNcclKernels());
  const int num_lanes = NumLanes(config_);
  for (int i = 0; i < num_lanes; ++i) {
    auto lane = std::make_unique<Lane>();
    lane->decode = i == base.num_slots;
    lane->layout = LayoutOf(config_, lane->decode);
    lane->max_tokens = lane->layout.row_capacity / base.num_ranks;
    EPS_ASSIGN_OR_RETURN(lane->areas, DeviceBuffer::Create(2 * lane->layout.bytes));
    EPS_ASSIGN_OR_RETURN(lane->send_position, DeviceBuffer::Create(4 * lane->layout.row_capacity));
    EPS_ASSIGN_OR_RETURN(lane->send_counts, DeviceBuffer::Create(4 * base.num_ranks));
    EPS_ASSIGN_OR_RETURN(lane->expert_index,
                         DeviceBuffer::Create(4 * lane->layout.row_capacity * base.max_topk));
    EPS_ASSIGN_OR_RETURN(
        lane->expert_offset,
        DeviceBuffer::Create(4 * (base.placement.num_local_experts(base.rank) + 1)));
    memory_.push_back(std::move(lane));
  }
  const std::size_t num_words = static_cast<std::size_t>(num_lanes) * kStages;
  const std::size_t word_bytes = kWordsOffset + num_words * sizeof(std::uint64_t);
  EPS_ASSIGN_OR_RETURN(report_claim_, DeviceBuffer::Create(sizeof(std::uint32_t)));
  EPS_ASSIGN_OR_RETURN(host_words_, PinnedBuffer::Create(word_bytes));
  std::memset(host_words_.as<std::byte>(), 0, word_bytes);
  EPS_CUDA_RETURN_IF_ERROR(cudaDeviceSynchronize());

  own_.rank = base.rank;
  own_.epoch = base.epoch;
  own_.settings_digest = DigestOf(config_);
  if (base.rank == 0) {
    ncclUniqueId id;
    EPS_RETURN_IF_ERROR(NcclStatus(api_, api_.GetUniqueId(&id), "ncclGetUniqueId", nullptr));
    std::memcpy(own_.unique_id.data(), &id, sizeof(id));
  }
  handle_ = EncodeNcclHandle(own_);

  NcclWatchConfig watch;
  watch.rank = base.rank;
  watch.timeout = base.peer_timeout;
  watch.words = {reinterpret_cast<std::uint64_t*>(host_words_.as<std::byte>() + kWordsOffset),
                 num_words};
  for (int i = 0; i < num_lanes; ++i) {
    watch.stages.insert(watch.stages.end(), {"dispatch", "combine"});
  }
  watch.check_errors = [this] { return lanes_.CheckErrors(); };
  watch.abort = [this] { lanes_.Abort(); };
  watch_ = std::make_unique<NcclWatch>(std::move(watch));
  return absl::OkStatus();
}

absl::Status NcclExchange::OpenPeers(std::span<const std::string> handles, absl::Duration timeout) {
  const ExchangeConfig& base = config_.base;
  const Deadline deadline(timeout);
  if (handles.size() != static_cast<std::size_t>(base.num_ranks)) {
    return absl::InvalidArgumentError(absl::StrCat("open peers: ", handles.size(),
                                                   " handles are not one for each of the ",
                                                   base.num_ranks, " ranks"));
  }
  NcclHandle first = own_;
  for (int r = 0; r < base.num_ranks; ++r) {
    if (r == base.rank) continue;
    EPS_ASSIGN_OR_RETURN(const NcclHandle peer, DecodeNcclHandle(handles[r]));
    EPS_RETURN_IF_ERROR(CheckNcclHandle(peer, r, own_));
    if (r == 0) first = peer;
  }
  ncclUniqueId id;
  std::memcpy(&id, first.unique_id.data(), sizeof(id));
  absl::Status status = lanes_.Open(id, deadline);
  if (status.ok()) status = Connect(deadline);
  opened_ = status.ok();
  // Whoever was interrupted does not know by what; the watch does.
  if (absl::IsAborted(status) && !watch_->status().ok()) return watch_->status();
  return status;
}

// NCCL connects two ranks, and takes memory for it, at their first transfer: which is this one.
absl::Status NcclExchange::Connect(const Deadline& deadline) {
  const ExchangeConfig& base = config_.base;
  Stream stream;
  EPS_RETURN_IF_ERROR(stream.Create());
  for (std::size_t i = 0; i < memory_.size(); ++i) {
    const Lane& lane = *memory_[i];
    std::vector<NcclTransfer> greetings;
    for (int peer = 0; peer < base.num_ranks; ++peer) {
      if (peer == base.rank) continue;
      const std::size_t at = lane.layout.arrivals + peer * kGreetingBytes;
      greetings.push_back(
          {peer, lane.sending() + at, kGreetingBytes, lane.receiving() + at, kGreetingBytes});
    }
    EPS_RETURN_IF_ERROR(
        lanes_.Exchange(static_cast<int>(i), greetings, stream.get(), deadline.left()));
  }
  for (;;) {
    const cudaError_t state = cudaStreamQuery(stream.get());
    EPS_RETURN_IF_ERROR(CheckWaits());
    if (state == cudaSuccess) return absl::OkStatus();
    if (state != cudaErrorNotReady) {
      return CudaStatus(state, "cudaStreamQuery", __FILE__, __LINE__);
    }
    if (deadline.passed()) {
      return absl::UnavailableError(absl::StrCat("open peers: rank ", base.rank,
                                                 " waited in vain for its peers' first bytes"));
    }
    absl::SleepFor(kPause);
  }
}

int NcclExchange::LaneIndex(Path path, int slot) const {
  return path == Path::kDecode ? config_.base.num_slots : slot;
}

absl::StatusOr<NcclExchange::Lane*> NcclExchange::LaneFor(const char* operation, Path path,
                                                          int slot) const {
  if (!opened_) {
    return absl::FailedPreconditionError(
        absl::StrCat(operation, ": the peers are not opened; call OpenPeers first"));
  }
  const int index = LaneIndex(path, slot);
  if (index < 0 || static_cast<std::size_t>(index) >= memory_.size()) {
    return absl::FailedPreconditionError(absl::StrCat(operation, ": the decode path, or slot ",
                                                      slot,
                                                      ", was not asked for at Create; set "
                                                      "max_decode_tokens or num_slots"));
  }
  return memory_[static_cast<std::size_t>(index)].get();
}

void NcclExchange::PlaceRows(const CountMatrix* counts, Lane& lane) const {
  const int rank = config_.base.rank;
  for (int r = 0; r < config_.base.num_ranks; ++r) {
    if (lane.decode) {
      const auto rows = static_cast<std::int32_t>(config_.max_decode_tokens);
      lane.rows_to[r] = lane.rows_from[r] = rows;
      lane.send_base[r] = lane.recv_base[r] = r * rows;
    } else {
      lane.rows_to[r] = counts->at(rank, r);
      lane.rows_from[r] = counts->at(r, rank);
      lane.send_base[r] = static_cast<std::int32_t>(counts->SendOffset(rank, r));
      lane.recv_base[r] = static_cast<std::int32_t>(counts->ReceiveOffset(r, rank));
    }
  }
}

// Every peer's heap is the sending area; `use` stays 0, so that the kernels wait for nobody.
AreaView NcclExchange::ViewOf(const Lane& lane) const {
  AreaView view{};
  for (int r = 0; r < config_.base.num_ranks; ++r) {
    view.heap[r] = r == config_.base.rank ? lane.receiving() : lane.sending();
  }
  view.layout = lane.layout;
  view.rank = config_.base.rank;
  view.num_ranks = config_.base.num_ranks;
  return view;
}

WaitControl NcclExchange::NoWait() const {
  return {host_words_.as<std::uint32_t>(),
          reinterpret_cast<WaitReport*>(host_words_.as<std::byte>() + sizeof(std::uint64_t)),
          absl::ToInt64Nanoseconds(config_.base.peer_timeout), report_claim_.as<std::uint32_t>()};
}

absl::Status NcclExchange::Pack(const CudaTokens& tokens, Lane& lane, cudaStream_t stream) const {
  const ExchangeConfig& base = config_.base;
  CudaDispatchArgs args{};
  args.area = ViewOf(lane);
  args.x = tokens.x;
  args.topk_ids = tokens.topk_ids;
  args.topk_weights = tokens.topk_weights;
  args.send_position = lane.send_position.as<std::int32_t>();
  args.num_tokens = tokens.num_tokens;
  args.hidden = base.hidden;
  args.topk = tokens.topk;
  args.dtype = tokens.dtype;
  args.payload = tokens.payload;
  args.num_blocks = kPackBlocks;
  args.wait = NoWait();
  for (int r = 0; r <= base.num_ranks; ++r) {
    args.first_expert[r] = static_cast<std::int32_t>(base.placement.first_expert[r]);
  }
  for (int r = 0; r < base.num_ranks; ++r) {
    args.row_base[r] = r == base.rank ? lane.recv_base[r] : lane.send_base[r];
    args.row_limit[r] = lane.rows_to[r];
  }
  EPS_RETURN_IF_ERROR(LaunchDispatch(args, stream));
  if (!lane.decode) return absl::OkStatus();
  auto* const counts = lane.send_counts.as<std::int32_t>();
  return LaunchRowsToRank(args.send_position, tokens.num_tokens, base.num_ranks, counts, stream);
}

std::vector<NcclTransfer> NcclExchange::DispatchTransfers(const CudaTokens& tokens,
                                                          const Lane& lane) const {
  const AreaLayout& layout = lane.layout;
  const bool fp8 = tokens.payload == RowPayload::kFp8;
  const std::int64_t hidden = config_.base.hidden;
  struct Section {
    std::int64_t offset;
    std::int64_t row_bytes;
  };
  std::vector<Section> sections = {
      {layout.notes, layout.note_bytes},
      {layout.rows, fp8 ? hidden : hidden * static_cast<std::int64_t>(DataTypeBytes(tokens.dtype))},
  };
  if (fp8) sections.push_back({layout.scales, layout.scale_bytes});
  std::vector<NcclTransfer> transfers;
  for (int step = 1; step < config_.base.num_ranks; ++step) {
    const int peer = (config_.base.rank + step) % config_.base.num_ranks;
    if (lane.decode) {
      const auto* const counts = lane.send_counts.as<std::int32_t>();
      auto* const arrived = reinterpret_cast<std::int32_t*>(lane.receiving() + layout.counts);
      transfers.push_back({peer, counts + peer, 4, arrived + peer, 4});
    }
    for (const Section& s : sections) {
      transfers.push_back({peer, lane.sending() + s.offset + lane.send_base[peer] * s.row_bytes,
                           static_cast<std::size_t>(lane.rows_to[peer] * s.row_bytes),
                           lane.receiving() + s.offset + lane.recv_base[peer] * s.row_bytes,
                           static_cast<std::size_t>(lane.rows_from[peer] * s.row_bytes)});
    }
  }
  return transfers;
}

// A partial row goes back for each row that came, so the two directions change places.
std::vector<NcclTransfer> NcclExchange::CombineTransfers(const CudaTokens& tokens,
                                                         const Lane& lane) const {
  const std::int64_t row_bytes =
      config_.base.hidden * static_cast<std::int64_t>(DataTypeBytes(tokens.dtype));
  const std::int64_t partials = lane.layout.partials;
  std::vector<NcclTransfer> transfers;
  for (int step = 1; step < config_.base.num_ranks; ++step) {
    const int peer = (config_.base.rank + step) % config_.base.num_ranks;
    transfers.push_back({peer, lane.sending() + partials + lane.recv_base[peer] * row_bytes,
                         static_cast<std::size_t>(lane.rows_from[peer] * row_bytes),
                         lane.receiving() + partials + lane.send_base[peer] * row_bytes,
                         static_cast<std::size_t>(lane.rows_to[peer] * row_bytes)});
  }
  return transfers;
}

absl::Status NcclExchange::Carry(int lane, WaitStage stage, std::span<const NcclTransfer> transfers,
                                 cudaStream_t stream) {
  auto* const words = reinterpret_cast<std::uint64_t*>(host_words_.as<std::byte>() + kWordsOffset);
  std::uint64_t* const word = words + lane * kStages + (stage == WaitStage::kCombine ? 1 : 0);
  EPS_RETURN_IF_ERROR(LaunchCount(word, stream));
  EPS_RETURN_IF_ERROR(lanes_.Exchange(lane, transfers, stream, config_.base.peer_timeout));
  return LaunchCount(word, stream);
}

absl::Status NcclExchange::Dispatch(Path path, int slot, const CudaTokens& tokens,
                                    const CountMatrix* counts, cudaStream_t stream) {
  EPS_ASSIGN_OR_RETURN(Lane * lane, LaneFor("dispatch", path, slot));
  const ExchangeConfig& base = config_.base;
  EPS_RETURN_IF_ERROR(
      CheckDeviceTokens(tokens, {lane->max_tokens, base.max_topk, config_.max_element_bytes}));
  if (!lane->decode && counts == nullptr) {
    return absl::InvalidArgumentError(
        "dispatch: counts is null; transfers of NCCL are posted by the count matrix");
  }
  if (!lane->decode) {
    EPS_RETURN_IF_ERROR(ValidateCountMatrix(*counts, base.placement, base.max_batch_tokens));
  }
  lane->topk = tokens.topk;
  PlaceRows(counts, *lane);
  EPS_RETURN_IF_ERROR(Pack(tokens, *lane, stream));
  return Carry(LaneIndex(path, slot), WaitStage::kDispatch, DispatchTransfers(tokens, *lane),
               stream);
}

absl::Status NcclExchange::LayOutExperts(Path path, int slot, cudaStream_t stream) {
  EPS_ASSIGN_OR_RETURN(Lane * lane, LaneFor("lay out experts", path, slot));
  ExpertLayoutArgs args{};
  args.wait = NoWait();
  args.area = ViewOf(*lane);
  lane->CopyArrived(args.recv_base, args.recv_rows);
  args.topk = lane->topk;
  args.num_local_experts =
      static_cast<int>(config_.base.placement.num_local_experts(config_.base.rank));
  args.expert_index = lane->expert_index.as<std::int32_t>();
  args.expert_offset = lane->expert_offset.as<std::int32_t>();
  return LaunchExpertLayout(args, stream);
}

absl::Status NcclExchange::Gather(Path path, int slot, const CudaTokens& tokens,
                                  void* expert_inputs, cudaStream_t stream) {
  EPS_ASSIGN_OR_RETURN(const Lane* lane, LaneFor("gather", path, slot));
  GatherArgs args{};
  args.wait = NoWait();
  args.area = ViewOf(*lane);
  lane->CopyArrived(args.recv_base, args.recv_rows);
  args.x = tokens.x;
  args.expert_index = lane->expert_index.as<std::int32_t>();
  args.expert_inputs = expert_inputs;
  args.hidden = config_.base.hidden;
  args.topk = tokens.topk;
  args.dtype = tokens.dtype;
  args.payload = tokens.payload;
  args.num_blocks = kGatherBlocks;
  return LaunchGather(args, stream);
}

absl::Status NcclExchange::Combine(Path path, int slot, const CudaTokens& tokens,
                                   const void* expert_rows, void* out, cudaStream_t stream) {
  EPS_ASSIGN_OR_RETURN(const Lane* lane, LaneFor("combine", path, slot));
  const int rank = config_.base.rank;
  CudaCombineArgs args{};
  args.area = ViewOf(*lane);
  args.expert_rows = expert_rows;
  args.expert_index = lane->expert_index.as<std::int32_t>();
  args.send_position = lane->send_position.as<std::int32_t>();
  args.out = out;
  args.hidden = config_.base.hidden;
  args.topk = tokens.topk;
  args.dtype = tokens.dtype;
  args.wait = NoWait();
  std::copy_n(lane->send_base, kMaxCudaRanks, args.partial_base);
  // The first launch has rows and no tokens: it takes the partial rows. The second has tokens and
  // no rows: it adds those that have come.
  lane->CopyArrived(args.recv_base, args.recv_rows);
  std::copy_n(lane->recv_base, kMaxCudaRanks, args.return_base);
  args.return_base[rank] = lane->send_base[rank];
  args.merged_roles = lane->decode;
  args.push_blocks = kSumBlocks;
  args.reduce_blocks = lane->decode ? kSumBlocks : 1;
  EPS_RETURN_IF_ERROR(LaunchCombine(args, stream));
  EPS_RETURN_IF_ERROR(
      Carry(LaneIndex(path, slot), WaitStage::kCombine, CombineTransfers(tokens, *lane), stream));
  std::fill_n(args.recv_rows, kMaxCudaRanks, 0);
  args.num_tokens = tokens.num_tokens;
  std::swap(args.push_blocks, args.reduce_blocks);
  return LaunchCombine(args, stream);
}

const std::int32_t* NcclExchange::expert_offset(Path path, int slot) const {
  return memory_[static_cast<std::size_t>(LaneIndex(path, slot))]->expert_offset.as<std::int32_t>();
}

std::int64_t NcclExchange::row_capacity(Path path) const {
  return memory_[static_cast<std::size_t>(LaneIndex(path, 0))]->layout.row_capacity;
}

absl::Status NcclExchange::CheckWaits() const {
  EPS_RETURN_IF_ERROR(watch_->status());
  return lanes_.CheckErrors();
}

void NcclExchange::Abort() { watch_->Abort(); }

}  // namespace epserve::runtime
