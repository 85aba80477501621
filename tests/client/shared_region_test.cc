// Shared memory of the client library, against a fake service that keeps a list of regions and
// answers from one to the other.
#include "client/cpp/shared_region.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <future>
#include <map>
#include <mutex>
#include <string>

#include "client/cpp/file_handle.h"
#include "tests/client/fake_service.h"

namespace epserve::client {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::StartsWith;

constexpr absl::Duration kTimeout = absl::Seconds(10);

class RegionService : public FakeService {
 public:
  RegionService() : FakeService(NotStarted()) {
    set_handler([this](grpc::ServerContext&, const auto& request, auto& response) {
      return EchoInRegions(request, response);
    });
    Start(kAnyPort);
  }
  ~RegionService() override { Stop(); }

  grpc::Status SystemSharedMemoryRegister(
      grpc::ServerContext*, const inference::SystemSharedMemoryRegisterRequest* request,
      inference::SystemSharedMemoryRegisterResponse*) override {
    const std::lock_guard lock(mutex_);
    if (regions_.contains(request->name())) {
      return {grpc::StatusCode::ALREADY_EXISTS, "register: it is registered"};
    }
    FileHandle object(::shm_open(("/" + request->key()).c_str(), O_RDWR, 0));
    EXPECT_GE(object.get(), 0);
    regions_.emplace(request->name(), Region{*request, std::move(object)});
    return grpc::Status::OK;
  }
  grpc::Status SystemSharedMemoryUnregister(
      grpc::ServerContext*, const inference::SystemSharedMemoryUnregisterRequest* request,
      inference::SystemSharedMemoryUnregisterResponse*) override {
    const std::lock_guard lock(mutex_);
    if (refuse_unregister) return {grpc::StatusCode::UNAVAILABLE, "not now"};
    regions_.erase(request->name());
    return grpc::Status::OK;
  }
  grpc::Status SystemSharedMemoryStatus(
      grpc::ServerContext*, const inference::SystemSharedMemoryStatusRequest*,
      inference::SystemSharedMemoryStatusResponse* response) override {
    const std::lock_guard lock(mutex_);
    for (const auto& [name, region] : regions_) {
      auto& status = (*response->mutable_regions())[name];
      status.set_name(name);
      status.set_key(region.asked.key());
      status.set_offset(region.asked.offset());
      status.set_byte_size(region.asked.byte_size());
    }
    return grpc::Status::OK;
  }

  std::atomic<bool> refuse_unregister{false};

 private:
  // The hidden states, from where they lie to where the output is wanted.
  grpc::Status EchoInRegions(const inference::ModelInferRequest& request,
                             inference::ModelInferResponse& response) {
    const std::lock_guard lock(mutex_);
    response.set_id(request.id());
    const auto& input = request.inputs(0);
    auto* output = response.add_outputs();
    output->set_name("hidden_states");
    output->set_datatype(input.datatype());
    *output->mutable_shape() = input.shape();
    std::string bytes = request.raw_input_contents_size() > 0 ? request.raw_input_contents(0) : "";
    Copy(input.parameters(), bytes, /*write=*/false);
    const bool placed = Copy(request.outputs(0).parameters(), bytes, /*write=*/true);
    response.add_raw_output_contents(placed ? "" : bytes);
    return grpc::Status::OK;
  }
  template <typename Parameters>
  bool Copy(const Parameters& parameters, std::string& bytes, bool write) {
    const auto name = parameters.find("shared_memory_region");
    if (name == parameters.end()) return false;
    const int fd = regions_.at(name->second.string_param()).object.get();
    const auto size =
        static_cast<std::size_t>(parameters.at("shared_memory_byte_size").int64_param());
    const auto offset = static_cast<off_t>(parameters.at("shared_memory_offset").int64_param());
    if (!write) bytes.resize(size);
    EXPECT_EQ(
        write ? ::pwrite(fd, bytes.data(), size, offset) : ::pread(fd, bytes.data(), size, offset),
        static_cast<ssize_t>(size));
    return true;
  }

  struct Region {
    inference::SystemSharedMemoryRegisterRequest asked;
    FileHandle object;  // opened by its key at the registration, and never again
  };

  std::mutex mutex_;
  std::map<std::string, Region> regions_;
};

bool ObjectExists(const std::string& key) {
  const int fd = ::shm_open(("/" + key).c_str(), O_RDONLY, 0);
  if (fd >= 0) ::close(fd);
  return fd >= 0;
}

class SharedRegionTest : public testing::Test {
 protected:
  SharedRegionTest() : client_(ClientOptions{.target = service_.target()}) {}

  std::vector<RegionDescription> Registered() { return client_.ListRegions(kTimeout).value(); }

  // [2, 2] F32 at the region's beginning; the result is wanted at byte 64.
  static InferRequest PlacedRequest() {
    InferRequest request;
    request.model = "fake";
    request.id = "placed";
    request.hidden_states.type = ElementType::kF32;
    request.hidden_states.shape = {2, 2};
    request.hidden_states.place = RegionPlace{"r", 0};
    request.output_place = RegionPlace{"r", 64};
    return request;
  }
  static void Fill(SharedRegion& region, float first) {
    const float values[] = {first, first + 1, first + 2, first + 3};
    std::memcpy(region.bytes().data(), values, sizeof(values));
  }
  static void ExpectEchoed(SharedRegion& region, float first,
                           const absl::StatusOr<InferResult>& result) {
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_TRUE(result->hidden_states.bytes.empty());
    ASSERT_TRUE(result->hidden_states.place.has_value());
    EXPECT_EQ(result->hidden_states.place->region, "r");
    EXPECT_EQ(result->hidden_states.place->offset_bytes, 64u);
    float values[4];
    std::memcpy(values, region.bytes().data() + 64, sizeof(values));
    EXPECT_THAT(values, ElementsAre(first, first + 1, first + 2, first + 3));
  }

  RegionService service_;
  InferenceClient client_;
};

TEST_F(SharedRegionTest, RegionIsRegisteredWhileItLivesAndItsObjectHasNoNameAnyMore) {
  {
    const auto region = SharedRegion::Create(&client_, "r", 100, {.key_prefix = "test-"});
    ASSERT_TRUE(region.ok()) << region.status();
    EXPECT_EQ((*region)->bytes().size(), 100u);
    const auto registered = Registered();
    ASSERT_EQ(registered.size(), 1u);
    EXPECT_EQ(registered[0].name, "r");
    EXPECT_EQ(registered[0].size_bytes, 100u);
    EXPECT_THAT(registered[0].key, StartsWith("test-"));
    EXPECT_FALSE(ObjectExists(registered[0].key));
  }
  EXPECT_THAT(Registered(), IsEmpty());
}

TEST_F(SharedRegionTest, MemoryHasItsNameUntilThatIsRemoved) {
  auto memory = SharedMemory::Create(100, "test-").value();
  const std::string first = memory->key();
  EXPECT_TRUE(ObjectExists(first));
  memory->RemoveName();
  EXPECT_FALSE(ObjectExists(first));
  memory->bytes()[99] = std::byte{1};
  memory = SharedMemory::Create(100, "test-").value();
  const std::string second = memory->key();
  EXPECT_TRUE(ObjectExists(second));
  memory = nullptr;
  EXPECT_FALSE(ObjectExists(second));
}

TEST_F(SharedRegionTest, NameInUseIsAnErrorAndLeavesNoMemory) {
  const auto first = SharedRegion::Create(&client_, "r", 100);
  ASSERT_TRUE(first.ok()) << first.status();
  const auto second = SharedRegion::Create(&client_, "r", 100);
  EXPECT_EQ(second.status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(Registered().size(), 1u) << "the first one still is";
}

TEST_F(SharedRegionTest, UnregisterThatFailsMayBeTriedAgain) {
  const auto region = SharedRegion::Create(&client_, "r", 100).value();
  service_.refuse_unregister = true;
  EXPECT_EQ(region->Unregister(kTimeout).code(), absl::StatusCode::kUnavailable);
  service_.refuse_unregister = false;
  EXPECT_TRUE(region->Unregister(kTimeout).ok());
  EXPECT_THAT(Registered(), IsEmpty());
  EXPECT_TRUE(region->Unregister(kTimeout).ok());
  EXPECT_EQ(client_.UnregisterRegion("", kTimeout).code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(SharedRegionTest, MemoryThatCannotBeIsRefused) {
  EXPECT_EQ(SharedMemory::Create(0, "k").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(SharedMemory::Create(~std::uint64_t{0}, "k").status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(SharedMemory::Create(1, "a/b").status().code(), absl::StatusCode::kInvalidArgument);
  const auto huge = SharedMemory::Create(std::uint64_t{1} << 60, "test-huge-");
  EXPECT_EQ(huge.status().code(), absl::StatusCode::kResourceExhausted) << huge.status();
}

TEST_F(SharedRegionTest, TensorsInARegionGoThroughACall) {
  const auto region = SharedRegion::Create(&client_, "r", 128).value();
  Fill(*region, 1);
  ExpectEchoed(*region, 1, client_.Infer(PlacedRequest()));
}

TEST_F(SharedRegionTest, TensorsInARegionGoThroughAnAsynchronousCall) {
  const auto region = SharedRegion::Create(&client_, "r", 128).value();
  Fill(*region, 5);
  std::promise<absl::StatusOr<InferResult>> promise;
  client_.InferAsync(PlacedRequest(), [&](absl::StatusOr<InferResult> result) {
    promise.set_value(std::move(result));
  });
  ExpectEchoed(*region, 5, promise.get_future().get());
}

TEST_F(SharedRegionTest, TensorsInARegionGoThroughAStream) {
  const auto region = SharedRegion::Create(&client_, "r", 128).value();
  const auto stream = client_.OpenStream();
  for (const float first : {1.0f, 9.0f}) {
    Fill(*region, first);
    ASSERT_TRUE(stream->Send(PlacedRequest()).ok());
    ExpectEchoed(*region, first, stream->Receive());
  }
}

TEST_F(SharedRegionTest, OneOfTheTwoMayBeInline) {
  const auto region = SharedRegion::Create(&client_, "r", 128).value();
  Fill(*region, 3);
  InferRequest request = PlacedRequest();
  request.output_place.reset();
  const auto inline_result = client_.Infer(request);
  ASSERT_TRUE(inline_result.ok()) << inline_result.status();
  EXPECT_FALSE(inline_result->hidden_states.place.has_value());
  EXPECT_THAT(ToDoubles(inline_result->hidden_states), ElementsAre(3, 4, 5, 6));
  request = PlacedRequest();
  request.hidden_states = MakeTensor(ElementType::kF32, {2, 2}, {7, 8, 9, 10});
  ExpectEchoed(*region, 7, client_.Infer(request));
}

TEST_F(SharedRegionTest, BytesBesideAPlaceOrAnAnswerWithBothAreRefused) {
  InferRequest request = PlacedRequest();
  request.hidden_states.bytes = std::string(16, 'x');
  const auto both = client_.Infer(request);
  EXPECT_EQ(both.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(both.status().message()), HasSubstr("beside its place"));
  service_.set_handler([](grpc::ServerContext&, const auto& asked, auto& response) {
    auto* output = response.add_outputs();
    output->set_name("hidden_states");
    output->set_datatype("FP32");
    *output->mutable_shape() = asked.inputs(0).shape();
    response.add_raw_output_contents(std::string(16, 'y'));
    return grpc::Status::OK;
  });
  EXPECT_EQ(client_.Infer(PlacedRequest()).status().code(), absl::StatusCode::kInternal);
}

}  // namespace
}  // namespace epserve::client
