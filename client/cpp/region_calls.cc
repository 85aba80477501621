// InferenceClient's calls about shared memory.
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/cpp/channel.h"
#include "client/cpp/client.h"
#include "client/cpp/client_core.h"
#include "client/cpp/status.h"

namespace epserve::client {

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
  if (name.empty()) {
    // To the service an empty name means every region, other clients' too.
    return absl::InvalidArgumentError("unregister region: name is empty; name one");
  }
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
  std::map<std::string, RegionDescription> by_name;
  for (const auto& [name, region] : response.regions()) {
    by_name[name] = {region.name(), region.key(), region.offset(), region.byte_size()};
  }
  std::vector<RegionDescription> regions;
  for (auto& [name, region] : by_name) regions.push_back(std::move(region));
  return regions;
}

}  // namespace epserve::client
