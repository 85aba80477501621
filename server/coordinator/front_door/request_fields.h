// The numbers that the fields of a ModelInferRequest have on the wire, for what reads its bytes
// without the generated code, which stays at the edges. infer_proto_convert.cc has both, and does
// not compile where they differ.
#ifndef EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_REQUEST_FIELDS_H_
#define EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_REQUEST_FIELDS_H_

namespace epserve::coordinator {

// Of ModelInferRequest,
struct RequestField {
  static constexpr int kModelName = 1;
  static constexpr int kModelVersion = 2;
  static constexpr int kId = 3;
  static constexpr int kParameters = 4;
  static constexpr int kInputs = 5;
  static constexpr int kOutputs = 6;
  static constexpr int kRawContents = 7;
};

// of its tensors,
struct InputField {
  static constexpr int kName = 1;
  static constexpr int kDatatype = 2;
  static constexpr int kShape = 3;
  static constexpr int kParameters = 4;
  static constexpr int kContents = 5;
};
struct OutputField {
  static constexpr int kName = 1;
  static constexpr int kParameters = 2;
};

// of InferTensorContents: those of the types that tensors have here, and text;
struct ContentsField {
  static constexpr int kInt32 = 2;
  static constexpr int kInt64 = 3;
  static constexpr int kFp32 = 6;
  static constexpr int kBytes = 8;
};

// of an entry of a map of parameters, and of its value.
struct EntryField {
  static constexpr int kName = 1;
  static constexpr int kValue = 2;
};
struct ParameterField {
  static constexpr int kBool = 1;
  static constexpr int kInt64 = 2;
  static constexpr int kString = 3;
  static constexpr int kDouble = 4;
  static constexpr int kUint64 = 5;
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_REQUEST_FIELDS_H_
