// Random requests at the front door, from a seed: valid ones spoilt in random fields, and their
// bytes spoilt anywhere. Nothing may crash, every refusal has a message, and whatever passes holds
// every invariant of ValidatedRequest.
//
// EPSERVE_FUZZ_SEED replays a seed that a failure has printed; EPSERVE_FUZZ_ROUNDS goes on longer.
#include <google/protobuf/stubs/logging.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "inference/grpc_service.pb.h"
#include "proto/wire/wire_text.h"
#include "server/coordinator/front_door/infer_proto_convert.h"
#include "server/coordinator/front_door/request_validation.h"
#include "server/coordinator/front_door/shm_registry.h"
#include "tests/server/coordinator/front_door/test_request.h"

namespace epserve::coordinator {
namespace {

using inference::ModelInferRequest;

constexpr std::uint64_t kRegionBytes = 512;
constexpr std::size_t kPartBytes = 100;  // More than any tensor below has.

std::uint64_t FromEnvironment(const char* name, std::uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

class RequestFuzzTest : public testing::Test {
 protected:
  RequestFuzzTest() : object_(kRegionBytes) {
    google::protobuf::SetLogHandler(nullptr);  // Bytes that are no message are expected here.
    ShmOptions options;
    options.allowed = true;
    regions_ = std::make_unique<ShmRegistry>(options);
    EXPECT_TRUE(regions_->Register("region", object_.key(), 0, kRegionBytes).ok());
    model_.has_router = true;
    std::string zeros(kRegionBytes, '\0');
    object_.Write(0, zeros);
  }

  std::size_t Below(std::size_t bound) {
    return std::uniform_int_distribution<std::size_t>(0, bound - 1)(random_);
  }
  bool OneIn(std::size_t n) { return Below(n) == 0; }
  template <typename T>
  T OneOf(std::initializer_list<T> choices) {
    return choices.begin()[Below(choices.size())];
  }

  std::int64_t AnyInt() {
    constexpr std::int64_t kMax = std::numeric_limits<std::int64_t>::max();
    return OneOf<std::int64_t>({0,
                                1,
                                2,
                                3,
                                4,
                                5,
                                7,
                                8,
                                16,
                                17,
                                48,
                                511,
                                512,
                                513,
                                -1,
                                -2,
                                kMax,
                                -kMax - 1,
                                kMax - 47,
                                std::int64_t{1} << 32,
                                (std::int64_t{1} << 32) + 4,
                                std::int64_t{1} << 62});
  }

  std::string AnyName() {
    return OneOf<std::string>({"hidden_states",
                               "topk_ids",
                               "topk_weights",
                               "layer",
                               "timeout",
                               "shared_memory_region",
                               "shared_memory_byte_size",
                               "shared_memory_offset",
                               "region",
                               "tiny",
                               "1",
                               "FP32",
                               "BF16",
                               "FP16",
                               "INT32",
                               "INT64",
                               "FP64",
                               "",
                               "\n",
                               "triton_x"});
  }

  void SetAny(inference::InferParameter& parameter) {
    switch (Below(6)) {
      case 0:
        return parameter.set_bool_param(OneIn(2));
      case 1:
        return parameter.set_int64_param(AnyInt());
      case 2:
        return parameter.set_string_param(AnyName());
      case 3:
        return parameter.set_double_param(static_cast<double>(AnyInt()));
      case 4:
        return parameter.set_uint64_param(static_cast<std::uint64_t>(AnyInt()));
      default:
        return parameter.clear_parameter_choice();
    }
  }

  template <typename Map>
  void PutWindow(Map* parameters, std::int64_t size, std::int64_t offset) {
    (*parameters)["shared_memory_region"].set_string_param("region");
    (*parameters)["shared_memory_byte_size"].set_int64_param(size);
    (*parameters)["shared_memory_offset"].set_int64_param(offset);
  }

  void AddInput(ModelInferRequest& message, const char* name, const char* datatype,
                std::int64_t rows, std::int64_t columns, std::string bytes) {
    auto* input = message.add_inputs();
    input->set_name(name);
    input->set_datatype(datatype);
    input->add_shape(rows);
    input->add_shape(columns);
    if (!bytes.empty() && OneIn(6)) {
      // A part of the region for each tensor, so that none overwrites another's.
      const std::size_t part = static_cast<std::size_t>(message.inputs_size() - 1) * kPartBytes;
      const std::size_t offset = part + Below(kPartBytes - bytes.size() + 1);
      object_.Write(offset, bytes);
      return PutWindow(input->mutable_parameters(), static_cast<std::int64_t>(bytes.size()),
                       static_cast<std::int64_t>(offset));
    }
    message.add_raw_input_contents(std::move(bytes));
  }

  // A valid request of a random shape, types and places.
  ModelInferRequest ValidMessage() {
    ModelInferRequest message;
    message.set_model_name("tiny");
    if (OneIn(2)) message.set_model_version("1");
    if (OneIn(2)) {
      (*message.mutable_parameters())["layer"].set_int64_param(OneOf<std::int64_t>({3, 4, 5, 7}));
    }
    const auto rows = static_cast<std::int64_t>(Below(5));
    const char* type = OneOf<const char*>({"FP32", "FP16", "BF16"});
    const std::size_t element_bytes = std::strcmp(type, "FP32") == 0 ? 4 : 2;
    AddInput(message, "hidden_states", type, rows, 4,
             std::string(static_cast<std::size_t>(rows) * 4 * element_bytes, 'h'));
    if (!OneIn(4)) {
      const std::size_t entries = static_cast<std::size_t>(rows) * 2;
      std::vector<std::int64_t> ids(entries);
      for (auto& id : ids) id = static_cast<std::int64_t>(Below(9)) - 1;
      const bool wide = OneIn(2);
      AddInput(message, "topk_ids", wide ? "INT64" : "INT32", rows, 2,
               wide ? BytesOf(ids) : BytesOf(std::vector<std::int32_t>(ids.begin(), ids.end())));
      AddInput(message, "topk_weights", "FP32", rows, 2,
               BytesOf(std::vector<float>(entries, 0.5f)));
    }
    if (OneIn(2)) {
      auto* output = message.add_outputs();
      output->set_name("hidden_states");
      if (OneIn(2)) PutWindow(output->mutable_parameters(), 128, 300);
    }
    return message;
  }

  // A field as the parser takes it, its length in more bytes than it needs now and then.
  void AppendField(int field, std::string_view bytes, std::string& text) {
    wire::AppendFieldHead(field, bytes.size(), text);
    for (std::size_t i = OneIn(8) ? Below(4) : 0; i > 0; --i) {
      text.back() = static_cast<char>(text.back() | 0x80);
      text.push_back('\0');
    }
    text += bytes;
  }

  // Elements as contents of an input: one packed field, as clients write them, or whatever else is
  // the same to the parser.
  std::string Fp32Contents(std::string_view elements) {
    using Contents = inference::InferTensorContents;
    constexpr int kField = ModelInferRequest::InferInputTensor::kContentsFieldNumber;
    constexpr char kElementTag = Contents::kFp32ContentsFieldNumber << 3 | 5;
    std::string text;
    std::string contents;
    do {
      const std::size_t count = elements.size() / sizeof(float);
      const std::size_t size = OneIn(4) ? Below(count + 1) * sizeof(float) : elements.size();
      if (OneIn(6)) {
        for (std::size_t at = 0; at < size; at += sizeof(float)) {
          contents += kElementTag;
          contents += elements.substr(at, sizeof(float));
        }
      } else {
        AppendField(Contents::kFp32ContentsFieldNumber, elements.substr(0, size), contents);
      }
      elements.remove_prefix(size);
      if (OneIn(6)) AppendField(kField, std::exchange(contents, {}), text);
    } while (!elements.empty());
    AppendField(kField, contents, text);
    return text;
  }

  // The message with typed contents in the place of its raw entries.
  std::string Typed(ModelInferRequest message) {
    std::string inputs;
    int next_raw = 0;
    for (auto& input : *message.mutable_inputs()) {
      std::string fp32;
      if (input.parameters().empty()) {
        const std::string& raw = message.raw_input_contents(next_raw++);
        for (std::size_t at = 0; input.datatype() == "INT32" && at < raw.size(); at += 4) {
          std::int32_t id = 0;
          std::memcpy(&id, raw.data() + at, sizeof(id));
          input.mutable_contents()->add_int_contents(id);
        }
        for (std::size_t at = 0; input.datatype() == "INT64" && at < raw.size(); at += 8) {
          std::int64_t id = 0;
          std::memcpy(&id, raw.data() + at, sizeof(id));
          input.mutable_contents()->add_int64_contents(id);
        }
        if (input.datatype() == "FP32") fp32 = Fp32Contents(raw);
      }
      AppendField(ModelInferRequest::kInputsFieldNumber, input.SerializeAsString() + fp32, inputs);
    }
    message.clear_inputs();
    message.clear_raw_input_contents();
    return message.SerializeAsString() + inputs;
  }

  void SpoilTypedContents(inference::InferTensorContents* contents) {
    const int count = static_cast<int>(Below(20));
    const std::size_t kind = Below(5);
    for (int i = 0; i < count; ++i) {
      if (kind == 0) contents->add_fp32_contents(OneIn(9) ? NAN : 1.0f);
      if (kind == 1) contents->add_int_contents(static_cast<std::int32_t>(AnyInt()));
      if (kind == 2) contents->add_int64_contents(AnyInt());
      if (kind == 3) contents->add_bytes_contents("x");
      if (kind == 4) contents->add_fp64_contents(1.0);
    }
  }

  void SpoilInput(ModelInferRequest& message) {
    if (message.inputs_size() == 0) return;
    auto* input = message.mutable_inputs(
        static_cast<int>(Below(static_cast<std::size_t>(message.inputs_size()))));
    switch (Below(6)) {
      case 0:
        return input->set_name(AnyName());
      case 1:
        return input->set_datatype(AnyName());
      case 2:
        if (input->shape_size() == 0 || OneIn(3)) return input->add_shape(AnyInt());
        return input->set_shape(
            static_cast<int>(Below(static_cast<std::size_t>(input->shape_size()))), AnyInt());
      case 3:
        return SetAny((*input->mutable_parameters())[AnyName()]);
      case 4:
        return PutWindow(input->mutable_parameters(), AnyInt(), AnyInt());
      default:
        return SpoilTypedContents(input->mutable_contents());
    }
  }

  // Puts a value at the edge of what is allowed where an element begins.
  void SpoilElement(std::string& bytes) {
    constexpr float kInf = std::numeric_limits<float>::infinity();
    const std::int64_t id = OneOf<std::int64_t>({-1, 7, 8, -2, std::int64_t{1} << 32, 255});
    const auto narrow_id = static_cast<std::int32_t>(id);
    const float weight = OneOf<float>({0.0f, kInf, -kInf, NAN, 1e38f});
    const std::size_t kind = Below(3);
    const std::size_t size = kind == 0 ? sizeof(id) : sizeof(weight);
    if (bytes.size() < size) return;
    const std::size_t at = Below(bytes.size() / size) * size;
    const void* value = &weight;
    if (kind == 0) value = &id;
    if (kind == 1) value = &narrow_id;
    std::memcpy(bytes.data() + at, value, size);
  }

  void SpoilRaw(ModelInferRequest& message) {
    if (message.raw_input_contents_size() == 0 || OneIn(5)) {
      return message.add_raw_input_contents(std::string(Below(60), 'r'));
    }
    auto* raw = message.mutable_raw_input_contents(
        static_cast<int>(Below(static_cast<std::size_t>(message.raw_input_contents_size()))));
    if (OneIn(3)) return raw->resize(Below(200));
    if (OneIn(2)) return SpoilElement(*raw);
    if (!raw->empty()) (*raw)[Below(raw->size())] = static_cast<char>(Below(256));
  }

  void SpoilField(ModelInferRequest& message) {
    switch (Below(12)) {
      case 0:
        return message.set_model_name(AnyName());
      case 1:
        return message.set_model_version(AnyName());
      case 2:
        return SetAny((*message.mutable_parameters())[AnyName()]);
      case 3:
        if (message.inputs_size() > 0) message.mutable_inputs()->RemoveLast();
        return;
      case 4:
        if (message.inputs_size() > 0) *message.add_inputs() = message.inputs(0);
        return;
      case 5: {
        auto* output = message.add_outputs();
        output->set_name(AnyName());
        return PutWindow(output->mutable_parameters(), AnyInt(), AnyInt());
      }
      case 6:
        return message.clear_raw_input_contents();
      case 7:
      case 8:
      case 9:
        return SpoilRaw(message);
      default:
        return SpoilInput(message);
    }
  }

  void SpoilBytes(std::string& bytes) {
    const std::size_t times = 1 + Below(8);
    for (std::size_t i = 0; i < times && !bytes.empty(); ++i) {
      const std::size_t at = Below(bytes.size());
      switch (Below(4)) {
        case 0:
          bytes[at] = static_cast<char>(Below(256));
          break;
        case 1:
          bytes.erase(at, 1 + Below(9));
          break;
        case 2:
          bytes.insert(at, 1 + Below(9), static_cast<char>(Below(256)));
          break;
        default:
          bytes.resize(at);
      }
    }
  }

  void CheckInvariants(const ValidatedRequest& request) const {
    ASSERT_GE(request.num_tokens, 0);
    ASSERT_LE(request.num_tokens, model_.max_batch_tokens);
    ASSERT_TRUE(std::binary_search(model_.layers.begin(), model_.layers.end(), request.layer));
    ASSERT_EQ(request.topk, model_.topk);
    ASSERT_GE(request.timeout_us, 0);
    ASSERT_TRUE(request.dtype == runtime::DataType::kFp32 ||
                request.dtype == runtime::DataType::kFp16 ||
                request.dtype == runtime::DataType::kBf16);
    const auto rows = static_cast<std::size_t>(request.num_tokens);
    std::string hidden(request.hidden.begin(), request.hidden.end());
    if (request.hidden_pieces.size() > 0) {
      ASSERT_TRUE(hidden.empty()) << "in pieces or in one";
      hidden.resize(request.hidden_pieces.size());
      request.hidden_pieces.Copy(0, hidden);
    }
    if (request.source.region != nullptr) {
      ASSERT_TRUE(hidden.empty()) << "in a region or inline";
      hidden.resize(request.output_bytes);
      ASSERT_TRUE(request.source.region->Read(request.source.offset_bytes, hidden).ok());
    }
    ASSERT_EQ(hidden.size(), rows * 4 * runtime::DataTypeBytes(request.dtype));
    ASSERT_EQ(request.output_bytes, hidden.size());
    std::size_t sum = 0;
    for (const char byte : hidden) sum += static_cast<unsigned char>(byte);
    ASSERT_LE(sum, hidden.size() * 255) << "every byte can be read";
    ASSERT_EQ(request.topk_ids.size(), request.routed ? rows * 2 : 0);
    ASSERT_EQ(request.topk_weights.size(), request.routed ? rows * 2 : 0);
    for (const std::int32_t id : request.topk_ids) {
      ASSERT_GE(id, -1);
      ASSERT_LT(id, model_.num_experts);
    }
    for (const float weight : request.topk_weights) ASSERT_TRUE(std::isfinite(weight));
    if (request.output.region != nullptr) {
      ASSERT_TRUE(
          request.output.region->CheckWindow(request.output.offset_bytes, request.output_bytes)
              .ok());
    }
  }

  static void CheckSameBytes(const RawView& pieces, const RawView& whole) {
    std::string expected(whole.size(), '\0');
    whole.Copy(0, expected);
    std::string got(pieces.size(), '\1');
    pieces.Copy(0, got);
    ASSERT_EQ(got, expected);
  }

  static void CheckSameAsInOnePiece(const absl::StatusOr<InferRequestMessage>& pieces,
                                    const absl::StatusOr<InferRequestMessage>& whole) {
    ASSERT_EQ(pieces.status(), whole.status());
    if (!whole.ok()) return;
    ASSERT_EQ(pieces->id, whole->id);
    ASSERT_EQ(pieces->view.inputs.size(), whole->view.inputs.size());
    for (std::size_t i = 0; i < whole->view.inputs.size(); ++i) {
      const InputView& input = whole->view.inputs[i];
      ASSERT_EQ(pieces->view.inputs[i].name, input.name);
      ASSERT_EQ(pieces->view.inputs[i].datatype, input.datatype);
      ASSERT_EQ(pieces->view.inputs[i].typed_kind, input.typed_kind);
      CheckSameBytes(pieces->view.inputs[i].typed_bytes, input.typed_bytes);
    }
    ASSERT_EQ(pieces->view.raw_contents.size(), whole->view.raw_contents.size());
    for (std::size_t i = 0; i < whole->view.raw_contents.size(); ++i) {
      CheckSameBytes(pieces->view.raw_contents[i], whole->view.raw_contents[i]);
    }
  }

  // Whether the request came in.
  bool Feed(const std::string& bytes) {
    // In several slices, as large messages arrive.
    const std::size_t cut = bytes.empty() ? 0 : Below(bytes.size());
    const grpc::Slice slices[] = {grpc::Slice(bytes.substr(0, cut)),
                                  grpc::Slice(bytes.substr(cut))};
    const grpc::ByteBuffer buffer(slices, 2);
    // What stays in pieces changes nothing, however few bytes it has: in the other the parser has
    // seen all of them.
    RequestLimits limits;
    limits.large_entry_bytes = Below(12);
    const auto message = ParseInferRequest(buffer, limits);
    CheckSameAsInOnePiece(message, ParseInferRequest(buffer, RequestLimits()));
    if (!message.ok()) {
      EXPECT_EQ(message.status().code(), absl::StatusCode::kInvalidArgument);
      EXPECT_FALSE(message.status().message().empty());
      return false;
    }
    const auto request = ValidateRequest(message->view, model_, RequestLimits(), *regions_);
    if (!request.ok()) {
      EXPECT_FALSE(request.status().message().empty());
      EXPECT_LT(request.status().message().size(), 1000u);
      EXPECT_TRUE(request.status().code() == absl::StatusCode::kInvalidArgument ||
                  request.status().code() == absl::StatusCode::kNotFound)
          << request.status();
      return false;
    }
    CheckInvariants(*request);
    return true;
  }

  std::mt19937_64 random_;
  ServedModel model_ = TestModel();
  ShmObject object_;
  std::unique_ptr<ShmRegistry> regions_;
};

TEST_F(RequestFuzzTest, SpoiltRequestsAreRefusedOrHoldEveryInvariant) {
  const std::uint64_t first_seed = FromEnvironment("EPSERVE_FUZZ_SEED", 1);
  const std::uint64_t rounds = FromEnvironment("EPSERVE_FUZZ_ROUNDS", 20000);
  std::uint64_t passed = 0;
  for (std::uint64_t seed = first_seed; seed < first_seed + rounds; ++seed) {
    SCOPED_TRACE(testing::Message() << "EPSERVE_FUZZ_SEED=" << seed);
    random_.seed(seed);
    ModelInferRequest message = ValidMessage();
    ASSERT_TRUE(Feed(message.SerializeAsString())) << message.ShortDebugString();
    std::string typed = Typed(message);
    const bool all_typed = message.inputs(0).datatype() == "FP32";
    ASSERT_TRUE(Feed(typed) || !all_typed) << message.ShortDebugString();
    SpoilBytes(typed);
    passed += Feed(typed);
    const std::size_t spoils = 1 + Below(3);
    for (std::size_t i = 0; i < spoils; ++i) SpoilField(message);
    passed += Feed(message.SerializeAsString());
    std::string bytes = message.SerializeAsString();
    SpoilBytes(bytes);
    passed += Feed(bytes);
    if (HasFailure()) FAIL() << "the seed above replays this";
  }
  // A mutation that always breaks a request would test nothing behind the first check.
  if (rounds >= 1000) {
    EXPECT_GT(passed, rounds / 100);
    EXPECT_LT(passed, rounds);
  }
}

}  // namespace
}  // namespace epserve::coordinator
