// gRPC's core describes its objects in JSON; the messages' descriptors are compiled into its own
// channelz library, which has no header for them. So the messages are made from the descriptors.
#include "server/rpc/channelz_service.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>
#include <google/protobuf/util/json_util.h>
#include <grpc/grpc.h>
#include <grpc/support/alloc.h>
#include <grpcpp/ext/channelz_service_plugin.h>

#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "server/rpc/messages.h"
#include "server/rpc/unary_call.h"

namespace epserve::server {
namespace {

using google::protobuf::DescriptorPool;
using google::protobuf::Message;
using google::protobuf::MessageFactory;

// Naming one of its symbols keeps the library, and so the descriptors, in the program.
void (*volatile const kLibraryIsLinked)() = &grpc::channelz::experimental::InitChannelzService;

std::unique_ptr<Message> NewMessage(const std::string& name) {
  const auto* type = DescriptorPool::generated_pool()->FindMessageTypeByName(
      absl::StrCat("grpc.channelz.v1.", name));
  if (type == nullptr || kLibraryIsLinked == nullptr) return nullptr;
  return std::unique_ptr<Message>(MessageFactory::generated_factory()->GetPrototype(type)->New());
}

std::int64_t IntField(const Message& message, const std::string& field) {
  return message.GetReflection()->GetInt64(message,
                                           message.GetDescriptor()->FindFieldByName(field));
}

using Describe = char* (*)(const Message& request);

struct Method {
  const char* name;   // of the method; its messages are <name>Request and <name>Response
  Describe describe;  // JSON that the core allocates; null: no such object
};

constexpr Method kMethods[] = {
    {"GetTopChannels",
     [](const Message& m) {
       return grpc_channelz_get_top_channels(IntField(m, "start_channel_id"));
     }},
    {"GetServers",
     [](const Message& m) { return grpc_channelz_get_servers(IntField(m, "start_server_id")); }},
    {"GetServer",
     [](const Message& m) { return grpc_channelz_get_server(IntField(m, "server_id")); }},
    {"GetServerSockets",
     [](const Message& m) {
       return grpc_channelz_get_server_sockets(
           IntField(m, "server_id"), IntField(m, "start_socket_id"), IntField(m, "max_results"));
     }},
    {"GetChannel",
     [](const Message& m) { return grpc_channelz_get_channel(IntField(m, "channel_id")); }},
    {"GetSubchannel",
     [](const Message& m) { return grpc_channelz_get_subchannel(IntField(m, "subchannel_id")); }},
    {"GetSocket",
     [](const Message& m) { return grpc_channelz_get_socket(IntField(m, "socket_id")); }},
};

absl::Status Fill(const Method& method, const grpc::ByteBuffer& bytes,
                  std::unique_ptr<Message>* response) {
  const std::unique_ptr<Message> request = NewMessage(absl::StrCat(method.name, "Request"));
  *response = NewMessage(absl::StrCat(method.name, "Response"));
  if (request == nullptr || *response == nullptr) {
    return absl::InternalError("channelz: gRPC's library has no descriptors of its messages");
  }
  absl::Status status = ParseMessage(bytes, request.get());
  if (!status.ok()) return status;
  const std::unique_ptr<char, decltype(&gpr_free)> json(method.describe(*request), &gpr_free);
  if (json == nullptr) {
    return absl::NotFoundError(absl::StrCat("channelz: ", method.name, " found no such object"));
  }
  const auto parsed = google::protobuf::util::JsonStringToMessage(json.get(), response->get());
  if (!parsed.ok()) {
    return absl::InternalError(absl::StrCat("channelz: ", parsed.ToString()));
  }
  return absl::OkStatus();
}

}  // namespace

void AddChannelz(RpcServer* server) {
  for (const Method& method : kMethods) {
    server->Handle(absl::StrCat("/grpc.channelz.v1.Channelz/", method.name),
                   UnaryHandler([&method](UnaryCall call, const grpc::ByteBuffer& bytes) {
                     std::unique_ptr<Message> response;
                     const absl::Status status = Fill(method, bytes, &response);
                     if (!status.ok()) return call.Fail(status);
                     call.Reply(*response);
                   }));
  }
}

}  // namespace epserve::server
