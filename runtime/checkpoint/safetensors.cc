#include "runtime/checkpoint/safetensors.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "runtime/base/status.h"
#include "runtime/checkpoint/strict_json.h"

namespace epserve::runtime {
namespace {

constexpr std::uint64_t kLengthBytes = 8;

struct StoredType {
  std::string_view name;
  std::uint64_t bytes;
};
constexpr std::array<StoredType, 17> kStoredTypes = {{{"BOOL", 1},
                                                      {"U8", 1},
                                                      {"I8", 1},
                                                      {"F8_E5M2", 1},
                                                      {"F8_E4M3", 1},
                                                      {"F8_E8M0", 1},
                                                      {"I16", 2},
                                                      {"U16", 2},
                                                      {"F16", 2},
                                                      {"BF16", 2},
                                                      {"I32", 4},
                                                      {"U32", 4},
                                                      {"F32", 4},
                                                      {"I64", 8},
                                                      {"U64", 8},
                                                      {"F64", 8},
                                                      {"C64", 8}}};

// Size of one element; 0 where the type is not known.
std::uint64_t StoredBytes(std::string_view dtype) {
  for (const StoredType& type : kStoredTypes) {
    if (type.name == dtype) return type.bytes;
  }
  return 0;
}

// Reads the header's JSON into entries whose offsets still count from the data's start.
class HeaderReader final : public StrictJson {
 public:
  std::vector<TensorEntry> TakeEntries() { return std::move(entries_); }

  bool start_object(std::size_t) override {
    if (depth_ == 0 || (depth_ == 1 && at_value_)) {
      ++depth_;
      at_value_ = false;
      fields_ = 0;
      return true;
    }
    return FailHere("an object is not expected");
  }

  bool key(string_t& name) override {
    if (depth_ == 1) {
      in_metadata_ = name == "__metadata__";
      if (!names_.insert(name).second) {
        return Fail(absl::StrCat("tensor \"", ShownName(name), "\" stands twice"));
      }
      if (!in_metadata_) {
        entries_.emplace_back();
        entries_.back().name = name;
        num_offsets_ = 0;
      }
      at_value_ = true;
      return true;
    }
    if (in_metadata_) return true;
    field_ = name == "dtype"          ? kDtype
             : name == "shape"        ? kShape
             : name == "data_offsets" ? kOffsets
                                      : kNone;
    if (field_ == kNone)
      return FailHere(absl::StrCat("field \"", ShownName(name), "\" is unknown"));
    if ((fields_ & field_) != 0) return FailHere(absl::StrCat("field \"", name, "\" stands twice"));
    fields_ |= field_;
    return true;
  }

  bool string(string_t& value) override {
    if (depth_ == 2 && in_metadata_) return true;
    if (depth_ == 2 && field_ == kDtype) {
      entries_.back().dtype = value;
      return true;
    }
    return FailHere(absl::StrCat("string \"", ShownName(value), "\" is not expected"));
  }

  bool start_array(std::size_t) override {
    if (depth_ == 2 && !in_metadata_ && !in_array_ && (field_ == kShape || field_ == kOffsets)) {
      in_array_ = true;
      return true;
    }
    return FailHere("a list is not expected");
  }

  bool end_array() override {
    in_array_ = false;
    if (field_ == kOffsets && num_offsets_ != 2) {
      return FailHere("data_offsets must hold two numbers");
    }
    return true;
  }

  bool number_unsigned(number_unsigned_t value) override {
    if (!in_array_) return FailHere(absl::StrCat("number ", value, " is not expected"));
    TensorEntry& entry = entries_.back();
    if (field_ == kShape) {
      if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
        return FailHere(absl::StrCat("dimension ", value, " is too large"));
      }
      if (entry.shape.size() == kMaxTensorRank) {
        return FailHere(absl::StrCat("shape has more than ", kMaxTensorRank, " dimensions"));
      }
      entry.shape.push_back(static_cast<std::int64_t>(value));
      return true;
    }
    if (num_offsets_ == 2) return FailHere("data_offsets must hold two numbers");
    if (num_offsets_++ == 0) {
      entry.offset = value;
      return true;
    }
    if (value < entry.offset) {
      return FailHere(
          absl::StrCat("data_offsets [", entry.offset, ", ", value, "] end before they begin"));
    }
    entry.bytes = value - entry.offset;
    return true;
  }

  bool end_object() override {
    --depth_;
    if (depth_ == 1 && !in_metadata_ && fields_ != (kDtype | kShape | kOffsets)) {
      return FailHere("dtype, shape and data_offsets must all be there");
    }
    return true;
  }

  bool number_integer(number_integer_t value) override {
    return FailHere(absl::StrCat("number ", value, " is negative"));
  }
  bool number_float(number_float_t, const string_t& text) override {
    return FailHere(absl::StrCat("number ", ShownName(text), " is not an integer"));
  }
  bool null() override { return FailHere("null is not expected"); }
  bool boolean(bool) override { return FailHere("a boolean is not expected"); }

 private:
  enum Field : int { kNone = 0, kDtype = 1, kShape = 2, kOffsets = 4 };

  bool FailHere(std::string message) {
    if (depth_ < 1 || in_metadata_ || entries_.empty()) return Fail(std::move(message));
    return Fail(absl::StrCat("tensor \"", ShownName(entries_.back().name), "\": ", message));
  }

  int depth_ = 0;          // 1 inside the header's object, 2 inside a tensor's
  bool at_value_ = false;  // A name was read, its value was not
  bool in_metadata_ = false;
  bool in_array_ = false;
  Field field_ = kNone;
  int fields_ = 0;  // Field bits seen in this tensor
  int num_offsets_ = 0;
  std::vector<TensorEntry> entries_;
  absl::flat_hash_set<std::string> names_;
};

absl::Status Damaged(std::string_view file, const TensorEntry& entry, std::string_view message) {
  return absl::DataLossError(absl::StrCat("checkpoint: ", std::string(file), ": tensor \"",
                                          ShownName(entry.name), "\": ", std::string(message)));
}

// shape x element size == length, whatever the shape claims.
absl::Status CheckSize(const TensorEntry& entry, std::string_view file) {
  const std::uint64_t element = StoredBytes(entry.dtype);
  if (element == 0) {
    return absl::InvalidArgumentError(absl::StrCat("checkpoint: ", std::string(file), ": tensor \"",
                                                   ShownName(entry.name), "\": dtype \"",
                                                   ShownName(entry.dtype), "\" is not known"));
  }
  std::uint64_t bytes = element;
  bool fits = true;
  for (const std::int64_t dim : entry.shape) {
    fits = fits && !__builtin_mul_overflow(bytes, static_cast<std::uint64_t>(dim), &bytes);
  }
  // A later 0 makes an overflowing product 0 again; such a shape is refused as the others.
  if (!fits) return Damaged(file, entry, "shape overflows 64 bits");
  if (bytes != entry.bytes) {
    return Damaged(
        file, entry,
        absl::StrCat("shape and dtype make ", bytes, " bytes, data_offsets ", entry.bytes));
  }
  return absl::OkStatus();
}

}  // namespace

std::optional<DataType> WeightType(std::string_view dtype) {
  if (dtype == "BF16") return DataType::kBf16;
  if (dtype == "F16") return DataType::kFp16;
  if (dtype == "F32") return DataType::kFp32;
  if (dtype == "F8_E4M3") return DataType::kFp8E4m3;
  return std::nullopt;
}

absl::StatusOr<std::vector<TensorEntry>> ParseSafetensorsHeader(std::string_view json,
                                                                std::uint64_t file_bytes,
                                                                std::string_view file) {
  const std::string name(file);
  if (json.size() > file_bytes || file_bytes - json.size() < kLengthBytes) {
    return absl::DataLossError(absl::StrCat("checkpoint: ", name, ": header of ", json.size(),
                                            " bytes is longer than the file of ", file_bytes));
  }
  if (json.empty() || json.front() != '{') {
    return absl::DataLossError(absl::StrCat("checkpoint: ", name, ": header is no JSON object"));
  }
  HeaderReader reader;
  if (const std::string error = RunStrictJson(json, &reader); !error.empty()) {
    return absl::DataLossError(absl::StrCat("checkpoint: ", name, ": header: ", error));
  }
  std::vector<TensorEntry> entries = reader.TakeEntries();
  const std::uint64_t data_begin = kLengthBytes + json.size();
  const std::uint64_t data_bytes = file_bytes - data_begin;
  for (const TensorEntry& entry : entries) {
    // No sum here can overflow: each part was compared with the data's size first.
    if (entry.offset > data_bytes || entry.bytes > data_bytes - entry.offset) {
      return Damaged(name, entry,
                     absl::StrCat("data_offsets [", entry.offset, ", ", entry.offset + entry.bytes,
                                  "] lie past the file's ", data_bytes, " bytes of data"));
    }
    EPS_RETURN_IF_ERROR(CheckSize(entry, name));
  }
  std::stable_sort(entries.begin(), entries.end(), [](const auto& a, const auto& b) {
    return std::pair(a.offset, a.bytes) < std::pair(b.offset, b.bytes);
  });
  std::uint64_t end = 0;
  for (TensorEntry& entry : entries) {
    if (entry.offset != end) {
      return Damaged(name, entry,
                     absl::StrCat("begins at ", entry.offset,
                                  entry.offset < end ? " and overlaps the one that ends at "
                                                     : ", which leaves a hole after ",
                                  end));
    }
    end += entry.bytes;
    entry.offset += data_begin;
  }
  if (end != data_bytes) {
    return absl::DataLossError(absl::StrCat("checkpoint: ", name, ": ", data_bytes - end,
                                            " bytes after the last tensor belong to none"));
  }
  return entries;
}

absl::StatusOr<std::vector<TensorEntry>> ReadSafetensorsHeader(const InputFile& file) {
  if (file.size() < kLengthBytes) {
    return absl::DataLossError(absl::StrCat("checkpoint: ", file.name(), ": ", file.size(),
                                            " bytes are too few for a safetensors file"));
  }
  std::array<unsigned char, kLengthBytes> raw;
  EPS_RETURN_IF_ERROR(file.ReadAt(0, raw.data(), raw.size()));
  std::uint64_t length = 0;
  for (int i = kLengthBytes - 1; i >= 0; --i) length = length << 8 | raw[i];
  if (length > file.size() - kLengthBytes) {
    return absl::DataLossError(absl::StrCat("checkpoint: ", file.name(), ": header of ", length,
                                            " bytes is longer than the file of ", file.size()));
  }
  if (length > kMaxHeaderBytes) {
    return absl::DataLossError(absl::StrCat("checkpoint: ", file.name(), ": header of ", length,
                                            " bytes exceeds the format's ", kMaxHeaderBytes));
  }
  std::string json(length, '\0');
  EPS_RETURN_IF_ERROR(file.ReadAt(kLengthBytes, json.data(), json.size()));
  return ParseSafetensorsHeader(json, file.size(), file.name());
}

}  // namespace epserve::runtime
