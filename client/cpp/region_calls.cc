// InferenceClient's calls about shared memory.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/cpp/channel.h"
#include "client/cpp/client.h"
#include "client/cpp/client_core.h"
#include "client/cpp/status.h"

namespace epserve::client {
namespace {

// To the service an empty name means every region, other clients' too.
absl::Status CheckNamed(const std::string& name) {
  if (!name.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError("unregister region: name is empty; name one");
}

// What `describe` makes of each of a response's regions, by name.
template <typename Regions, typename Describe>
auto ByName(const Regions& regions, const Describe& describe) {
  using Description = decltype(describe(regions.begin()->second));
  std::vector<Description> descriptions;
  for (const auto& [name, region] : regions) descriptions.push_back(describe(region));
  std::sort(descriptions.begin(), descriptions.end(),
            [](const Description& a, const Description& b) { return a.name < b.name; });
  return descriptions;
}

}  // namespace

absl::Status InferenceClient::RegisterRegion(const RegionDescription& region,
                                             absl::Duration timeout) {
  grpc::ClientContext context;
  StartCall(*core_->channel, context, timeout);
  inference::SystemSharedMemoryRegisterRequest request;
  request.set_name(region.name);
  request.set_key(region.key);
  request.set_offset(region.offset_bytes);
  request.set_byte_size(region.size_bytes);
  inference::SystemSharedMemoryRegisterResponse response;
  return FromGrpcStatus(core_->stub->SystemSharedMemoryRegister(&context, request, &response));
}

absl::Status InferenceClient::UnregisterRegion(const std::string& name, absl::Duration timeout) {
  EPC_RETURN_IF_ERROR(CheckNamed(name));
  grpc::ClientContext context;
  StartCall(*core_->channel, context, timeout);
  inference::SystemSharedMemoryUnregisterRequest request;
  request.set_name(name);
  inference::SystemSharedMemoryUnregisterResponse response;
  return FromGrpcStatus(core_->stub->SystemSharedMemoryUnregister(&context, request, &response));
}

absl::StatusOr<std::vector<RegionDescription>> InferenceClient::ListRegions(
    absl::Duration timeout) {
  grpc::ClientContext context;
  StartCall(*core_->channel, context, timeout);
  inference::SystemSharedMemoryStatusResponse response;
  EPC_RETURN_IF_ERROR(
      FromGrpcStatus(core_->stub->SystemSharedMemoryStatus(&context, {}, &response)));
  return ByName(response.regions(), [](const auto& region) {
    return RegionDescription{region.name(), region.key(), region.offset(), region.byte_size()};
  });
}

absl::Status InferenceClient::RegisterCudaRegion(const CudaRegionDescription& region,
                                                 absl::Duration timeout) {
  grpc::ClientContext context;
  StartCall(*core_->channel, context, timeout);
  inference::CudaSharedMemoryRegisterRequest request;
  request.set_name(region.name);
  request.set_raw_handle(region.handle);
  request.set_device_id(region.device);
  request.set_byte_size(region.size_bytes);
  inference::CudaSharedMemoryRegisterResponse response;
  return FromGrpcStatus(core_->stub->CudaSharedMemoryRegister(&context, request, &response));
}

absl::Status InferenceClient::UnregisterCudaRegion(const std::string& name,
                                                   absl::Duration timeout) {
  EPC_RETURN_IF_ERROR(CheckNamed(name));
  grpc::ClientContext context;
  StartCall(*core_->channel, context, timeout);
  inference::CudaSharedMemoryUnregisterRequest request;
  request.set_name(name);
  inference::CudaSharedMemoryUnregisterResponse response;
  return FromGrpcStatus(core_->stub->CudaSharedMemoryUnregister(&context, request, &response));
}

absl::StatusOr<std::vector<CudaRegionDescription>> InferenceClient::ListCudaRegions(
    absl::Duration timeout) {
  grpc::ClientContext context;
  StartCall(*core_->channel, context, timeout);
  inference::CudaSharedMemoryStatusResponse response;
  EPC_RETURN_IF_ERROR(FromGrpcStatus(core_->stub->CudaSharedMemoryStatus(&context, {}, &response)));
  return ByName(response.regions(), [](const auto& region) {
    return CudaRegionDescription{region.name(), "", static_cast<std::int64_t>(region.device_id()),
                                 region.byte_size()};
  });
}

}  // namespace epserve::client
