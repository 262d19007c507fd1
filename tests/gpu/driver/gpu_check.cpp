#include "gpu/driver/gpu_check.h"

int main() {
  mmk::check::Report report;
  mmk::check::check_adapter(report);
  mmk::check::check_layer_mix(report);
  mmk::check::check_layer_project(report);
  return report.finish();
}
