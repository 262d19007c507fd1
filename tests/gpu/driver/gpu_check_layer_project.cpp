#include "gpu/driver/gpu_check.h"
#include "mmkernels/layer_project.h"

namespace mmk::check {
namespace {

constexpr double kEps = 1e-5;

struct Case {
  int64_t rows, taps, inputs, outputs;
  Activation activation;
  bool norm;
  int64_t offset;  // elements from an aligned address to x
};

// Inputs and all results of the kernels, in double. P is the type of the parameters. Indices: n row, l tap, o
// output, c input.
template <class T, class P>
struct Problem {
  explicit Problem(const Case& given) : shape(given) {
    Random random(23);
    const auto [rows, taps, inputs, outputs, activation, norm, offset] = given;
    x = rounded<T>(random.normal(rows * taps * inputs, 1.0));
    weight = rounded<P>(random.normal(taps * outputs * inputs, 0.0, 1.0 / std::sqrt(inputs)));
    bias = rounded<P>(random.normal(taps * outputs));
    gain = rounded<P>(random.normal(norm ? taps * inputs : 0, 1.0, 0.1));
    shift = rounded<P>(random.normal(norm ? taps * inputs : 0));
    grad = rounded<T>(random.normal(rows * taps * outputs));
    folded_weight.resize(weight.size());
    folded_bias.resize(bias.size());
    for (int64_t i = 0; i < taps * outputs; ++i) fold(i);
    folded_weight = rounded<T>(folded_weight);
    stats.assign(rows * taps * 2, 0.0);
    product.assign(rows * taps * outputs, 0.0);
    z = product;
    for (int64_t i = 0; i < rows * taps; ++i) project(i);
  }

  void fold(int64_t i) {
    const int64_t tap = i / shape.outputs;
    double mean = 0.0;
    folded_bias[i] = bias[i];
    for (int64_t c = 0; c < shape.inputs; ++c) {
      const double w = weight[i * shape.inputs + c];
      const double v = shape.norm ? w * gain[tap * shape.inputs + c] : w;
      folded_weight[i * shape.inputs + c] = v;
      if (shape.norm) mean += v / static_cast<double>(shape.inputs);
      if (shape.norm) folded_bias[i] += w * shift[tap * shape.inputs + c];
    }
    for (int64_t c = 0; c < shape.inputs; ++c) folded_weight[i * shape.inputs + c] -= mean;
  }

  void project(int64_t i) {
    const int64_t tap = i % shape.taps;
    const double* row = x.data() + i * shape.inputs;
    double mean = 0.0, variance = 0.0;
    for (int64_t c = 0; c < shape.inputs; ++c) mean += row[c] / static_cast<double>(shape.inputs);
    for (int64_t c = 0; c < shape.inputs; ++c) {
      variance += (row[c] - mean) * (row[c] - mean) / static_cast<double>(shape.inputs);
    }
    stats[2 * i] = shape.norm ? mean : 0.0;
    stats[2 * i + 1] = shape.norm ? 1 / std::sqrt(variance + kEps) : 1.0;
    for (int64_t o = 0; o < shape.outputs; ++o) {
      const double* v = folded_weight.data() + (tap * shape.outputs + o) * shape.inputs;
      double sum = 0.0, centred = 0.0;
      for (int64_t c = 0; c < shape.inputs; ++c) {
        sum += row[c] * v[c];
        centred += (row[c] - stats[2 * i]) * v[c];
      }
      product[i * shape.outputs + o] = sum;
      z[i * shape.outputs + o] = stats[2 * i + 1] * centred + folded_bias[tap * shape.outputs + o];
    }
  }

  NormProductShape sizes() const { return {shape.rows, shape.taps, shape.inputs, shape.outputs}; }

  Case shape;
  Values x, weight, bias, gain, shift, grad, folded_weight, folded_bias, stats, product, z;
};

template <class T, class P>
std::string name_of(const Case& c) {
  char text[128];
  std::snprintf(
      text, sizeof text, "layer_project %s, %s (%lld, %lld, %lld) -> %lld activation=%d norm=%d offset=%lld ",
      dtype_name<T>(), dtype_name<P>(), static_cast<long long>(c.rows), static_cast<long long>(c.taps),
      static_cast<long long>(c.inputs), static_cast<long long>(c.outputs), static_cast<int>(c.activation),
      c.norm, static_cast<long long>(c.offset));
  return text;
}

// The arrays of a call on the device.
template <class T, class P>
struct Device {
  explicit Device(const Problem<T, P>& problem)
      : x(shifted(problem.x, problem.shape.offset)),
        weight(problem.weight),
        bias(problem.bias),
        gain(problem.gain),
        shift(problem.shift),
        folded_weight(static_cast<int64_t>(problem.weight.size())),
        folded_bias(static_cast<int64_t>(problem.bias.size())),
        folded_sum(problem.shape.norm ? problem.shape.taps * problem.shape.outputs : 0),
        stats(problem.shape.norm ? problem.shape.rows * problem.shape.taps * 2 : 0),
        input{x.data() + problem.shape.offset, problem.shape.taps * problem.shape.inputs,
              problem.shape.inputs} {}

  static Values shifted(const Values& values, int64_t offset) {
    Values result(offset, 0.0);
    result.insert(result.end(), values.begin(), values.end());
    return result;
  }

  DeviceArray<T> x;
  DeviceArray<P> weight, bias, gain, shift;
  DeviceArray<T> folded_weight;
  DeviceArray<float> folded_bias, folded_sum, stats;
  NormProductInput input;
};

template <class T, class P>
void check_forward(Report& report, const Problem<T, P>& problem, const Device<T, P>& device) {
  const Case& c = problem.shape;
  const std::string name = name_of<T, P>(c);
  const DType dtype = dtype_of<T>();
  const NormProductFold fold = {
      problem.sizes(),           device.weight.data(),     device.bias.data(),
      device.gain.data(),        device.shift.data(),      device.folded_weight.data(),
      device.folded_bias.data(), device.folded_sum.data(), dtype_of<P>()};
  require(cuda::norm_product_fold(dtype, fold, nullptr), "fold");
  report.compare(name + "folded_weight", device.folded_weight.values(), problem.folded_weight,
                 epsilon<T>() + 1e-6);
  report.compare(name + "folded_bias", device.folded_bias.values(), problem.folded_bias, 1e-5);
  if (c.norm) {
    const NormProductStats stats = {problem.sizes(), device.input, kEps, device.stats.data()};
    require(cuda::norm_product_stats(dtype, stats, nullptr), "stats");
    report.compare(name + "stats", device.stats.values(), problem.stats, 1e-5);
  }
  // Take the product of the reference in place of the library's.
  const DeviceArray<T> y(problem.product);
  const DeviceArray<T> preactivation(static_cast<int64_t>(problem.z.size()));
  const NormProductActivate activate_args = {problem.sizes(),           c.activation, device.stats.data(),
                                             device.folded_bias.data(), y.data(),     preactivation.data(),
                                             device.folded_sum.data()};
  // Rounding the product to half precision causes an error that grows with the mean of x.
  double tolerance = 2 * epsilon<T>() + 1e-5;
  if (cuda::layer_project_fuses(dtype, problem.sizes(), device.input)) {
    const cuda::LayerProjectProduct product = {device.input, device.folded_weight.data(), activate_args};
    require(cuda::layer_project_product(dtype, product, nullptr), "product");
  } else {
    require(cuda::norm_product_activate(dtype, activate_args, nullptr), "activate");
    tolerance *= 2;
  }
  Values expected;
  for (double z : problem.z) expected.push_back(activate(c.activation, z));
  report.compare(name + "z", preactivation.values(), problem.z, tolerance);
  report.compare(name + "y", y.values(), expected, tolerance);
}

template <class T, class P>
void check_gradient(Report& report, const Problem<T, P>& problem, const Device<T, P>& device) {
  const Case& c = problem.shape;
  const std::string name = name_of<T, P>(c);
  const int64_t rows = c.rows * c.taps;
  const Values z = rounded<T>(problem.z);
  Values g(z.size()), pull(c.norm ? rows : 0, 0.0), d_bias(c.taps * c.outputs, 0.0);
  for (int64_t i = 0; i < rows; ++i) {
    const double rstd = problem.stats[2 * i + 1];
    for (int64_t o = 0; o < c.outputs; ++o) {
      const int64_t place = i * c.outputs + o;
      const int64_t output = i % c.taps * c.outputs + o;
      // For relu the kernel reads the output.
      const double value = c.activation == Activation::kRelu ? activate(c.activation, z[place]) : z[place];
      const double dz = problem.grad[place] * slope(c.activation, value);
      d_bias[output] += dz;
      g[place] = dz * rstd;
      if (c.norm) pull[i] += rstd * rstd / c.inputs * dz * (value - problem.folded_bias[output]);
    }
  }
  Values stored = z;
  if (c.activation == Activation::kRelu) {
    for (double& value : stored) value = activate(c.activation, value);
  }
  const int64_t chunks = cuda::norm_product_chunks(c.rows);
  const DeviceArray<T> grad(problem.grad), value(stored), scaled(static_cast<int64_t>(g.size()));
  const DeviceArray<float> device_pull(static_cast<int64_t>(pull.size())),
      partial(chunks * c.taps * c.outputs);
  const NormProductGradient args = {problem.sizes(), c.activation,        grad.data(),
                                    value.data(),    device.stats.data(), device.folded_bias.data(),
                                    scaled.data(),   device_pull.data(),  partial.data()};
  require(cuda::norm_product_gradient(dtype_of<T>(), args, nullptr), "gradient");
  report.compare(name + "g", scaled.values(), g, epsilon<T>() + 1e-5);
  report.compare(name + "pull", device_pull.values(), pull, 1e-4);

  Values dx = rounded<T>(problem.x);
  const DeviceArray<T> device_dx(dx);
  if (c.norm) {
    const NormProductInputGradient input = {problem.sizes(), device.input, device.stats.data(),
                                            device_pull.data(), device_dx.data()};
    require(cuda::norm_product_input_gradient(dtype_of<T>(), input, nullptr), "input gradient");
    for (int64_t i = 0; i < rows * c.inputs; ++i) {
      const int64_t row = i / c.inputs;
      dx[i] -= pull[row] * (problem.x[i] - problem.stats[2 * row]);
    }
    report.compare(name + "dx", device_dx.values(), dx, epsilon<T>() + 1e-4);
  }

  // Any dVc will do: take the weight. With float parameters dW replaces it.
  const DeviceArray<float> dvc(problem.weight), row_sums(2 * c.taps * c.outputs);
  const DeviceArray<P> apart(std::is_same_v<P, float> ? 0 : static_cast<int64_t>(problem.weight.size()));
  const DeviceArray<P> device_d_bias(c.taps * c.outputs);
  const DeviceArray<P> d_gain(static_cast<int64_t>(problem.gain.size()));
  const DeviceArray<P> d_shift(static_cast<int64_t>(problem.gain.size()));
  const auto d_weight = [&] {
    if constexpr (std::is_same_v<P, float>) {
      return &dvc;
    } else {
      return &apart;
    }
  }();
  const NormProductUnfold unfold = {problem.sizes(),
                                    chunks,
                                    partial.data(),
                                    device.weight.data(),
                                    device.gain.data(),
                                    device.shift.data(),
                                    d_weight->data(),
                                    device_d_bias.data(),
                                    d_gain.data(),
                                    d_shift.data(),
                                    c.norm ? dvc.data() : nullptr,
                                    row_sums.data(),
                                    dtype_of<P>()};
  require(cuda::norm_product_unfold(unfold, nullptr), "unfold");
  report.compare(name + "d_bias", device_d_bias.values(), d_bias, epsilon<P>() + 1e-5,
                 std::sqrt(static_cast<double>(c.rows)));
  if (!c.norm) return;
  Values dw = problem.weight, expected_gain(problem.gain.size(), 0.0),
         expected_shift(problem.gain.size(), 0.0);
  for (int64_t row = 0; row < c.taps * c.outputs; ++row) {
    double mean = 0.0;
    for (int64_t j = 0; j < c.inputs; ++j)
      mean += problem.weight[row * c.inputs + j] / static_cast<double>(c.inputs);
    for (int64_t j = 0; j < c.inputs; ++j) {
      const double w = problem.weight[row * c.inputs + j];
      const int64_t column = row / c.outputs * c.inputs + j;
      expected_gain[column] += (w - mean) * w;
      expected_shift[column] += d_bias[row] * w;
      dw[row * c.inputs + j] = (w - mean) * problem.gain[column] + d_bias[row] * problem.shift[column];
    }
  }
  report.compare(name + "d_weight", d_weight->values(), dw, epsilon<P>() + 1e-4);
  report.compare(name + "d_norm_weight", d_gain.values(), expected_gain, epsilon<P>() + 1e-4);
  report.compare(name + "d_norm_bias", d_shift.values(), expected_shift, epsilon<P>() + 1e-4);
}

// Whole and partial tiles in every dimension, both tile widths, one and two chunks of rows.
constexpr Case kCases[] = {
    {1, 1, 8, 8, Activation::kNone, true, 0},      {130, 2, 200, 72, Activation::kGelu, true, 0},
    {128, 1, 64, 128, Activation::kRelu, true, 0}, {40, 2, 96, 136, Activation::kSilu, false, 0},
    {5, 3, 33, 7, Activation::kGeluTanh, true, 0}, {5, 3, 64, 16, Activation::kGelu, true, 1},
    {300, 1, 16, 8, Activation::kSilu, true, 0},   {2, 1, 4104, 8, Activation::kNone, true, 0},
};

template <class T, class P>
void check_case(Report& report, const Case& c) {
  report.check(name_of<T, P>(c), [&] {
    const Problem<T, P> problem(c);
    const Device<T, P> device(problem);
    check_forward(report, problem, device);
    check_gradient(report, problem, device);
  });
}

}  // namespace

void check_layer_project(Report& report) {
  for (const Case& c : kCases) {
    check_case<float, float>(report, c);
    check_case<__half, float>(report, c);
    check_case<__half, __half>(report, c);
    check_case<__nv_bfloat16, float>(report, c);
    check_case<__nv_bfloat16, __nv_bfloat16>(report, c);
  }
}

}  // namespace mmk::check
