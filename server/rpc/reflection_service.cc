#include "server/rpc/reflection_service.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/descriptor.pb.h>

#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "grpc/reflection/v1alpha/reflection.pb.h"
#include "server/rpc/message_stream.h"

namespace epserve::server {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::DescriptorPool;
using google::protobuf::FieldDescriptor;
using google::protobuf::FileDescriptor;
using grpc::reflection::v1alpha::ServerReflectionRequest;
using grpc::reflection::v1alpha::ServerReflectionResponse;
using Services = std::shared_ptr<const std::vector<std::string>>;

void AddFile(const FileDescriptor* file, std::set<const FileDescriptor*>* seen,
             ServerReflectionResponse* response) {
  if (!seen->insert(file).second) return;
  google::protobuf::FileDescriptorProto proto;
  file->CopyTo(&proto);
  *response->mutable_file_descriptor_response()->add_file_descriptor_proto() =
      proto.SerializeAsString();
  for (int i = 0; i < file->dependency_count(); ++i) AddFile(file->dependency(i), seen, response);
}

absl::Status AddFile(const FileDescriptor* file, const std::string& asked,
                     ServerReflectionResponse* response) {
  if (file == nullptr) {
    return absl::NotFoundError(absl::StrCat("reflection: \"", asked, "\" is not known"));
  }
  std::set<const FileDescriptor*> seen;
  AddFile(file, &seen, response);
  return absl::OkStatus();
}

absl::Status AddExtension(const ServerReflectionRequest& request,
                          ServerReflectionResponse* response) {
  const DescriptorPool* pool = DescriptorPool::generated_pool();
  const auto& asked = request.file_containing_extension();
  const Descriptor* type = pool->FindMessageTypeByName(asked.containing_type());
  const FieldDescriptor* extension =
      type == nullptr ? nullptr : pool->FindExtensionByNumber(type, asked.extension_number());
  return AddFile(extension == nullptr ? nullptr : extension->file(),
                 absl::StrCat(asked.containing_type(), " extension ", asked.extension_number()),
                 response);
}

absl::Status AddExtensionNumbers(const std::string& name, ServerReflectionResponse* response) {
  const DescriptorPool* pool = DescriptorPool::generated_pool();
  const Descriptor* type = pool->FindMessageTypeByName(name);
  if (type == nullptr) {
    return absl::NotFoundError(absl::StrCat("reflection: \"", name, "\" is not known"));
  }
  std::vector<const FieldDescriptor*> extensions;
  pool->FindAllExtensions(type, &extensions);
  auto* numbers = response->mutable_all_extension_numbers_response();
  numbers->set_base_type_name(name);
  for (const FieldDescriptor* extension : extensions) {
    numbers->add_extension_number(extension->number());
  }
  return absl::OkStatus();
}

absl::Status Fill(const Services& services, const ServerReflectionRequest& request,
                  ServerReflectionResponse* response) {
  const DescriptorPool* pool = DescriptorPool::generated_pool();
  switch (request.message_request_case()) {
    case ServerReflectionRequest::kFileByFilename:
      return AddFile(pool->FindFileByName(request.file_by_filename()), request.file_by_filename(),
                     response);
    case ServerReflectionRequest::kFileContainingSymbol:
      return AddFile(pool->FindFileContainingSymbol(request.file_containing_symbol()),
                     request.file_containing_symbol(), response);
    case ServerReflectionRequest::kFileContainingExtension:
      return AddExtension(request, response);
    case ServerReflectionRequest::kAllExtensionNumbersOfType:
      return AddExtensionNumbers(request.all_extension_numbers_of_type(), response);
    case ServerReflectionRequest::kListServices:
      for (const std::string& name : *services) {
        response->mutable_list_services_response()->add_service()->set_name(name);
      }
      return absl::OkStatus();
    case ServerReflectionRequest::MESSAGE_REQUEST_NOT_SET:
      break;
  }
  return absl::InvalidArgumentError("reflection: the request asks for nothing that is known");
}

ServerReflectionResponse Answer(const Services& services, const ServerReflectionRequest& request) {
  ServerReflectionResponse response;
  response.set_valid_host(request.host());
  *response.mutable_original_request() = request;
  const absl::Status status = Fill(services, request, &response);
  if (!status.ok()) {
    auto* error = response.mutable_error_response();
    error->set_error_code(static_cast<int>(status.code()));
    error->set_error_message(std::string(status.message()));
  }
  return response;
}

}  // namespace

void AddReflection(RpcServer* server) {
  std::vector<std::string> names = server->services();
  names.push_back("grpc.reflection.v1alpha.ServerReflection");
  const Services services = std::make_shared<const std::vector<std::string>>(std::move(names));
  server->Handle("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
                 EachAnswered<ServerReflectionRequest, ServerReflectionResponse>(
                     [services](const ServerReflectionRequest& request) {
                       return Answer(services, request);
                     }));
}

}  // namespace epserve::server
