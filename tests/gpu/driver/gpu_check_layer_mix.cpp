#include <memory>

#include "gpu/driver/gpu_check.h"
#include "mmkernels/layer_mix.h"

namespace mmk::check {
namespace {

constexpr double kEps = 1e-5;

struct Case {
  int64_t batch, frames, width;
  int layers;
  bool norm, affine, padded;
  int64_t offset;  // elements from an aligned address to the first row
};

// Inputs on host and device, rounded to the type of the device.
template <class T>
struct Problem {
  explicit Problem(const Case& c) : shape(c), rows(c.batch * c.frames), random(17) {
    for (int l = 0; l < c.layers; ++l) {
      layers.push_back(rounded<T>(random.normal(rows * c.width, 1.0)));
      Values stored(c.offset, 0.0);
      stored.insert(stored.end(), layers.back().begin(), layers.back().end());
      device_layers.emplace_back(stored);
    }
    weights = rounded<float>(random.normal(c.layers));
    gain = rounded<float>(random.normal(c.affine ? c.layers * c.width : 0, 1.0, 0.1));
    bias = rounded<float>(random.normal(c.affine ? c.layers * c.width : 0));
    grad = rounded<T>(random.normal(rows * c.width));
    for (int64_t b = 0; b < c.batch; ++b) {
      // Some are out of range: kernels clamp them.
      lengths.push_back(static_cast<double>(b % 3 == 0 ? c.frames + 5 : b % 3 == 1 ? -1 : c.frames / 2));
    }
  }

  bool valid(int64_t row) const {
    return !shape.padded || static_cast<double>(row % shape.frames) < lengths[row / shape.frames];
  }

  LayerMixParams params(const DeviceArray<float>& device_weights, const DeviceArray<float>& device_gain,
                        const DeviceArray<float>& device_bias,
                        const DeviceArray<int64_t>& device_lengths) const {
    LayerMixParams p = {};
    p.dtype = dtype_of<T>();
    p.layers = shape.layers;
    p.batch = shape.batch;
    p.frames = shape.frames;
    p.width = shape.width;
    for (int l = 0; l < shape.layers; ++l) {
      p.layer[l] = device_layers[l].data() + shape.offset;
      p.batch_stride[l] = shape.frames * shape.width;
      p.frame_stride[l] = shape.width;
    }
    p.lengths = shape.padded ? device_lengths.data() : nullptr;
    p.weights = device_weights.data();
    p.norm = shape.norm;
    p.norm_weight = device_gain.data();
    p.norm_bias = device_bias.data();
    p.eps = kEps;
    return p;
  }

  Case shape;
  int64_t rows;
  Random random;
  std::vector<Values> layers;
  std::vector<DeviceArray<T>> device_layers;
  Values weights, gain, bias, grad, lengths;
};

struct Expected {
  Values out, d_weights, d_gain, d_bias;
  std::vector<Values> d_layers;
};

template <class T>
void add_row(const Problem<T>& problem, int64_t row, int l, Expected& expected) {
  const int64_t width = problem.shape.width;
  const double* x = problem.layers[l].data() + row * width;
  const double* grad = problem.grad.data() + row * width;
  const double weight = problem.weights[l];
  double mean = 0.0, variance = 0.0;
  if (problem.shape.norm) {
    for (int64_t j = 0; j < width; ++j) mean += x[j] / static_cast<double>(width);
    for (int64_t j = 0; j < width; ++j)
      variance += (x[j] - mean) * (x[j] - mean) / static_cast<double>(width);
  }
  const double rstd = problem.shape.norm ? 1.0 / std::sqrt(variance + kEps) : 1.0;
  const auto gain = [&](int64_t j) { return problem.shape.affine ? problem.gain[l * width + j] : 1.0; };
  const auto bias = [&](int64_t j) { return problem.shape.affine ? problem.bias[l * width + j] : 0.0; };
  const auto normalised = [&](int64_t j) { return (x[j] - mean) * rstd; };
  double mean_g = 0.0, mean_gx = 0.0;
  for (int64_t j = 0; j < width; ++j) {
    const double value = normalised(j) * gain(j) + bias(j);
    expected.out[row * width + j] += weight * value;
    expected.d_weights[l] += grad[j] * value;
    if (problem.shape.affine) {
      expected.d_gain[l * width + j] += weight * grad[j] * normalised(j);
      expected.d_bias[l * width + j] += weight * grad[j];
    }
    mean_g += grad[j] * gain(j) / static_cast<double>(width);
    mean_gx += grad[j] * gain(j) * normalised(j) / static_cast<double>(width);
  }
  for (int64_t j = 0; j < width; ++j) {
    const double g = grad[j] * gain(j);
    expected.d_layers[l][row * width + j] =
        weight * (problem.shape.norm ? rstd * (g - mean_g - normalised(j) * mean_gx) : g);
  }
}

template <class T>
Expected reference(const Problem<T>& problem) {
  const Case& c = problem.shape;
  const size_t size = problem.rows * c.width;
  Expected expected = {Values(size), Values(c.layers), Values(problem.gain.size()),
                       Values(problem.bias.size()), std::vector<Values>(c.layers, Values(size))};
  for (int64_t row = 0; row < problem.rows; ++row) {
    for (int l = 0; problem.valid(row) && l < c.layers; ++l) add_row(problem, row, l, expected);
  }
  return expected;
}

template <class T>
std::string name_of(const Case& c) {
  char text[128];
  std::snprintf(text, sizeof text,
                "layer_mix %s (%lld, %lld, %lld) x %d norm=%d affine=%d padded=%d offset=%lld ",
                dtype_name<T>(), static_cast<long long>(c.batch), static_cast<long long>(c.frames),
                static_cast<long long>(c.width), c.layers, c.norm, c.affine, c.padded,
                static_cast<long long>(c.offset));
  return text;
}

template <class T>
void check_backward(Report& report, const Problem<T>& problem, const LayerMixParams& params,
                    const float* stats, const Expected& expected, bool need_layers) {
  const Case& c = problem.shape;
  const cuda::LayerMixBackwardPlan plan = cuda::layer_mix_backward_plan(
      params.dtype, problem.rows, c.width, c.layers, c.norm, true, c.affine, need_layers);
  const DeviceArray<T> grad(problem.grad);
  const DeviceArray<float> partial_dot(plan.dot_partials * c.layers);
  const DeviceArray<float> partial_scale(plan.affine_partials * c.layers * c.width);
  const DeviceArray<float> partial_shift(plan.affine_partials * c.width);
  const DeviceArray<float> d_weights(c.layers);
  const DeviceArray<float> d_gain(static_cast<int64_t>(problem.gain.size()));
  const DeviceArray<float> d_bias(static_cast<int64_t>(problem.bias.size()));
  std::vector<DeviceArray<T>> d_layers;
  LayerMixBackward args = {};
  args.mix = params;
  args.grad = grad.data();
  args.grad_batch_stride = c.frames * c.width;
  args.grad_frame_stride = c.width;
  args.stats = stats;
  for (int l = 0; need_layers && l < c.layers; ++l) {
    d_layers.emplace_back(problem.rows * c.width);
    args.d_layer[l] = d_layers.back().data();
  }
  args.need_weights = true;
  args.need_affine = c.affine;
  args.partial_dot = partial_dot.data();
  args.partial_scale = partial_scale.data();
  args.partial_shift = partial_shift.data();
  args.d_weights = d_weights.data();
  args.d_norm_weight = d_gain.data();
  args.d_norm_bias = d_bias.data();
  require(cuda::layer_mix_backward(args, nullptr), "layer_mix_backward");

  const std::string name = name_of<T>(c);
  const double terms = std::sqrt(static_cast<double>(problem.rows * c.width));
  report.compare(name + "d_weights", d_weights.values(), expected.d_weights, 1e-5, terms);
  report.compare(name + "d_norm_weight", d_gain.values(), expected.d_gain, 1e-5, 1.0);
  report.compare(name + "d_norm_bias", d_bias.values(), expected.d_bias, 1e-5, 1.0);
  for (size_t l = 0; l < d_layers.size(); ++l) {
    report.compare(name + "d_layer", d_layers[l].values(), expected.d_layers[l], epsilon<T>() + 1e-5);
  }
}

template <class T>
void check_case(Report& report, const Case& c) {
  const Problem<T> problem(c);
  const Expected expected = reference(problem);
  const DeviceArray<float> weights(problem.weights), gain(problem.gain), bias(problem.bias);
  const DeviceArray<int64_t> lengths(problem.lengths);
  const LayerMixParams params = problem.params(weights, gain, bias, lengths);
  const DeviceArray<T> out(problem.rows * c.width);
  const DeviceArray<float> stats(c.norm ? problem.rows * c.layers * 2 : 0);
  const DeviceArray<float> mixed_bias(c.affine ? c.width : 0);
  require(cuda::layer_mix_forward({params, out.data(), stats.data(), mixed_bias.data()}, nullptr),
          "layer_mix_forward");
  report.compare(name_of<T>(c) + "out", out.values(), expected.out, epsilon<T>() + 1e-5);
  for (bool need_layers : {false, true}) {
    check_backward(report, problem, params, stats.data(), expected, need_layers);
  }
}

// Widths of each row shape, aligned and not: a warp, a block, and too wide for registers.
constexpr Case kCases[] = {
    {2, 3, 64, 5, false, false, true, 0},   {3, 5, 33, 9, false, false, true, 0},
    {2, 3, 64, 3, false, false, false, 1},  {1, 2, 256, 64, true, true, false, 0},
    {3, 4, 384, 5, true, true, true, 0},    {1, 3, 768, 13, true, false, false, 0},
    {1, 2, 1024, 25, true, true, false, 0}, {1, 2, 1280, 3, true, true, false, 0},
    {3, 2, 2048, 3, true, true, true, 0},   {3, 2, 4104, 2, true, true, true, 0},
    {3, 2, 33, 9, true, true, true, 0},     {1, 2, 1023, 3, true, true, false, 0},
    {1, 2, 4099, 2, true, true, false, 0},  {2, 3, 64, 3, true, true, false, 1},
    {2, 300, 8, 2, true, true, true, 0},
};

}  // namespace

void check_layer_mix(Report& report) {
  for (const Case& c : kCases) {
    report.check(name_of<float>(c), [&] { check_case<float>(report, c); });
    report.check(name_of<__half>(c), [&] { check_case<__half>(report, c); });
    report.check(name_of<__nv_bfloat16>(c), [&] { check_case<__nv_bfloat16>(report, c); });
  }
}

}  // namespace mmk::check
