// Checks and outputs that the CPU and the CUDA glue of merge share. The schema is in
// mmkernels/ops/merge/schema.py. Every query of a tensor is a call into torch, and there are many tensors:
// query each as little as possible.
#pragma once

#include <tuple>
#include <vector>

#include "mmkernels/merge.h"
#include "torch/glue.h"

namespace mmk::glue {

// The tensors of one argument: all of one type and device, each of the shape of the target with its index.
class MergeList {
 public:
  // An empty list has the type `otherwise`.
  MergeList(const char* name, const std::vector<Tensor>& tensors, ScalarType otherwise)
      : name_(name), tensors_(tensors), type_(tensors.empty() ? otherwise : tensors.front().scalar_type()) {}

  ScalarType type() const { return type_; }
  DType dtype() const { return dtype_of(type_, name_); }

  void check_count(size_t count) const {
    STD_TORCH_CHECK(tensors_.size() == count, name_, ": expected ", count, " tensors, got ", tensors_.size());
  }

  const Tensor& checked(size_t k, const Tensor& target, const Place& place) const {
    const Tensor& tensor = tensors_[k];
    STD_TORCH_CHECK(Place(tensor) == place, name_, "[", k, "]: expected the device of lam");
    STD_TORCH_CHECK(tensor.scalar_type() == type_, name_, ": expected one dtype for all");
    STD_TORCH_CHECK(&tensor == &target || same_sizes(tensor, target), name_, "[", k,
                    "]: expected the shape of target[", k, "]");
    return tensor;
  }

  // The data of a tensor. One that is not contiguous is copied; `copies` keeps the copy alive.
  const void* contiguous(size_t k, const Tensor& target, const Place& place,
                         std::vector<Tensor>& copies) const {
    const Tensor& tensor = checked(k, target, place);
    if (tensor.is_contiguous()) return tensor.const_data_ptr();
    copies.push_back(torch::stable::contiguous(tensor));
    return copies.back().const_data_ptr();
  }

 private:
  const char* name_;
  const std::vector<Tensor>& tensors_;
  ScalarType type_;
};

inline Tensor empty_as(const Tensor& tensor, const Place& place, ScalarType type) {
  const auto sizes = tensor.sizes();
  return new_empty(place, sizes.data(), sizes.size(), type);
}

// The inputs of a call, kept alive for its duration.
struct MergeInputs {
  const std::vector<Tensor>& given;
  MergeList target, source;
  Place place;
  ScalarType result, accumulate;
  MergeTypes types;
  Tensor lam;
  int64_t groups;
  int64_t elements = 0;
  std::vector<Tensor> copies;
  std::vector<MergePair> pairs;

  // Unless `read`, targets and sources are not copied, and the pairs do not point to them.
  MergeInputs(const std::vector<Tensor>& given_target, const std::vector<Tensor>& given_source,
              const Tensor& given_lam, const std::vector<int64_t>& group, ScalarType result_type, bool read)
      : given(given_target),
        target("target", given_target, result_type),
        source("source", given_source, result_type),
        place(given_lam),
        result(result_type) {
    const size_t count = given.size();
    source.check_count(count);
    STD_TORCH_CHECK(group.size() == count, "groups: expected ", count, " entries, got ", group.size());
    types = {target.dtype(), source.dtype(), dtype_of(result, "dtype")};
    STD_TORCH_CHECK(merge_supports(types),
                    "dtype: expected float64 alone, or float32 with one of float16 and bfloat16");
    accumulate = accumulate_type(types.result);
    STD_TORCH_CHECK(given_lam.dim() == 1, "lam: expected 1 dimension, got ", given_lam.dim());
    groups = given_lam.size(0);
    lam = checked(given_lam, {groups}, accumulate, given_lam, "lam");
    pairs.reserve(count);
    for (size_t k = 0; k < count; ++k) add_pair(k, group[k], read);
  }

 private:
  void add_pair(size_t k, int64_t group, bool read) {
    STD_TORCH_CHECK(group >= 0 && group < groups, "groups[", k, "]: expected 0 to ", groups - 1, ", got ",
                    group);
    MergePair pair = {nullptr, nullptr, given[k].numel(), group, elements};
    if (read) {
      pair.target = target.contiguous(k, given[k], place, copies);
      pair.source = source.contiguous(k, given[k], place, copies);
    } else {
      target.checked(k, given[k], place);
      source.checked(k, given[k], place);
    }
    elements += pair.size;
    pairs.push_back(pair);
  }
};

inline std::vector<Tensor> merge_results(const MergeInputs& inputs) {
  std::vector<Tensor> results;
  results.reserve(inputs.given.size());
  for (const Tensor& target : inputs.given) results.push_back(empty_as(target, inputs.place, inputs.result));
  return results;
}

// The type of the given tensors; that of lam if there are none.
inline ScalarType merge_out_type(const std::vector<Tensor>& out, const Tensor& lam) {
  return out.empty() ? lam.scalar_type() : out.front().scalar_type();
}

// The memory of the results. Checks `out` if the caller gave it.
inline std::vector<void*> merge_out_data(const MergeInputs& inputs, const std::vector<Tensor>& out,
                                         bool given) {
  const MergeList results("out", out, inputs.result);
  results.check_count(inputs.given.size());
  std::vector<void*> data;
  data.reserve(out.size());
  for (size_t k = 0; k < out.size(); ++k) {
    if (given) {
      results.checked(k, inputs.given[k], inputs.place);
      STD_TORCH_CHECK(out[k].is_contiguous(), "out[", k, "]: expected a contiguous tensor");
    }
    data.push_back(out[k].mutable_data_ptr());
  }
  return data;
}

inline MergeForward merge_forward_args(const MergeInputs& inputs, const std::vector<void*>& out) {
  return {inputs.types, inputs.lam.const_data_ptr(), inputs.pairs.data(), out.data(),
          static_cast<int64_t>(out.size())};
}

// Gradients, and the partial sums of d_lam; those not needed have no elements.
struct MergeGradients {
  Tensor d_lam, partial;
  std::vector<Tensor> d_target, d_source, copies;
  std::vector<MergeGradient> gradients;
  std::vector<int64_t> group_begin;
  MergeBackward args;

  MergeGradients(const MergeInputs& inputs, const std::vector<Tensor>& grad, bool need_lam,
                 const std::vector<int64_t>& need_target, const std::vector<int64_t>& need_source) {
    const MergeList grads("grad", grad, inputs.result);
    const size_t count = inputs.given.size();
    grads.check_count(count);
    gradients.resize(count);
    for (size_t k = 0; k < count; ++k) {
      const void* data = grads.contiguous(k, inputs.given[k], inputs.place, copies);
      gradients[k] = {data, nullptr, nullptr, 0};
    }
    allocate(inputs, need_target, inputs.target.type(), "need_target", &MergeGradient::d_target, d_target);
    allocate(inputs, need_source, inputs.source.type(), "need_source", &MergeGradient::d_source, d_source);
    const int64_t groups = need_lam ? inputs.groups : 0;
    if (need_lam) group_begin = merge_partials(inputs.pairs.data(), count, groups, gradients.data());
    d_lam = new_empty(inputs.lam, {groups}, inputs.accumulate);
    partial = new_empty(inputs.lam, {need_lam ? group_begin.back() : 0}, inputs.accumulate);
    args = {inputs.types,     inputs.lam.const_data_ptr(), inputs.pairs.data(),
            gradients.data(), static_cast<int64_t>(count), group_begin.data(),
            groups,           partial.mutable_data_ptr(),  groups > 0 ? d_lam.mutable_data_ptr() : nullptr};
  }

  std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> outputs() const {
    return {d_lam, d_target, d_source};
  }

 private:
  void allocate(const MergeInputs& inputs, const std::vector<int64_t>& needed, ScalarType type,
                const char* name, void* MergeGradient::* member, std::vector<Tensor>& made) {
    const int64_t count = static_cast<int64_t>(gradients.size());
    made.reserve(needed.size());
    for (const int64_t k : needed) {
      STD_TORCH_CHECK(k >= 0 && k < count, name, ": expected indices below ", count, ", got ", k);
      STD_TORCH_CHECK(gradients[k].*member == nullptr, name, ": expected every index once, got ", k,
                      " again");
      made.push_back(empty_as(inputs.given[k], inputs.place, type));
      gradients[k].*member = made.back().mutable_data_ptr();
    }
  }
};

}  // namespace mmk::glue
