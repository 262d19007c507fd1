#include "gpu/driver/gpu_check.h"
#include "mmkernels/adapter.h"
#include "mmkernels/norm_product.h"

namespace mmk::check {
namespace {

constexpr double kEps = 1e-5;
constexpr double kScale = 0.5;

enum class Residual : int { kNone, kInput, kSame, kFloat };

struct Case {
  int64_t rows, width, bottleneck;
  Activation activation;
  bool norm;
  Residual residual;
  int64_t multiprocessors;  // of the plan; with few of them, blocks have several tiles
  int64_t gap;              // elements between rows of x, residual and gradient
};

// Inputs and all results of the kernels, in double. P is the type of the parameters. Indices: r row, o hidden
// column, c column.
template <class T, class P>
struct Problem {
  explicit Problem(const Case& given) : shape(given) {
    Random random(31);
    const auto [rows, width, bottleneck, activation, norm, residual, multiprocessors, gap] = given;
    x = rounded<T>(random.normal(rows * width, 1.0));
    grad = rounded<T>(random.normal(rows * width));
    added = residual == Residual::kInput ? x : random.normal(rows * width);
    added = residual == Residual::kFloat ? rounded<float>(added) : rounded<T>(added);
    if (residual == Residual::kNone) added.assign(added.size(), 0.0);
    down = rounded<P>(random.normal(bottleneck * width, 0.0, 1.0 / std::sqrt(width)));
    up = rounded<P>(random.normal(bottleneck * width, 0.0, 1.0 / std::sqrt(bottleneck)));
    down_bias = rounded<P>(random.normal(bottleneck));
    up_bias = rounded<P>(random.normal(width));
    gain = rounded<P>(random.normal(norm ? width : 0, 1.0, 0.1));
    shift = rounded<P>(random.normal(norm ? width : 0));
    folded_bias = down_bias;
    folded_down = down;
    folded_up = rounded<T>(up);
    for (int64_t o = 0; norm && o < bottleneck; ++o) fold(o);
    folded_down = rounded<T>(folded_down);
    for (int64_t o = 0; norm && o < bottleneck; ++o) {
      double sum = 0.0;
      for (int64_t c = 0; c < width; ++c) sum += folded_down[o * width + c];
      folded_sum.push_back(sum);
    }
    d_bias.assign(bottleneck, 0.0);
    d_up_bias.assign(width, 0.0);
    for (int64_t r = 0; r < rows; ++r) {
      moments(r);
      project(r);
      restore(r);
      differentiate(r);
    }
  }

  void fold(int64_t o) {
    double mean = 0.0;
    for (int64_t c = 0; c < shape.width; ++c) {
      const int64_t place = o * shape.width + c;
      folded_bias[o] += down[place] * shift[c];
      folded_down[place] *= gain[c];
      mean += folded_down[place] / static_cast<double>(shape.width);
    }
    for (int64_t c = 0; c < shape.width; ++c) folded_down[o * shape.width + c] -= mean;
  }

  void moments(int64_t r) {
    double mean = 0.0, variance = 0.0;
    const double* row = x.data() + r * shape.width;
    for (int64_t c = 0; c < shape.width; ++c) mean += row[c] / static_cast<double>(shape.width);
    for (int64_t c = 0; c < shape.width; ++c) {
      variance += (row[c] - mean) * (row[c] - mean) / static_cast<double>(shape.width);
    }
    stats.push_back(shape.norm ? mean : 0.0);
    stats.push_back(shape.norm ? 1 / std::sqrt(variance + kEps) : 1.0);
  }

  // z and act(z); the kernels round both to T.
  void project(int64_t r) {
    Values row;
    for (int64_t o = 0; o < shape.bottleneck; ++o) {
      double sum = 0.0;
      for (int64_t c = 0; c < shape.width; ++c) {
        sum += (x[r * shape.width + c] - stats[2 * r]) * folded_down[o * shape.width + c];
      }
      row.push_back(stats[2 * r + 1] * sum + folded_bias[o]);
    }
    for (double value : rounded<T>(row)) z.push_back(value);
    for (double& value : row) value = activate(shape.activation, value);
    for (double value : rounded<T>(row)) hidden.push_back(value);
  }

  void restore(int64_t r) {
    for (int64_t c = 0; c < shape.width; ++c) {
      double sum = 0.0;
      for (int64_t o = 0; o < shape.bottleneck; ++o) {
        sum += hidden[r * shape.bottleneck + o] * folded_up[c * shape.bottleneck + o];
      }
      restored.push_back(sum);
      out.push_back(added[r * shape.width + c] + kScale * (sum + up_bias[c]));
    }
  }

  void differentiate(int64_t r) {
    const double rstd = stats[2 * r + 1];
    double total = 0.0;
    Values row;
    for (int64_t o = 0; o < shape.bottleneck; ++o) {
      const double value = z[r * shape.bottleneck + o];
      double sum = 0.0;
      for (int64_t c = 0; c < shape.width; ++c) {
        sum += grad[r * shape.width + c] * folded_up[c * shape.bottleneck + o];
      }
      const double dz = kScale * sum * slope(shape.activation, value);
      d_bias[o] += dz;
      total += dz * (value - folded_bias[o]);
      row.push_back(dz * rstd);
      activated.push_back(kScale * activate(shape.activation, value));
    }
    row = rounded<T>(row);
    pull.push_back(shape.norm ? rstd * rstd / static_cast<double>(shape.width) * total : 0.0);
    scaled.insert(scaled.end(), row.begin(), row.end());
    for (int64_t c = 0; c < shape.width; ++c) {
      const int64_t place = r * shape.width + c;
      double sum = 0.0;
      for (int64_t o = 0; o < shape.bottleneck; ++o) sum += row[o] * folded_down[o * shape.width + c];
      d_projected.push_back(sum);
      dx.push_back(sum - pull[r] * (x[place] - stats[2 * r]) +
                   (shape.residual == Residual::kInput ? grad[place] : 0.0));
      d_up_bias[c] += kScale * grad[place];
    }
  }

  AdapterShape sizes() const { return {shape.rows, shape.width, shape.bottleneck}; }
  // The plan for `multiprocessors` with the shared memory of the smallest GPU.
  cuda::AdapterTiles tiles() const {
    constexpr int64_t kSharedLimit = 99 * 1024;
    return cuda::adapter_tiles(sizes(), shape.residual == Residual::kInput, shape.multiprocessors,
                               kSharedLimit);
  }

  Case shape;
  Values x, grad, added, down, down_bias, up, up_bias, gain, shift;
  Values folded_down, folded_bias, folded_sum, folded_up, stats, z, hidden, restored, out;
  Values scaled, activated, pull, d_projected, dx, d_bias, d_up_bias;
};

template <class T, class P>
std::string name_of(const Case& c) {
  char text[128];
  std::snprintf(text, sizeof text, "adapter %s, %s (%lld, %lld) by %lld activation=%d norm=%d residual=%d ",
                dtype_name<T>(), dtype_name<P>(), static_cast<long long>(c.rows),
                static_cast<long long>(c.width), static_cast<long long>(c.bottleneck),
                static_cast<int>(c.activation), c.norm, static_cast<int>(c.residual));
  return text;
}

// (rows, width) on the device, rows `gap` elements apart.
template <class T>
struct DeviceRows {
  DeviceRows(const Values& values, const Case& c) : stride(c.width + c.gap), array(spread(values, c)) {}

  static Values spread(const Values& values, const Case& c) {
    Values result;
    for (int64_t r = 0; r < c.rows; ++r) {
      result.insert(result.end(), values.begin() + r * c.width, values.begin() + (r + 1) * c.width);
      if (r + 1 < c.rows) result.insert(result.end(), static_cast<size_t>(c.gap), 0.0);
    }
    return result;
  }

  AdapterRows view() const { return {array.data(), stride}; }

  int64_t stride;
  DeviceArray<T> array;
};

// The parameters on the device, as given and as norm_product_fold makes them.
template <class T, class P>
struct Device {
  explicit Device(const Problem<T, P>& problem)
      : x(problem.x, problem.shape),
        grad(problem.grad, problem.shape),
        same(problem.added, problem.shape),
        other(problem.added, problem.shape),
        down(problem.down),
        down_bias(problem.down_bias),
        up(problem.up),
        up_bias(problem.up_bias),
        gain(problem.gain),
        shift(problem.shift),
        folded_down(count(problem.down)),
        folded_up(count(problem.up)),
        folded_bias(count(problem.down_bias)),
        folded_sum(count(problem.folded_sum)),
        folded_up_bias(kFloat ? 0 : count(problem.up_bias)) {}

  static constexpr bool kFloat = std::is_same_v<P, float>;

  static int64_t count(const Values& values) { return static_cast<int64_t>(values.size()); }

  // As the kernels read it: float.
  const void* bias_of_up() const {
    return kFloat ? static_cast<const void*>(up_bias.data()) : folded_up_bias.data();
  }

  DeviceRows<T> x, grad, same;
  DeviceRows<float> other;
  DeviceArray<P> down, down_bias, up, up_bias, gain, shift;
  DeviceArray<T> folded_down, folded_up;
  DeviceArray<float> folded_bias, folded_sum, folded_up_bias;
};

template <class T, class P>
AdapterRows residual_of(const Problem<T, P>& problem, const Device<T, P>& device) {
  switch (problem.shape.residual) {
    case Residual::kSame:
      return device.same.view();
    case Residual::kFloat:
      return device.other.view();
    default:
      return {nullptr, 0};
  }
}

template <class T, class P>
bool fuses(const Problem<T, P>& problem, const Device<T, P>& device) {
  return cuda::adapter_fuses(dtype_of<T>(), problem.sizes()) && cuda::adapter_rows_fuse(device.x.view());
}

template <class T, class P>
void check_fold(Report& report, const Problem<T, P>& problem, const Device<T, P>& device) {
  const std::string name = name_of<T, P>(problem.shape);
  const Case& c = problem.shape;
  const NormProductFold args = {{c.rows, 1, c.width, c.bottleneck},
                                device.down.data(),
                                device.down_bias.data(),
                                device.gain.data(),
                                device.shift.data(),
                                device.folded_down.data(),
                                device.folded_bias.data(),
                                device.folded_sum.data(),
                                dtype_of<P>(),
                                {device.up.data(), device.folded_up.data(), c.width * c.bottleneck},
                                {device.up_bias.data(), device.folded_up_bias.data(), c.width}};
  require(cuda::norm_product_fold(dtype_of<T>(), args, nullptr), "fold");
  report.compare(name + "Vc", device.folded_down.values(), problem.folded_down, epsilon<T>() + 1e-6);
  report.compare(name + "b'", device.folded_bias.values(), problem.folded_bias, 1e-5);
  report.compare(name + "U", device.folded_up.values(), problem.folded_up, 0.0);
  if (!device.kFloat) report.compare(name + "c", device.folded_up_bias.values(), problem.up_bias, 0.0);
}

template <class T, class Out, class P>
void check_forward(Report& report, const Problem<T, P>& problem, const Device<T, P>& device) {
  const Case& c = problem.shape;
  const std::string name = name_of<T, P>(c);
  const DeviceArray<Out> out(c.rows * c.width);
  const DeviceArray<T> hidden(c.rows * c.bottleneck);
  const DeviceArray<float> stats(c.norm ? c.rows * 2 : 0);
  const cuda::AdapterForward args = {problem.sizes(),
                                     c.activation,
                                     kScale,
                                     kEps,
                                     device.x.view(),
                                     residual_of(problem, device),
                                     c.residual == Residual::kInput,
                                     dtype_of<Out>(),
                                     device.folded_down.data(),
                                     device.folded_bias.data(),
                                     device.folded_sum.data(),
                                     device.folded_up.data(),
                                     device.bias_of_up(),
                                     out.data(),
                                     hidden.data(),
                                     stats.data()};
  require(cuda::adapter_forward(dtype_of<T>(), args, problem.tiles(), nullptr), "forward");
  report.compare(name + "out", out.values(), problem.out, 2 * epsilon<T>() + 1e-5);
  report.compare(name + "z", hidden.values(), problem.z, 2 * epsilon<T>() + 1e-5);
  if (c.norm) report.compare(name + "stats", stats.values(), problem.stats, 1e-4);
}

// Sums the first `chunks` rows of a table of partial sums.
Values column_totals(const Values& partial, int64_t chunks, int64_t columns) {
  Values result(static_cast<size_t>(columns), 0.0);
  for (int64_t i = 0; i < chunks * columns; ++i) result[i % columns] += partial[i];
  return result;
}

template <class T, class P>
void check_backward(Report& report, const Problem<T, P>& problem, const Device<T, P>& device) {
  const Case& c = problem.shape;
  const std::string name = name_of<T, P>(c);
  const cuda::AdapterTiles tiles = problem.tiles();
  const DeviceArray<T> z(problem.z), dx(c.rows * c.width), activated(c.rows * c.bottleneck),
      scaled(c.rows * c.bottleneck);
  const DeviceArray<float> stats(c.norm ? problem.stats : Values());
  const DeviceArray<P> d_up_bias(c.width);
  const DeviceArray<float> partial_bias(tiles.tiles() * c.bottleneck),
      partial_up_bias(tiles.column_sums() * c.width);
  const cuda::AdapterBackward args = {problem.sizes(),
                                      c.activation,
                                      kScale,
                                      device.grad.view(),
                                      device.x.view(),
                                      c.residual == Residual::kInput,
                                      device.folded_down.data(),
                                      device.folded_bias.data(),
                                      device.folded_up.data(),
                                      z.data(),
                                      stats.data(),
                                      dx.data(),
                                      activated.data(),
                                      scaled.data(),
                                      partial_bias.data(),
                                      partial_up_bias.data()};
  require(cuda::adapter_backward(dtype_of<T>(), args, tiles, nullptr), "backward");
  const cuda::AdapterUpBias sums = {c.width,          tiles.column_sums(), kScale, partial_up_bias.data(),
                                    d_up_bias.data(), dtype_of<P>()};
  require(cuda::adapter_up_bias(sums, nullptr), "up_bias");
  const double root = std::sqrt(static_cast<double>(c.rows));
  report.compare(name + "dx", dx.values(), problem.dx, 2 * epsilon<T>() + 1e-4);
  report.compare(name + "a", activated.values(), problem.activated, epsilon<T>() + 1e-5);
  report.compare(name + "s", scaled.values(), problem.scaled, 2 * epsilon<T>() + 1e-5);
  report.compare(name + "d_bias", column_totals(partial_bias.values(), tiles.tiles(), c.bottleneck),
                 problem.d_bias, 1e-5, root);
  report.compare(name + "d_up_bias", d_up_bias.values(), problem.d_up_bias, epsilon<P>() + 1e-5, root);
}

// The steps around library products; the products here are those of the reference.
template <class T, class Out, class P>
void check_steps(Report& report, const Problem<T, P>& problem, const Device<T, P>& device) {
  const Case& c = problem.shape;
  const std::string name = name_of<T, P>(c) + "step ";
  const DType dtype = dtype_of<T>();
  const DeviceArray<T> z(problem.z), activated(c.rows * c.bottleneck), dx(c.rows * c.width);
  const DeviceArray<Out> out(c.rows * c.width);
  const DeviceArray<float> restored(problem.restored), d_projected(problem.d_projected), stats(problem.stats),
      pull(problem.pull);
  const DeviceArray<P> d_up_bias(c.width);
  const bool add_input = c.residual == Residual::kInput;
  require(cuda::adapter_activate(dtype, {problem.sizes(), c.activation, kScale, z.data(), activated.data()},
                                 nullptr),
          "activate");
  report.compare(name + "a", activated.values(), problem.activated, epsilon<T>() + 1e-5);
  cuda::AdapterFinish finish = {problem.sizes(),
                                kScale,
                                restored.data(),
                                device.bias_of_up(),
                                add_input ? device.x.view() : residual_of(problem, device),
                                {nullptr, 0},
                                nullptr,
                                nullptr,
                                dtype_of<Out>(),
                                out.data()};
  require(cuda::adapter_finish(dtype, finish, nullptr), "finish out");
  report.compare(name + "out", out.values(), problem.out, epsilon<Out>() + 1e-5);
  finish = {problem.sizes(),
            1.0,
            d_projected.data(),
            nullptr,
            add_input ? device.grad.view() : AdapterRows{nullptr, 0},
            device.x.view(),
            stats.data(),
            pull.data(),
            dtype,
            dx.data()};
  require(cuda::adapter_finish(dtype, finish, nullptr), "finish dx");
  report.compare(name + "dx", dx.values(), problem.dx, epsilon<T>() + 1e-5);
  const int64_t chunks = (c.rows + cuda::kAdapterSumRows - 1) / cuda::kAdapterSumRows;
  const DeviceArray<float> partial(chunks * c.width);
  require(cuda::adapter_column_sums(dtype, {problem.sizes(), device.grad.view(), partial.data()}, nullptr),
          "column sums");
  require(cuda::adapter_up_bias({c.width, chunks, kScale, partial.data(), d_up_bias.data(), dtype_of<P>()},
                                nullptr),
          "up_bias");
  report.compare(name + "d_up_bias", d_up_bias.values(), problem.d_up_bias, epsilon<P>() + 1e-5,
                 std::sqrt(static_cast<double>(c.rows)));
}

template <class T, class Out, class P>
void check_kernels(Report& report, const Problem<T, P>& problem) {
  const Device<T, P> device(problem);
  check_fold(report, problem, device);
  check_steps<T, Out>(report, problem, device);
  if (!fuses(problem, device)) return;
  check_forward<T, Out>(report, problem, device);
  check_backward(report, problem, device);
}

template <class T, class P>
void check_case(Report& report, const Case& c) {
  report.check(name_of<T, P>(c), [&] {
    const Problem<T, P> problem(c);
    if (c.residual == Residual::kFloat) return check_kernels<T, float>(report, problem);
    check_kernels<T, T>(report, problem);
  });
}

// Both tile heights, held and not, every padded bottleneck, partial tiles in every dimension and in the
// columns alone, and problems that are not fused.
constexpr Case kCases[] = {
    {1, 8, 8, Activation::kNone, true, Residual::kInput, 132, 0},
    {70, 200, 40, Activation::kGelu, true, Residual::kInput, 3, 8},
    {300, 136, 64, Activation::kSilu, true, Residual::kInput, 1, 0},
    {200, 520, 64, Activation::kGelu, false, Residual::kFloat, 1, 0},
    {128, 136, 64, Activation::kRelu, false, Residual::kSame, 1, 0},
    {150, 72, 128, Activation::kGeluTanh, true, Residual::kSame, 1, 0},
    {20, 72, 128, Activation::kRelu, false, Residual::kInput, 3, 0},
    {40, 264, 192, Activation::kRelu, true, Residual::kNone, 3, 0},
    {40, 200, 256, Activation::kSilu, true, Residual::kInput, 3, 16},
    {260, 12, 6, Activation::kGelu, true, Residual::kSame, 3, 1},
    {5, 33, 7, Activation::kNone, false, Residual::kInput, 3, 0},
};

}  // namespace

void check_adapter(Report& report) {
  for (const Case& c : kCases) {
    check_case<float, float>(report, c);
    check_case<__half, float>(report, c);
    check_case<__half, __half>(report, c);
    check_case<__nv_bfloat16, float>(report, c);
    check_case<__nv_bfloat16, __nv_bfloat16>(report, c);
  }
}

}  // namespace mmk::check
