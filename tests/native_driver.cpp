// Runs the kernels of native.cpp on what comes in from a pipe: for machines that have no Python, such as an emulated one.
//
// A case is a Case, then inv_scale [stride ? n / columns : 1] float32, column_scale [columns] float32, x [n]; the answer is
// q [n], codes [n], blocked [(n + 7) / 8], amax, counts [2], q of the codes [n], scale_gradient of x in the dtype of q [n],
// x rescaled [n].

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define KERNEL(name) qatrun_##name##_baseline
extern "C" {
void KERNEL(quantize)(int, const void*, int, int64_t, int64_t, const float*, int64_t, float, float, void*, int, uint8_t*,
                      uint8_t*, float*, int64_t*);
void KERNEL(decode)(const uint8_t*, int64_t, const float*, void*, int);
void KERNEL(rescale)(void*, int, int64_t, int64_t, const float*, int64_t, const float*, int64_t, const void*);
void KERNEL(scale_gradient)(const void*, int, int64_t, const float*, const uint8_t*, void*, int);
}

struct Case {
  int32_t format, x_dtype, q_dtype;
  float edge, saturated;
  int32_t n, columns, stride;
  float values[256];
};

template <class T>
std::vector<T> read(size_t n) {
  std::vector<T> values(n);
  if (fread(values.data(), sizeof(T), n, stdin) != n) exit(1);
  return values;
}

template <class T>
void write(const std::vector<T>& values) {
  fwrite(values.data(), sizeof(T), values.size(), stdout);
}

int main() {
  Case c;
  while (fread(&c, sizeof c, 1, stdin) == 1) {
    const size_t n = c.n, x_size = c.x_dtype ? 2 : 4, q_size = c.q_dtype ? 2 : 4;
    const auto inv_scale = read<float>(c.stride ? n / c.columns : 1), column_scale = read<float>(c.columns);
    auto x = read<uint8_t>(n * x_size);
    std::vector<uint8_t> q(n * q_size), codes(n), blocked((n + 7) / 8);
    std::vector<float> amax(1);
    std::vector<int64_t> counts(2);
    KERNEL(quantize)(c.format, x.data(), c.x_dtype, n, c.columns, inv_scale.data(), c.stride, c.edge, c.saturated, q.data(),
                     c.q_dtype, codes.data(), blocked.data(), amax.data(), counts.data());
    write(q), write(codes), write(blocked), write(amax), write(counts);
    KERNEL(decode)(codes.data(), n, c.values, q.data(), c.q_dtype);
    write(q);
    KERNEL(scale_gradient)(x.data(), c.x_dtype, n, inv_scale.data(), blocked.data(), q.data(), c.q_dtype);
    write(q);
    const std::vector<uint8_t> bias(x.begin(), x.begin() + c.columns * x_size);
    KERNEL(rescale)(x.data(), c.x_dtype, n / c.columns, c.columns, inv_scale.data(), c.stride, column_scale.data(), 1, bias.data());
    write(x);
  }
}
