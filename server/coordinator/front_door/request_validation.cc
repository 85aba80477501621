#include "server/coordinator/front_door/request_validation.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "runtime/base/status.h"
#include "server/coordinator/front_door/quote.h"
#include "server/coordinator/front_door/request_parameters.h"

namespace epserve::coordinator {
namespace {

using runtime::DataType;

static_assert(std::endian::native == std::endian::little, "tensors are little-endian on the wire");

// What the served tensors must look like, in the order of the slots below.
enum Slot { kHidden, kIds, kWeights, kNumSlots };
constexpr std::array<const char*, kNumSlots> kSlotNames = {kHiddenStates, kTopkIds, kTopkWeights};

// Where a tensor's bytes are: inline, or in a region.
struct Source {
  std::span<const char> bytes;
  const RawView* pieces = nullptr;          // inline in pieces, in place of `bytes`
  std::shared_ptr<const ShmRegion> region;  // null: inline
  std::uint64_t offset_bytes = 0;
};

struct Tensor {
  const InputView* view = nullptr;  // null: not given
  DataType dtype = DataType::kFp32;
  std::uint64_t size_bytes = 0;  // that shape and dtype ask for
  Source source;
};

using Tensors = std::array<Tensor, kNumSlots>;

// The message's parts are put together only here, so that every message begins alike.
template <typename... Parts>
absl::Status Invalid(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat("infer: ", parts...));
}

std::string InputName(Slot slot) { return absl::StrCat("input ", kSlotNames[slot]); }

std::string ShapeText(std::span<const std::int64_t> shape) {
  constexpr std::size_t kMaxShown = 8;
  const auto shown = shape.first(std::min(shape.size(), kMaxShown));
  return absl::StrCat("[", absl::StrJoin(shown.begin(), shown.end(), ","),
                      shape.size() > kMaxShown ? ",...]" : "]");
}

// "0..3, 5, 7..60"
std::string LayerRanges(const std::vector<std::int64_t>& layers) {
  std::string text;
  for (std::size_t begin = 0; begin < layers.size();) {
    std::size_t end = begin;
    while (end + 1 < layers.size() && layers[end + 1] == layers[end] + 1) ++end;
    absl::StrAppend(&text, text.empty() ? "" : ", ", layers[begin]);
    if (end > begin) absl::StrAppend(&text, "..", layers[end]);
    begin = end + 1;
  }
  return text;
}

absl::StatusOr<std::int64_t> ResolveLayer(std::optional<std::int64_t> layer,
                                          const ServedModel& model) {
  if (!layer.has_value()) return model.layers.front();
  if (std::binary_search(model.layers.begin(), model.layers.end(), *layer)) return *layer;
  return absl::NotFoundError(absl::StrCat("infer: layer ", *layer,
                                          " is not served; the model's layers with experts are ",
                                          LayerRanges(model.layers)));
}

// Assigns every input to its slot: no surplus, duplicate or missing one.
absl::Status FindTensors(const RequestView& view, const ServedModel& model,
                         const RequestLimits& limits, Tensors& tensors) {
  if (view.inputs.size() > limits.max_inputs) {
    return Invalid("request has more than the limit of ", limits.max_inputs, " inputs");
  }
  for (const InputView& input : view.inputs) {
    const auto* name = std::find(kSlotNames.begin(), kSlotNames.end(), input.name);
    if (name == kSlotNames.end()) {
      return Invalid("input ", Quoted(input.name), " is surplus; the model's inputs are ",
                     absl::StrJoin(kSlotNames, ", "));
    }
    Tensor& tensor = tensors[static_cast<std::size_t>(name - kSlotNames.begin())];
    if (tensor.view != nullptr) return Invalid("input ", *name, " is given twice");
    tensor.view = &input;
  }
  if (tensors[kHidden].view == nullptr) return Invalid("input hidden_states is missing");
  const bool has_ids = tensors[kIds].view != nullptr;
  const bool has_weights = tensors[kWeights].view != nullptr;
  if (has_ids != has_weights) {
    const Slot given = has_ids ? kIds : kWeights;
    const Slot missing = has_ids ? kWeights : kIds;
    return Invalid(InputName(missing), " is missing, but ", kSlotNames[given],
                   " is given; give both, or neither where the model has a router");
  }
  if (!has_ids && !model.has_router) {
    return Invalid("inputs topk_ids and topk_weights are missing, and the checkpoint has no ",
                   "router to compute them; give both");
  }
  return absl::OkStatus();
}

absl::Status ParseDataType(Slot slot, Tensor& tensor) {
  struct Accepted {
    Slot slot;
    std::string_view name;
    DataType type;
  };
  constexpr std::array<Accepted, 6> kAccepted = {{
      {kHidden, "BF16", DataType::kBf16},
      {kHidden, "FP16", DataType::kFp16},
      {kHidden, "FP32", DataType::kFp32},
      {kIds, "INT32", DataType::kInt32},
      {kIds, "INT64", DataType::kInt64},
      {kWeights, "FP32", DataType::kFp32},
  }};
  for (const Accepted& accepted : kAccepted) {
    if (accepted.slot == slot && accepted.name == tensor.view->datatype) {
      tensor.dtype = accepted.type;
      return absl::OkStatus();
    }
  }
  constexpr std::array<const char*, kNumSlots> kWanted = {"BF16, FP16 or FP32", "INT32 or INT64",
                                                          "FP32"};
  return Invalid(InputName(slot), " has datatype ", Quoted(tensor.view->datatype), ", not ",
                 kWanted[slot]);
}

// Checks [num_tokens, columns]; `num_tokens` of -1 takes the count from this tensor.
absl::Status CheckShape(Slot slot, const ServedModel& model, std::int64_t columns,
                        std::int64_t& num_tokens, Tensor& tensor) {
  const auto shape = tensor.view->shape;
  if (shape.size() != 2 || shape[1] != columns) {
    return Invalid(InputName(slot), " has shape ", ShapeText(shape), ", not [tokens,", columns,
                   "]");
  }
  if (shape[0] < 0) return Invalid(InputName(slot), " has ", shape[0], " rows, fewer than 0");
  if (shape[0] > model.max_batch_tokens) {
    return Invalid(InputName(slot), " has ", shape[0], " rows, more than --max-batch-tokens ",
                   model.max_batch_tokens, "; split the request");
  }
  if (num_tokens >= 0 && shape[0] != num_tokens) {
    return Invalid(InputName(slot), " has ", shape[0], " rows, but hidden_states has ", num_tokens);
  }
  num_tokens = shape[0];
  const std::uint64_t element_bytes = runtime::DataTypeBytes(tensor.dtype);
  if (__builtin_mul_overflow(static_cast<std::uint64_t>(num_tokens * columns), element_bytes,
                             &tensor.size_bytes)) {
    return Invalid(InputName(slot), " of shape ", ShapeText(shape), " has more than 2^64 bytes");
  }
  return absl::OkStatus();
}

absl::Status CheckTypedContents(Slot slot, const Tensor& tensor) {
  const InputView& view = *tensor.view;
  if (view.typed_kind == TypedKind::kNone) return absl::OkStatus();
  if (tensor.dtype == DataType::kBf16 || tensor.dtype == DataType::kFp16) {
    return Invalid(InputName(slot), " has typed contents, which do not exist for ",
                   std::string(view.datatype), "; use raw_input_contents");
  }
  const TypedKind wanted = tensor.dtype == DataType::kFp32    ? TypedKind::kFp32
                           : tensor.dtype == DataType::kInt32 ? TypedKind::kInt32
                                                              : TypedKind::kInt64;
  if (view.typed_kind != wanted) {
    return Invalid(InputName(slot), " of datatype ", std::string(view.datatype),
                   " has typed contents of another type; use ",
                   wanted == TypedKind::kFp32    ? "fp32_contents"
                   : wanted == TypedKind::kInt32 ? "int_contents"
                                                 : "int64_contents");
  }
  return absl::OkStatus();
}

absl::Status CheckSize(Slot slot, const Tensor& tensor, std::uint64_t given, const char* where) {
  if (given == tensor.size_bytes) return absl::OkStatus();
  return Invalid(InputName(slot), " of shape ", ShapeText(tensor.view->shape), " and datatype ",
                 std::string(tensor.view->datatype), " needs ", tensor.size_bytes,
                 " bytes, but has ", given, " in ", where);
}

absl::Status LocateInRegion(Slot slot, const ShmWindow& window, const ShmRegistry& regions,
                            Tensor& tensor) {
  if (tensor.view->typed_kind != TypedKind::kNone) {
    return Invalid(InputName(slot), " has typed contents as well as a shared-memory region");
  }
  EPS_ASSIGN_OR_RETURN(tensor.source.region, regions.Find(window.region));
  EPS_RETURN_IF_ERROR(CheckSize(slot, tensor, window.size_bytes, "shared memory"));
  tensor.source.offset_bytes = window.offset_bytes;
  return tensor.source.region->CheckWindow(window.offset_bytes, window.size_bytes);
}

// `bytes` stay where they are as long as the tensor is used.
absl::Status LocateInline(Slot slot, const RawView& bytes, const char* where, Tensor& tensor) {
  if (bytes.pieces().size() == 1) {
    tensor.source.bytes = bytes.pieces().front();
  } else {
    tensor.source.pieces = &bytes;
  }
  return CheckSize(slot, tensor, bytes.size(), where);
}

// Finds every input's bytes. The raw entries belong to the inputs outside shared memory, in order.
absl::Status LocateContents(const RequestView& view, const RequestLimits& limits,
                            const ShmRegistry& regions, Tensors& tensors) {
  std::size_t num_inline = 0;
  for (const InputView& input : view.inputs) {
    const auto index = static_cast<std::size_t>(
        std::find(kSlotNames.begin(), kSlotNames.end(), input.name) - kSlotNames.begin());
    const auto slot = static_cast<Slot>(index);
    Tensor& tensor = tensors[index];
    std::optional<ShmWindow> window;
    if (!input.parameters.empty()) {
      EPS_ASSIGN_OR_RETURN(window, ParseShmWindow(InputName(slot), input.parameters, limits));
    }
    if (window.has_value()) {
      EPS_RETURN_IF_ERROR(LocateInRegion(slot, *window, regions, tensor));
      continue;
    }
    ++num_inline;
    if (view.raw_contents.empty()) {
      EPS_RETURN_IF_ERROR(CheckTypedContents(slot, tensor));
      EPS_RETURN_IF_ERROR(LocateInline(slot, input.typed_bytes, "inline contents", tensor));
      continue;
    }
    if (input.typed_kind != TypedKind::kNone) {
      return Invalid(InputName(slot), " has typed contents, but the request has ",
                     "raw_input_contents; use one of the two");
    }
    if (num_inline > view.raw_contents.size()) continue;  // Told below, with both counts.
    EPS_RETURN_IF_ERROR(
        LocateInline(slot, view.raw_contents[num_inline - 1], "raw_input_contents", tensor));
  }
  const std::size_t num_raw = view.raw_contents.size();
  if (num_raw > num_inline || (num_raw > 0 && num_raw < num_inline)) {
    return Invalid("raw_input_contents has ", num_raw > num_inline ? "surplus" : "missing",
                   " entries: ", num_raw, num_raw > limits.max_inputs ? " or more" : "", " for ",
                   num_inline, " inputs outside shared memory");
  }
  return absl::OkStatus();
}

// gRPC sends no larger message, and ends the call, or the whole stream, that tries to.
absl::Status CheckReplyFits(const ServedModel& model, const ValidatedRequest& request) {
  if (request.output.region != nullptr) return absl::OkStatus();
  if (request.output_bytes + kReplyRestBytes <= model.max_message_bytes) return absl::OkStatus();
  return Invalid("output hidden_states has ", request.output_bytes,
                 " bytes, more than a reply has room for: --max-message-bytes ",
                 model.max_message_bytes, " less ", kReplyRestBytes,
                 "; give it a shared_memory_region, split the request, or raise the flag");
}

absl::Status CheckOutputs(const RequestView& view, const RequestLimits& limits,
                          const ShmRegistry& regions, ValidatedRequest& request) {
  if (view.outputs.size() > limits.max_outputs) {
    return Invalid("request asks for more than the limit of ", limits.max_outputs, " outputs");
  }
  for (std::size_t i = 0; i < view.outputs.size(); ++i) {
    const OutputView& output = view.outputs[i];
    if (output.name != kHiddenStates) {
      return Invalid("output ", Quoted(output.name), " is not known; the model's output is ",
                     kHiddenStates);
    }
    if (i > 0) return Invalid("output ", kHiddenStates, " is asked for twice");
    const std::string owner = absl::StrCat("output ", kHiddenStates);
    EPS_ASSIGN_OR_RETURN(const auto window, ParseShmWindow(owner, output.parameters, limits));
    if (!window.has_value()) continue;
    EPS_ASSIGN_OR_RETURN(request.output.region, regions.Find(window->region));
    if (window->size_bytes < request.output_bytes) {
      return Invalid(owner, " needs ", request.output_bytes, " bytes, but its window in region ",
                     Quoted(window->region), " has ", window->size_bytes);
    }
    EPS_RETURN_IF_ERROR(
        request.output.region->CheckWindow(window->offset_bytes, window->size_bytes));
    request.output.offset_bytes = window->offset_bytes;
  }
  return absl::OkStatus();
}

// Copies a tensor's bytes to private memory, [destination, + size_bytes of the tensor).
absl::Status CopyTensor(const Tensor& tensor, void* destination) {
  const std::size_t size = tensor.size_bytes;
  if (size == 0) return absl::OkStatus();
  if (tensor.source.region != nullptr) {
    return tensor.source.region->Read(tensor.source.offset_bytes,
                                      std::span<char>(static_cast<char*>(destination), size));
  }
  if (tensor.source.pieces != nullptr) {
    tensor.source.pieces->Copy(0, std::span<char>(static_cast<char*>(destination), size));
    return absl::OkStatus();
  }
  std::memcpy(destination, tensor.source.bytes.data(), size);
  return absl::OkStatus();
}

RegionWindow WindowOf(const Tensor& tensor) {
  return {tensor.source.region, tensor.source.offset_bytes};
}

template <typename Id>
absl::Status TakeIds(const Tensor& tensor, const ServedModel& model, ValidatedRequest& request) {
  std::vector<Id> ids(tensor.size_bytes / sizeof(Id));
  EPS_RETURN_IF_ERROR(CopyTensor(tensor, ids.data()));
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < -1 || ids[i] >= model.num_experts) {
      const auto topk = static_cast<std::size_t>(model.topk);
      return Invalid("topk_ids[", i / topk, ",", i % topk, "] is ", ids[i], ", outside [-1, ",
                     model.num_experts, ")");
    }
  }
  if constexpr (std::is_same_v<Id, std::int32_t>) {
    request.topk_ids = std::move(ids);
  } else {
    request.topk_ids.assign(ids.begin(), ids.end());  // Narrowing is safe after the check.
  }
  return absl::OkStatus();
}

absl::Status TakeWeights(const Tensor& tensor, const ServedModel& model,
                         ValidatedRequest& request) {
  std::vector<float> weights(tensor.size_bytes / sizeof(float));
  EPS_RETURN_IF_ERROR(CopyTensor(tensor, weights.data()));
  for (std::size_t i = 0; i < weights.size(); ++i) {
    if (!std::isfinite(weights[i])) {
      const auto topk = static_cast<std::size_t>(model.topk);
      return Invalid("topk_weights[", i / topk, ",", i % topk, "] is ", weights[i],
                     ", not a finite number");
    }
  }
  request.topk_weights = std::move(weights);
  return absl::OkStatus();
}

absl::Status TakeHidden(const Tensor& tensor, ValidatedRequest& request) {
  const auto& source = tensor.source;
  if (source.region == nullptr) {
    request.hidden = source.bytes;
    if (source.pieces != nullptr) request.hidden_pieces = *source.pieces;
    return absl::OkStatus();
  }
  const RegionWindow& output = request.output;
  const bool torn = output.region != nullptr &&
                    source.region->OverlapsShifted(source.offset_bytes, *output.region,
                                                   output.offset_bytes, tensor.size_bytes);
  if (!torn) {
    request.source = WindowOf(tensor);
    return absl::OkStatus();
  }
  if (InCuda(tensor.source.region.get())) {
    return Invalid("output hidden_states at offset ", output.offset_bytes, " of region ",
                   output.region->label(), " overlaps input hidden_states at offset ",
                   source.offset_bytes, " of region ", source.region->label(),
                   " with other rows; let it take the input's place, or another");
  }
  request.hidden_copy = std::make_unique_for_overwrite<char[]>(tensor.size_bytes);
  request.hidden = std::span<const char>(request.hidden_copy.get(), tensor.size_bytes);
  return CopyTensor(tensor, request.hidden_copy.get());
}

absl::Status TakeRouting(const Tensors& tensors, const ServedModel& model,
                         ValidatedRequest& request) {
  request.routed = tensors[kIds].view != nullptr;
  if (!request.routed) return absl::OkStatus();
  if (InCuda(tensors[kIds].source.region.get())) {
    request.ids_source = WindowOf(tensors[kIds]);
    request.wide_ids = tensors[kIds].dtype == DataType::kInt64;
  } else if (tensors[kIds].dtype == DataType::kInt32) {
    EPS_RETURN_IF_ERROR(TakeIds<std::int32_t>(tensors[kIds], model, request));
  } else {
    EPS_RETURN_IF_ERROR(TakeIds<std::int64_t>(tensors[kIds], model, request));
  }
  if (InCuda(tensors[kWeights].source.region.get())) {
    request.weights_source = WindowOf(tensors[kWeights]);
    return absl::OkStatus();
  }
  return TakeWeights(tensors[kWeights], model, request);
}

}  // namespace

absl::Status CheckModel(std::string_view operation, std::string_view name, std::string_view version,
                        const ServedModel& model) {
  if (name != model.name) {
    return absl::NotFoundError(absl::StrCat(std::string(operation), ": model ", Quoted(name),
                                            " is not served; the served model is ",
                                            Quoted(model.name)));
  }
  if (!version.empty() && version != model.version) {
    return absl::NotFoundError(absl::StrCat(
        std::string(operation), ": version ", Quoted(version), " of model ", Quoted(name),
        " is not served; the served version is ", Quoted(model.version)));
  }
  return absl::OkStatus();
}

absl::StatusOr<ValidatedRequest> ValidateRequest(const RequestView& view, const ServedModel& model,
                                                 const RequestLimits& limits,
                                                 const ShmRegistry& regions) {
  EPS_RETURN_IF_ERROR(CheckModel("infer", view.model_name, view.model_version, model));
  EPS_ASSIGN_OR_RETURN(const RequestParameters parameters,
                       ParseRequestParameters(view.parameters, limits));
  ValidatedRequest request;
  request.topk = model.topk;
  request.timeout_us = parameters.timeout_us;
  request.trace = parameters.trace;
  EPS_ASSIGN_OR_RETURN(request.layer, ResolveLayer(parameters.layer, model));

  Tensors tensors;
  EPS_RETURN_IF_ERROR(FindTensors(view, model, limits, tensors));
  std::int64_t num_tokens = -1;
  for (const Slot slot : {kHidden, kIds, kWeights}) {
    if (tensors[slot].view == nullptr) continue;
    EPS_RETURN_IF_ERROR(ParseDataType(slot, tensors[slot]));
    const std::int64_t columns = slot == kHidden ? model.hidden : model.topk;
    EPS_RETURN_IF_ERROR(CheckShape(slot, model, columns, num_tokens, tensors[slot]));
  }
  request.num_tokens = num_tokens;
  request.dtype = tensors[kHidden].dtype;
  request.output_bytes = tensors[kHidden].size_bytes;
  EPS_RETURN_IF_ERROR(LocateContents(view, limits, regions, tensors));
  EPS_RETURN_IF_ERROR(CheckOutputs(view, limits, regions, request));
  EPS_RETURN_IF_ERROR(CheckReplyFits(model, request));

  // Everything that can be told without the values has been told; now the values.
  EPS_RETURN_IF_ERROR(TakeRouting(tensors, model, request));
  EPS_RETURN_IF_ERROR(TakeHidden(tensors[kHidden], request));
  return request;
}

}  // namespace epserve::coordinator
