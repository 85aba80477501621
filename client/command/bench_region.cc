#include "client/command/bench_region.h"

#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/command/format.h"
#include "client/cpp/status.h"

namespace epserve::client {
namespace {

// Of every tensor's place: a cache line.
constexpr std::uint64_t kAlignment = 64;

class Places {
 public:
  std::uint64_t Take(std::uint64_t bytes) {
    const std::uint64_t offset = next_;
    next_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return offset;
  }
  std::uint64_t taken() const { return next_; }

 private:
  std::uint64_t next_ = 0;
};

template <typename Use>
void ForEachInput(InferRequest& request, const Use& use) {
  use(request.hidden_states);
  if (request.topk_ids) use(*request.topk_ids);
  if (request.topk_weights) use(*request.topk_weights);
}

// Unlike any other client's.
std::string RegionName() {
  return absl::StrCat("bench-", ::getpid(), "-", absl::Hex(std::random_device()()));
}

void PlaceIn(const std::string& region, Places& places, InferRequest& request) {
  const std::uint64_t output_bytes = request.hidden_states.bytes.size();
  ForEachInput(request, [&](Tensor& tensor) {
    tensor.place = RegionPlace{region, places.Take(tensor.bytes.size())};
  });
  request.output_place = RegionPlace{region, places.Take(output_bytes)};
}

// A service that does not answer must not keep the process from ending.
constexpr absl::Duration kInterruptionPatience = absl::Seconds(5);

}  // namespace

class BenchRegions::Change {
 public:
  explicit Change(BenchRegions* regions) : regions_(*regions) { Set(true); }
  ~Change() { Set(false); }
  Change(const Change&) = delete;
  Change& operator=(const Change&) = delete;

 private:
  void Set(bool changing) {
    absl::MutexLock lock(&regions_.mutex_);
    regions_.changing_ = changing;
  }
  BenchRegions& regions_;
};

BenchRegions::BenchRegions(Interruption* interruption) : interruption_(interruption) {
  interruption_->SetCleanup([this] { OnInterruption(); });
}

BenchRegions::~BenchRegions() {
  {
    const Change change(this);
    system_ = nullptr;
    cuda_.clear();
  }
  interruption_->SetCleanup(nullptr);
}

// The load goes on meanwhile: its requests under way end as ever, and later ones find no region.
void BenchRegions::OnInterruption() {
  const absl::Time deadline = absl::Now() + kInterruptionPatience;
  const auto warn = [](const absl::Status& status) {
    std::fprintf(stderr, "epserve bench: interrupted; regions may stay registered: %s\n",
                 Printable(std::string(status.message())).c_str());
  };
  absl::MutexLock lock(&mutex_);
  const auto settled = [this]() ABSL_NO_THREAD_SAFETY_ANALYSIS { return !changing_; };
  if (!mutex_.AwaitWithDeadline(absl::Condition(&settled), deadline)) {
    return warn(absl::DeadlineExceededError("the service has not answered yet"));
  }
  absl::Status outcome;
  if (system_ != nullptr) outcome.Update(system_->Unregister(deadline - absl::Now()));
  for (const auto& region : cuda_) outcome.Update(region->Unregister(deadline - absl::Now()));
  if (!outcome.ok()) warn(outcome);
}

absl::Status BenchRegions::MoveToSystem(InferenceClient* client, const std::string& key_prefix,
                                        std::vector<InferRequest>* requests) {
  const std::string name = RegionName();
  Places places;
  for (InferRequest& request : *requests) PlaceIn(name, places, request);
  const Change change(this);
  EPC_ASSIGN_OR_RETURN(
      system_, SharedRegion::Create(client, name, places.taken(), {.key_prefix = key_prefix}));
  for (InferRequest& request : *requests) {
    ForEachInput(request, [&](Tensor& tensor) {
      std::memcpy(system_->bytes().data() + tensor.place->offset_bytes, tensor.bytes.data(),
                  tensor.bytes.size());
      tensor.bytes = TensorBytes();
    });
  }
  return absl::OkStatus();
}

absl::Status BenchRegions::MoveToCuda(InferenceClient* client, int device,
                                      std::vector<InferRequest>* requests) {
  for (InferRequest& request : *requests) {
    Places places;
    const std::string name = RegionName();
    PlaceIn(name, places, request);
    const Change change(this);
    EPC_ASSIGN_OR_RETURN(std::unique_ptr<CudaRegion> region,
                         CudaRegion::Create(client, name, places.taken(), device));
    absl::Status written;
    ForEachInput(request, [&](Tensor& tensor) {
      written.Update(
          region->memory().Write(tensor.place->offset_bytes, std::string_view(tensor.bytes)));
      tensor.bytes = TensorBytes();
    });
    EPC_RETURN_IF_ERROR(written);
    cuda_.push_back(std::move(region));
  }
  return absl::OkStatus();
}

}  // namespace epserve::client
