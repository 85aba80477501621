#include "server/coordinator/front_door/request_parameters.h"

#include <array>

#include "absl/strings/str_cat.h"
#include "runtime/base/status.h"
#include "server/coordinator/front_door/quote.h"

namespace epserve::coordinator {
namespace {

constexpr std::string_view kClientHintPrefix = "triton_";

const char* TypeName(const ParameterView::Value& value) {
  // In the order of the alternatives.
  constexpr std::array<const char*, 6> kNames = {"no value", "bool",   "int64",
                                                 "string",   "double", "uint64"};
  return kNames[value.index()];
}

absl::StatusOr<std::int64_t> Int64Of(const std::string& owner, const ParameterView& parameter) {
  if (const auto* value = std::get_if<std::int64_t>(&parameter.value)) return *value;
  return absl::InvalidArgumentError(absl::StrCat("infer: ", owner, ": parameter ",
                                                 Quoted(parameter.name), " has ",
                                                 TypeName(parameter.value), ", not int64"));
}

absl::Status CheckCount(const std::string& owner, const std::vector<ParameterView>& parameters,
                        const RequestLimits& limits) {
  if (parameters.size() <= limits.max_parameters) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("infer: ", owner, " has more than the limit of ",
                                                 limits.max_parameters, " parameters"));
}

absl::Status UnknownParameter(const std::string& owner, std::string_view name, const char* known) {
  return absl::InvalidArgumentError(absl::StrCat("infer: ", owner, ": parameter ", Quoted(name),
                                                 " is not known; the known ones are ", known));
}

}  // namespace

absl::StatusOr<RequestParameters> ParseRequestParameters(
    const std::vector<ParameterView>& parameters, const RequestLimits& limits) {
  const std::string owner = "request";
  EPS_RETURN_IF_ERROR(CheckCount(owner, parameters, limits));
  RequestParameters result;
  for (const ParameterView& parameter : parameters) {
    if (parameter.name == "layer") {
      EPS_ASSIGN_OR_RETURN(result.layer, Int64Of(owner, parameter));
    } else if (parameter.name == "timeout") {
      EPS_ASSIGN_OR_RETURN(result.timeout_us, Int64Of(owner, parameter));
      if (result.timeout_us < 0) {
        return absl::InvalidArgumentError(absl::StrCat("infer: request: parameter 'timeout' is ",
                                                       result.timeout_us,
                                                       " us, not 0 (none) or more"));
      }
    } else if (parameter.name == "epserve_trace") {
      const auto* trace = std::get_if<bool>(&parameter.value);
      if (trace == nullptr) {
        return absl::InvalidArgumentError(
            absl::StrCat("infer: request: parameter 'epserve_trace' has ",
                         TypeName(parameter.value), ", not bool"));
      }
      result.trace = *trace;
    } else if (parameter.name != "priority" &&
               parameter.name.substr(0, kClientHintPrefix.size()) != kClientHintPrefix) {
      return UnknownParameter(owner, parameter.name,
                              "layer, timeout, epserve_trace, priority and triton_*");
    }
  }
  return result;
}

absl::StatusOr<std::optional<ShmWindow>> ParseShmWindow(
    const std::string& owner, const std::vector<ParameterView>& parameters,
    const RequestLimits& limits) {
  EPS_RETURN_IF_ERROR(CheckCount(owner, parameters, limits));
  std::optional<std::string_view> region;
  std::optional<std::int64_t> size_bytes;
  std::optional<std::int64_t> offset_bytes;
  for (const ParameterView& parameter : parameters) {
    if (parameter.name == "shared_memory_region") {
      const auto* name = std::get_if<std::string_view>(&parameter.value);
      if (name == nullptr) {
        return absl::InvalidArgumentError(absl::StrCat("infer: ", owner,
                                                       ": parameter 'shared_memory_region' has ",
                                                       TypeName(parameter.value), ", not string"));
      }
      region = *name;
    } else if (parameter.name == "shared_memory_byte_size") {
      EPS_ASSIGN_OR_RETURN(size_bytes, Int64Of(owner, parameter));
    } else if (parameter.name == "shared_memory_offset") {
      EPS_ASSIGN_OR_RETURN(offset_bytes, Int64Of(owner, parameter));
    } else {
      return UnknownParameter(
          owner, parameter.name,
          "shared_memory_region, shared_memory_byte_size and shared_memory_offset");
    }
  }
  if (!region.has_value()) {
    if (!size_bytes.has_value() && !offset_bytes.has_value()) return std::optional<ShmWindow>();
    return absl::InvalidArgumentError(absl::StrCat(
        "infer: ", owner, " has a shared-memory size or offset, but no shared_memory_region"));
  }
  if (!size_bytes.has_value()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "infer: ", owner, " has shared_memory_region, but no shared_memory_byte_size"));
  }
  if (*size_bytes <= 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("infer: ", owner, ": shared_memory_byte_size ", *size_bytes,
                     " is less than 1; a tensor without elements is sent inline"));
  }
  if (offset_bytes.value_or(0) < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("infer: ", owner, ": shared_memory_offset ", *offset_bytes, " is negative"));
  }
  return ShmWindow{*region, static_cast<std::uint64_t>(offset_bytes.value_or(0)),
                   static_cast<std::uint64_t>(*size_bytes)};
}

}  // namespace epserve::coordinator
