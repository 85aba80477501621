// What the checkpoint's JSON readers share: a stream of events in place of a tree, so that a
// hostile file costs no more memory than its bytes, with bounded depth and the first error kept.
// Internal to this folder's .cc files.
#ifndef EPSERVE_RUNTIME_CHECKPOINT_STRICT_JSON_H_
#define EPSERVE_RUNTIME_CHECKPOINT_STRICT_JSON_H_

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "absl/strings/str_cat.h"

namespace epserve::runtime {

// Printable and bounded, for messages about names that a file made up.
inline std::string ShownName(std::string_view name) {
  std::string shown;
  for (const char c : name.substr(0, 200)) shown += c >= ' ' && c <= '~' ? c : '?';
  if (name.size() > 200) shown += "...";
  return shown;
}

// Refuses every event; a reader overrides those that its format allows. Each handler returns false
// to stop, after it has called Fail().
class StrictJson : public nlohmann::json_sax<nlohmann::json> {
 public:
  // Empty after a parse that went through.
  const std::string& error() const { return error_; }

  bool null() override { return Fail("null is not expected"); }
  bool boolean(bool) override { return Fail("a boolean is not expected"); }
  bool number_integer(number_integer_t value) override {
    return Fail(absl::StrCat("number ", value, " is not expected"));
  }
  bool number_unsigned(number_unsigned_t value) override {
    return Fail(absl::StrCat("number ", value, " is not expected"));
  }
  bool number_float(number_float_t, const string_t& text) override {
    return Fail(absl::StrCat("number ", ShownName(text), " is not expected"));
  }
  bool string(string_t& value) override {
    return Fail(absl::StrCat("string \"", ShownName(value), "\" is not expected"));
  }
  bool binary(binary_t&) override { return Fail("binary is not expected"); }
  bool start_object(std::size_t) override { return Fail("an object is not expected"); }
  bool key(string_t& name) override {
    return Fail(absl::StrCat("key \"", ShownName(name), "\" is not expected"));
  }
  bool end_object() override { return true; }
  bool start_array(std::size_t) override { return Fail("a list is not expected"); }
  bool end_array() override { return true; }
  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception&) override {
    return Fail(absl::StrCat("is not valid JSON at byte ", position));
  }

 protected:
  bool Fail(std::string message) {
    if (error_.empty()) error_ = std::move(message);
    return false;
  }

 private:
  std::string error_;
};

// Runs `reader` over all of `text`; returns the first error, empty if there is none.
inline std::string RunStrictJson(std::string_view text, StrictJson* reader) {
  const bool done = nlohmann::json::sax_parse(text.begin(), text.end(), reader);
  if (!reader->error().empty()) return reader->error();
  return done ? "" : "is not valid JSON";
}

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_CHECKPOINT_STRICT_JSON_H_
