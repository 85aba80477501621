#include "client/command/bench_region.h"

#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
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

}  // namespace

absl::StatusOr<std::unique_ptr<SharedRegion>> MoveToRegion(InferenceClient* client,
                                                           const std::string& key_prefix,
                                                           std::vector<InferRequest>* requests) {
  const std::string name = RegionName();
  Places places;
  for (InferRequest& request : *requests) PlaceIn(name, places, request);
  EPC_ASSIGN_OR_RETURN(
      std::unique_ptr<SharedRegion> region,
      SharedRegion::Create(client, name, places.taken(), {.key_prefix = key_prefix}));
  for (InferRequest& request : *requests) {
    ForEachInput(request, [&](Tensor& tensor) {
      std::memcpy(region->bytes().data() + tensor.place->offset_bytes, tensor.bytes.data(),
                  tensor.bytes.size());
      tensor.bytes = TensorBytes();
    });
  }
  return region;
}

absl::StatusOr<std::vector<std::unique_ptr<CudaRegion>>> MoveToCudaRegions(
    InferenceClient* client, int device, std::vector<InferRequest>* requests) {
  std::vector<std::unique_ptr<CudaRegion>> regions;
  for (InferRequest& request : *requests) {
    Places places;
    const std::string name = RegionName();
    PlaceIn(name, places, request);
    EPC_ASSIGN_OR_RETURN(std::unique_ptr<CudaRegion> region,
                         CudaRegion::Create(client, name, places.taken(), device));
    absl::Status written;
    ForEachInput(request, [&](Tensor& tensor) {
      written.Update(
          region->memory().Write(tensor.place->offset_bytes, std::string_view(tensor.bytes)));
      tensor.bytes = TensorBytes();
    });
    EPC_RETURN_IF_ERROR(written);
    regions.push_back(std::move(region));
  }
  return regions;
}

}  // namespace epserve::client
