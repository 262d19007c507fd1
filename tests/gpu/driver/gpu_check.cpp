// Usage: mmkernels_gpu_check [OP ...]; all ops without a name. A fault that ends the CUDA context fails all
// later cases, so `make gpu` runs each op in a process of its own.
#include "gpu/driver/gpu_check.h"

namespace {

struct Op {
  const char* name;
  void (*check)(mmk::check::Report& report);
};
constexpr Op kOps[] = {
    {"adapter", mmk::check::check_adapter},
    {"ctc_align", mmk::check::check_ctc_align},
    {"layer_mix", mmk::check::check_layer_mix},
    {"layer_project", mmk::check::check_layer_project},
    {"merge", mmk::check::check_merge},
    {"segment_attention", mmk::check::check_segment_attention},
    {"segment_pool", mmk::check::check_segment_pool},
    {"cif", mmk::check::check_cif},
    {"monotonic_align", mmk::check::check_monotonic_align},
    {"distill_loss", mmk::check::check_distill_loss},
};

}  // namespace

int main(int count, char** names) {
  mmk::check::Report report;
  for (const Op& op : kOps) {
    bool asked = count == 1;
    for (int i = 1; i < count; ++i) asked = asked || std::strcmp(names[i], op.name) == 0;
    if (asked) op.check(report);
  }
  return report.finish();
}
