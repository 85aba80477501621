// An inference request as validation sees it: plain views into a message that somebody else keeps
// alive and unchanged, so that validation needs no generated code and a test or fuzzer can write
// any request down.
#ifndef EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_REQUEST_VIEW_H_
#define EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_REQUEST_VIEW_H_

#include <cstdint>
#include <span>
#include <string_view>
#include <variant>
#include <vector>

namespace epserve::coordinator {

struct ParameterView {
  using Value =
      std::variant<std::monostate, bool, std::int64_t, std::string_view, double, std::uint64_t>;

  std::string_view name;
  Value value;  // monostate: the parameter is there, its value is not
};

// Which typed field of a tensor holds elements; kSeveral: more than one does.
enum class TypedKind {
  kNone,
  kBool,
  kInt32,
  kInt64,
  kUint32,
  kUint64,
  kFp32,
  kFp64,
  kBytes,
  kSeveral
};

struct InputView {
  std::string_view name;
  std::string_view datatype;
  std::span<const std::int64_t> shape;
  std::vector<ParameterView> parameters;
  TypedKind typed_kind = TypedKind::kNone;
  std::span<const char> typed_bytes;  // the elements, for kInt32, kInt64 and kFp32
};

struct OutputView {
  std::string_view name;
  std::vector<ParameterView> parameters;
};

struct RequestView {
  std::string_view model_name;
  std::string_view model_version;
  std::vector<ParameterView> parameters;
  std::vector<InputView> inputs;
  std::vector<OutputView> outputs;
  std::vector<std::string_view> raw_contents;
};

// Bounds on what a request may hold, far above what the served tensors need, so that a message of
// many tiny tensors costs nothing. A view may stop at one entry past a bound.
struct RequestLimits {
  std::size_t max_inputs = 16;
  std::size_t max_outputs = 16;
  std::size_t max_parameters = 64;  // of the request, and of each tensor
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_REQUEST_VIEW_H_
